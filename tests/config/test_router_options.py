"""Routers' arguments as options, and what the options of experts make."""

import pytest
import torch

from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import ROUTERS
from support.cli import LM, MASKED_LM, TRANSLATION, build, call
from support.tasks import PLAIN

AUTO = {"moe_gate_input": "auto", "moe_renormalize": "auto", "moe_balance_form": "auto"}


def test_options_reach_the_router(lm_data):
    given = {
        "topk": {"top_k": 3, "random_second": False, "capacity_factor": 2.0},
        "switch": {"jitter": 0.2, "capacity_factor": 1.5},
        "top-p": {"top_p": 0.7},
        "comet": {"top_k": 1, "gamma": 0.5},
        "recurrent": {"recurrent_dim": 24},
    }
    for name, values in given.items():
        options = {"moe_" + key: value for key, value in values.items()}
        router = (
            build(lm_data, **{**LM, **PLAIN, "moe_router": name, **options})
            .model.decoder.layers[1]
            .moe.router
        )
        for key, value in values.items():
            assert getattr(router.options, key) == value, (name, key)
    assert router.gru.hidden_size == 24


@pytest.mark.parametrize(
    "choice, expected", [("auto", "never"), ("always", "always"), ("straight-through", "straight-through")]
)
def test_renormalize(choice, expected, lm_data):
    options = {**LM, **PLAIN, "moe_router": "top-p", "moe_renormalize": choice}
    assert build(lm_data, **options).model.decoder.layers[1].moe.router.options.renormalize == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"moe_router": "dts"}, ("table", "straight-through")),
        ({"moe_router": "dts", "moe_gate_input": "hidden"}, ("hidden", "straight-through")),
        ({"moe_router": "dts", "moe_renormalize": "never"}, ("table", "never")),
        ({"moe_router": "dts", "moe_spawn_method": "split"}, ("hidden", "straight-through")),
        ({"moe_router": "switch"}, ("hidden", "never")),
        ({"moe_router": "topk"}, ("hidden", "always")),
    ],
    ids=str,
)
def test_auto_is_what_was_the_default_before(options, expected, lm_data):
    options = {**LM, **PLAIN, **AUTO, **options}
    if options["moe_router"] == "topk" or options["moe_router"] == "switch":
        del options["moe_balance_form"]
    router = build(lm_data, **options).model.decoder.layers[1].moe.router
    assert (router.options.gate_input, router.options.renormalize) == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ("hidden", "normalized", 0.1, 0.03)),
        ({"moe_entropy_weight": 0.0, "moe_balance_weight": 0.2}, ("hidden", "normalized", 0.2, 0.0)),
        ({"moe_balance_form": "published"}, ("hidden", "published", 0.1, 0.03)),
        ({"moe_gate_input": "hidden"}, ("hidden", "published", 0.0, 0.0)),
        ({"moe_gate_input": "both", "moe_entropy_weight": 0.01}, ("both", "published", 0.0, 0.01)),
    ],
    ids=str,
)
def test_auto_is_a_confident_gate_where_tokens_are_masked(options, expected, lm_data):
    options = {**MASKED_LM, **PLAIN, **AUTO, **options}
    moe = build(lm_data, **options).model.encoder.sentence_encoder.layers[1].moe
    found, weights = moe.router.options, moe.loss_weights
    assert (found.gate_input, found.balance_form, weights["balance"], weights["entropy"]) == expected
    assert found.renormalize == "straight-through"


@pytest.mark.parametrize("name", ROUTERS)
def test_loss_weights_are_the_published_ones_unless_given(name):
    declared = ROUTERS[name].Options.declared()
    losses = [option for option, declaration in declared.items() if declaration.loss]
    config = resolve({"router": name}, max_update=100)
    assert config.loss_weights() == {
        **{option[: -len("_weight")]: declared[option].default for option in losses},
        "penalty": 0,
        "mutual_distillation": 0,
    }
    weights = resolve({"router": name, **dict.fromkeys(losses, 0.25)}, max_update=100).loss_weights()
    assert all(weights[option[: -len("_weight")]] == 0.25 for option in losses)


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
        len(result.lines("layers with 4 experts of 40, 64, 88, 112 hidden units")) == 2
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
