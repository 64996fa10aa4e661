"""Routers' arguments as options, and what the options of experts make."""

import pytest
import torch

from fairseq_evomoe.config.config import declarations
from fairseq_evomoe.config.errors import PREFIX
from fairseq_evomoe.config.options import MoEOptions, help_text
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import ROUTERS, Vocabulary
from support.cli import LM, MASKED_LM, TRANSLATION, build, call
from support.tasks import PLAIN


@pytest.mark.parametrize("name", ROUTERS)
def test_every_option_of_a_router_is_a_flag_that_is_not_given(name):
    flags = vars(MoEOptions())
    for option, declaration in ROUTERS[name].Options.declared().items():
        assert flags[PREFIX + option] is None
        default = getattr(declaration.default, "value", declaration.default)
        text = help_text(option, declarations()[option])
        assert default is None or str(default).lower() in text.lower()


OPTIONS = {
    "topk": {"top_k": 3, "random_second": False, "capacity_factor": 2.0, "balance_choices": "first"},
    "switch": {"jitter": 0.2, "capacity_factor": 1.5, "z_weight": 0.25},
    "top-p": {"top_p": 0.7, "renormalize": "straight-through"},
    "comet": {"top_k": 1, "gamma": 0.5},
    "recurrent": {"recurrent_dim": 24, "entropy_weight": 0.5},
    "dts": {"threshold": 0.25, "gate_noise": "soft", "eval_routing": "adaptive"},
    "hash": {"hashes": 2},
    "dynmoe": {"dynmoe_window": 7, "activity_weight": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_router(name, lm_data):
    flags = {PREFIX + option: value for option, value in OPTIONS[name].items()}
    moe = build(lm_data, **{**LM, **PLAIN, "moe_router": name, **flags}).model.decoder.layers[1].moe
    for option, value in OPTIONS[name].items():
        found = getattr(moe.router.options, option)
        assert getattr(found, "value", found) == value
        if option.endswith("_weight"):
            assert moe.loss_weights[option[: -len("_weight")]] == value
    if name == "recurrent":
        assert moe.router.gru.hidden_size == 24


@pytest.mark.parametrize("settings, side", [(LM, "decoder"), (MASKED_LM, "encoder")], ids=["lm", "masked"])
def test_a_gate_is_the_published_one_unless_an_old_auto_is_given(settings, side, lm_data):
    """What each ``auto`` means is tested in test_legacy.py; here it arrives, as what its model is."""

    def gate(**options):
        stack = getattr(build(lm_data, **{**settings, **PLAIN, **options}).model, side)
        return getattr(stack, "sentence_encoder", stack).layers[1].moe.router.options

    published = gate()
    assert (published.gate_input, published.renormalize) == ("hidden", "never")
    former = gate(moe_gate_input="auto", moe_renormalize="auto", moe_balance_form="auto")
    expected = ("table", "published", 0.0) if side == "decoder" else ("hidden", "normalized", 0.1)
    assert (former.gate_input, former.balance_form, former.balance_weight) == expected
    assert former.renormalize == "straight-through"


@pytest.mark.parametrize("name", ROUTERS)
def test_loss_weights_are_the_published_ones_unless_given(name):
    published = ROUTERS[name].Options().loss_weights()
    assert ROUTERS[name](8, 16, vocabulary=Vocabulary(9, torch.ones(9))).loss_weights == published
    weights = resolve({"router": name}, max_update=100).loss_weights()
    assert weights == {**published, "penalty": 0.0, "mutual_distillation": 0.0}
    given = {f"{loss}_weight": 0.25 for loss in published}
    weights = resolve({"router": name, **given}, max_update=100).loss_weights()
    assert {weights[loss] for loss in published} <= {0.25}


def test_a_published_weight_asks_for_our_criterion(lm_data, tmp_path):
    """switch is published with a balance loss, which fairseq's own criterion would drop."""
    settings = {**LM, **PLAIN, "moe_router": "switch", "criterion": "cross_entropy", "save_dir": tmp_path}
    with pytest.raises(
        ValueError, match="--moe-balance-weight is 0.01: use --criterion evomoe_cross_entropy"
    ):
        call("fairseq-train", lm_data, **settings)
    result = call("fairseq-train", lm_data, **{**settings, "moe_balance_weight": 0.0, "max_update": 2})
    assert len(result.log("train_inner")) == 2


def test_another_router_is_one_flag_away(lm_data, tmp_path):
    """The schedule of EvoMoE's gate is ignored with a warning."""
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **{**LM, "moe_router": "switch"})
    (warning,) = set(result.lines("no effect with --moe-router switch"))
    assert "--moe-anneal-updates" in warning and "--moe-hard-update" in warning
    phases = [line["moe_phase"] for line in result.log("train_inner")]
    assert phases == [0] * 6 + [2] * 8
    assert not call("fairseq-train", lm_data, save_dir=tmp_path / "dts", **LM).lines("no effect")


def test_stable_freezes_after_a_tenth_of_the_run(lm_data, tmp_path):
    settings = {**LM, "moe_router": "stable", "max_update": 26, "disable_validation": True}
    phases = [
        line["moe_phase"]
        for line in call("fairseq-train", lm_data, save_dir=tmp_path / "a", **settings).log("train_inner")
    ]
    assert phases == [0] * 6 + [1] * 2 + [2] * 18
    settings["moe_stable_update"] = 20
    phases = [
        line["moe_phase"]
        for line in call("fairseq-train", lm_data, save_dir=tmp_path / "b", **settings).log("train_inner")
    ]
    assert phases == [0] * 6 + [1] * 14 + [2] * 6


def test_widths_are_reported_and_used(translation_data, tmp_path):
    sizes = {"moe_expert_sizes": "arithmetic", "moe_total_ffn_dim": 300, "moe_router": "topk"}
    settings = {**TRANSLATION, **PLAIN, **sizes, "max_update": 1}
    result = call("fairseq-train", translation_data, save_dir=tmp_path, **settings)
    assert (
        result.output.count("layers with 4 experts of 40, 64, 88, 112 hidden units") == 2
    )  # nearest to 300: 304
    moe = build(translation_data, **settings).model.encoder.layers[1].moe
    assert moe.experts.widths == [40, 64, 88, 112]


@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu", "gelu", "silu"])
def test_expert_activations(name, lm_data):
    functions = {
        "swiglu": torch.nn.functional.silu,
        "geglu": torch.nn.functional.gelu,
        "reglu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
    }
    setup = build(lm_data, **{**LM, "moe_expert_activation": name})
    experts = setup.model.decoder.layers[1].moe.experts
    x = torch.randn(3, 32)
    hidden = functions[name](x @ experts.w1.t() + experts.b1)
    if name.endswith("glu"):
        hidden = hidden * (x @ experts.w3.t())
        assert experts.w3.std().item() == pytest.approx(experts.w1.std().item(), rel=0.1)
    expected = hidden @ experts.w2 + experts.b2[0]
    assert torch.allclose(experts(x, [3]), expected, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"moe_heads": 4}, {"moe_shared_expert": True}, {"moe_hyper_adapter": True}], ids=str
)
def test_parts_beside_the_experts_grow_with_them(options, lm_data, tmp_path):
    """They train; before the spawn it is the dense model, but for MH-MoE's projections."""
    whole = call("fairseq-train", lm_data, save_dir=tmp_path / "a", **LM, **options)
    losses = [line["loss"] for line in whole.log("train_inner")]
    assert losses[-1] < losses[0] - 1
    if "moe_heads" not in options:
        plain = call("fairseq-train", lm_data, save_dir=tmp_path / "b", **LM).log("train_inner")
        assert [line["loss"] for line in plain[:6]] == losses[:6]
