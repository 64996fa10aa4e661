"""The registered architectures, and the options of the fairseq models that are extended."""

import argparse

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.models.build import _take_apart
from fairseq_evomoe.moe.options import OptionError
from support.cli import LM, MASKED_LM, TRANSLATION, build, call
from support.tasks import dense

ARCHITECTURES = {
    "evomoe_roberta": "roberta",
    "evomoe_roberta_large": "roberta_large",
    "evomoe_lm": "transformer_lm",
    "evomoe_lm_gpt": "transformer_lm_gpt",
    "evomoe_lm_gpt2_medium": "transformer_lm_gpt2_medium",
    "evomoe_transformer": "transformer",
    "evomoe_transformer_iwslt_de_en": "transformer_iwslt_de_en",
    "evomoe_transformer_wmt_en_de": "transformer_wmt_en_de",
    "evomoe_transformer_vaswani_wmt_en_de_big": "transformer_vaswani_wmt_en_de_big",
}
TINY = ("evomoe_roberta_tiny", "evomoe_lm_tiny", "evomoe_transformer_tiny")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures_have_the_sizes_of_fairseq_s(arch):
    ours, theirs = argparse.Namespace(), argparse.Namespace()
    ARCH_CONFIG_REGISTRY[arch](ours)
    ARCH_CONFIG_REGISTRY[ARCHITECTURES[arch]](theirs)
    assert vars(ours) == vars(theirs) or arch in ("evomoe_roberta", "evomoe_transformer")
    assert issubclass(ARCH_MODEL_REGISTRY[arch], ARCH_MODEL_REGISTRY[ARCHITECTURES[arch]])


def bare(settings, arch):
    """Settings without sizes."""
    kept = {name: value for name, value in settings.items() if not name.endswith("embed_dim")}
    return {**kept, "arch": arch}


@pytest.mark.parametrize(
    "arch", ["evomoe_roberta", "evomoe_lm", "evomoe_transformer", "evomoe_transformer_iwslt_de_en", *TINY]
)
def test_architectures_build(arch, request):
    settings = next(
        s for s in (MASKED_LM, LM, TRANSLATION) if arch.startswith(s["arch"].replace("_tiny", ""))
    )
    data = request.getfixturevalue("translation_data" if settings is TRANSLATION else "lm_data")
    model = build(data, **bare(settings, arch)).model
    if arch not in TINY:
        plain = {**dense(bare(settings, arch)), "arch": ARCHITECTURES[arch]}
        plain = {name: value for name, value in plain.items() if "layers" not in name and "heads" not in name}
        plain = {name: value for name, value in plain.items() if not name.startswith("decoder_")}
        reference = build(data, **plain).model
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    assert any(hasattr(module, "moe") for module in model.modules())


@pytest.mark.parametrize(
    "arch", ["evomoe_roberta_large", "evomoe_lm_gpt2_medium", "evomoe_transformer_vaswani_wmt_en_de_big"]
)
def test_big_architectures_build(arch, request):
    """With two layers, which shows the widths."""
    settings = next(
        s for s in (MASKED_LM, LM, TRANSLATION) if arch.startswith(s["arch"].replace("_tiny", ""))
    )
    data = request.getfixturevalue("translation_data" if settings is TRANSLATION else "lm_data")
    few = {"decoder_layers": 2} if settings is LM else {"encoder_layers": 2, "decoder_layers": 2}
    few.pop("decoder_layers") if settings is MASKED_LM else None
    model = build(data, **bare(settings, arch), **few).model
    (experts, *_) = [module.moe.experts for module in model.modules() if hasattr(module, "moe")]
    assert experts.w1.shape == ((5120, 1280) if "gpt2" in arch else (4096, 1024))


LM_OPTIONS = [
    {"no_decoder_final_norm": True, "share_decoder_input_output_embed": True, "update_freq": 2},
    {"adaptive_softmax_cutoff": "10,20", "criterion": "adaptive_loss", "ddp_backend": "legacy_ddp"},
    {"scale_fc": True, "scale_attn": True, "scale_heads": True, "scale_resids": True},
    {"layernorm_embedding": True, "decoder_learned_pos": True, "batch_size": None, "max_tokens": 64},
    {"activation_fn": "gelu", "activation_dropout": 0.1, "moe_freq": 1, "moe_gate_weight": "gumbel"},
    {"moe_temperature_schedule": "exponential", "moe_spawn_method": "reinit", "moe_eval_routing": "adaptive"},
    {"moe_temperature_schedule": "constant", "moe_hard_update": -1, "moe_spawn_method": "copy"},
]
TRANSLATION_OPTIONS = [
    {"encoder_normalize_before": True, "decoder_normalize_before": True, "store_ema": True, "ema_fp32": True},
    {"share_all_embeddings": False, "share_decoder_input_output_embed": True, "no_cross_attention": True},
    {"cross_self_attention": True, "encoder_learned_pos": True, "layernorm_embedding": True},
    {"encoder_layerdrop": 0.2, "decoder_layerdrop": 0.2, "checkpoint_activations": True},
    {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "share_all_embeddings": False},
]
MASKED_LM_OPTIONS = [
    {"encoder_normalize_before": True, "untie_weights_roberta": True, "max_positions": 64},
    {"encoder_layerdrop": 0.2, "moe_freq": 1},
    {"checkpoint_activations": True, "moe_balance_weight": 0.1},
]
RUNS = [
    pytest.param(settings, options, id="{}-{}".format(settings["task"], "-".join(options)))
    for settings, several in (
        (LM, LM_OPTIONS),
        (TRANSLATION, TRANSLATION_OPTIONS),
        (MASKED_LM, MASKED_LM_OPTIONS),
    )
    for options in several
]


@pytest.mark.parametrize("settings, options", RUNS)
def test_it_trains_with(settings, options, tmp_path, request):
    data = request.getfixturevalue("translation_data" if settings is TRANSLATION else "lm_data")
    result = call("fairseq-train", data, save_dir=tmp_path, **{**settings, **options})
    assert len(result.lines("spawned experts")) == 1
    losses = [step["loss"] for step in result.log("train_inner")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("settings", [LM, TRANSLATION, MASKED_LM], ids=lambda settings: settings["task"])
@pytest.mark.parametrize("how", ["checkpoint_activations", "offload_activations"])
@pytest.mark.parametrize("spawned", [False, True])
def test_recomputing_activations_changes_no_gradient(settings, how, spawned, request):
    """Not that of the auxiliary loss either, which is no output of a layer."""
    data = request.getfixturevalue("translation_data" if settings is TRANSLATION else "lm_data")
    settings = {
        **settings,
        "moe_balance_weight": 1.0,
        "moe_hard_update": 1,
        "moe_spawn_update": 0 if spawned else 6,
    }
    found = []
    for options in ({}, {how: True}):
        setup = build(data, **{**settings, **options})
        setup.model.train().set_num_updates(5)
        batch = setup.batches()[0]
        calls = []
        for name, module in setup.model.named_modules():
            if name.endswith(".moe"):
                module.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
        torch.manual_seed(7)
        loss, _, log = setup.criterion(setup.model, batch)
        loss.backward()
        assert len(calls) == len(set(calls)) * (2 if options else 1)
        found.append((loss, {name: p.grad for name, p in setup.model.named_parameters()}, log))
    (loss, gradients, log), (other_loss, others, other_log) = found
    assert loss.item() == pytest.approx(other_loss.item(), rel=1e-6)
    assert float(log["moe_balance"]) == pytest.approx(float(other_log["moe_balance"]), rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient is None) == (others[name] is None), name
        assert gradient is None or torch.allclose(gradient, others[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    "option",
    [{"quant_noise_pq": 0.1}, {"quant_noise_scalar": 0.1}, {"base_layers": 1}],
    ids=lambda o: "-".join(o),
)
def test_what_experts_cannot_do_is_refused(option, lm_data):
    with pytest.raises(ValueError, match="--{} does not work".format(next(iter(option)).replace("_", "-"))):
        build(lm_data, **{**LM, **option})


def test_scale_fc_s_norm_is_the_dense_model_s(lm_data):
    settings = {**LM, "scale_fc": True}
    plain = build(lm_data, **dense(settings)).model.eval()
    if not any("ffn_layernorm" in name for name in plain.state_dict()):
        pytest.skip("this fairseq has the flag and makes no norm")
    moe = build(lm_data, **settings)
    moe.model.load_state_dict(plain.state_dict())
    batch = moe.batches()[0]["net_input"]
    with torch.no_grad():
        assert torch.allclose(moe.model.eval()(**batch)[0], plain(**batch)[0], atol=1e-6)


def test_a_norm_of_hidden_units_needs_experts_of_its_width(lm_data):
    layer = build(lm_data, **dense(LM)).model.decoder.layers[0]
    layer.ffn_layernorm, layer.widths = torch.nn.LayerNorm(48), [24, 72]  # that of --scale-fc
    with pytest.raises(OptionError, match="--scale-fc normalises hidden units"):
        _take_apart(resolve({}, ffn_dims=[48]), layer)
