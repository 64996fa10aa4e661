"""Contradicting settings end in one sentence that names them and the way out, before training.

Here is what only a run shows, and some of what ``resolve()`` refuses; all of that is in ``test_resolve.py``.
"""

import re

import pytest
import torch

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.models.feed_forward import CheckpointMismatch
from fairseq_evomoe.moe.routers import ROUTERS, DenseToSparseRouter
from support.cli import LM, TRANSLATION, build, call, run
from support.refusals import refused

LM_ONE_LAYER = {**LM, "decoder_layers": 1, "moe_freq": 1}


@pytest.fixture
def refuses(lm_data, tmp_path):
    """``refuses(*parts, **settings)``: fairseq-train refuses the settings and saves nothing."""

    def check(*parts, settings=LM_ONE_LAYER, error=ValueError, data=lm_data, **changes):
        with pytest.raises(error) as raised:
            call(
                "fairseq-train",
                data,
                **{**settings, **changes, "cpu": True, "save_dir": tmp_path / "refused"},
            )
        refused(raised, *parts)
        assert not list((tmp_path / "refused").glob("*.pt"))

    return check


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"moe_experts": 0}, ["--moe-experts must be at least 1, but is 0"]),
        ({"moe_freq": 3}, ["--moe-freq 3", "number of layers (1)", "lower it"]),
        ({"moe_spawn_update": -1}, ["--moe-spawn-update must be", "at least 0", "but is -1"]),
        (
            {"moe_spawn_update": 14},
            ["--moe-spawn-update 14", "--max-update 14", "lower the one or raise the other"],
        ),
        ({"moe_spawn_update": 99}, ["--moe-spawn-update 99", "--max-update 14"]),
        ({"moe_spawn_update": "100%"}, ["--moe-spawn-update 14", "--max-update 14"]),
        ({"moe_threshold": 1.0}, ["--moe-threshold must be at least 0 and less than 1, but is 1.0"]),
        (
            {"moe_balance_weight": "nan"},
            ["--moe-balance-weight must be a finite number at least 0, but is nan"],
        ),
        (
            {"moe_balance_weight": "inf"},
            ["--moe-balance-weight must be a finite number at least 0, but is inf"],
        ),
        ({"moe_spawn_strength": "nan"}, ["--moe-spawn-strength must be a finite number", "nan"]),
        ({"moe_preset": "evomo"}, ["--moe-preset evomo is no file", "evomoe_context", "give one of them"]),
        (
            {"moe_router": "switch", "moe_top_k": 2},
            ["--moe-top-k 2 has no effect with --moe-router switch", "leave it out", "topk"],
        ),
        (
            {"moe_router": "topk", "moe_hard_update": None, "moe_threshold": 0.001},
            ["--moe-threshold 0.001 has no effect", "--moe-router topk", "dts"],
        ),
        ({"moe_router": "soft"}, ["--moe-router soft", "later ones", "evomoe_roberta"]),
        ({"moe_preset": "expert_choice"}, ["--moe-router expert-choice", "later ones", "evomoe_roberta"]),
        (
            {"moe_router": "stratified", "moe_hard_update": None, "moe_strata": "2,3"},
            ["--moe-strata", "sum to the --moe-experts (4)", "2,3"],
        ),
        (
            {"moe_router": "stratified", "moe_hard_update": None, "moe_penalty_weight": 0.1},
            ["--moe-penalty-weight", "--moe-router stratified has none"],
        ),
        (
            {"moe_router": "stratified", "moe_hard_update": None, "moe_eval_capacity_factor": 1.0},
            ["--moe-eval-capacity-factor", "a decoder"],
        ),
        ({"moe_router": "stable", "max_update": 0, "max_epoch": 1}, ["--max-update", "--moe-stable-update"]),
        (
            {"moe_router": "base", "moe_penalty_weight": 0.1},
            ["--moe-penalty-weight", "--moe-router base has none", "leave it out"],
        ),
        ({"moe_heads": 5}, ["--moe-heads must divide the width", "32, but is 5"]),
        (
            {"moe_expert_sizes": "arithmetic", "moe_spawn_method": "mask"},
            ["--moe-spawn-method mask", "--moe-expert-sizes", "--moe-spawn-method slice"],
        ),
        ({"moe_total_ffn_dim": 0}, ["--moe-total-ffn-dim must be a whole number greater than 0"]),
        (
            {"moe_spawn_method": "split", "moe_router": "base"},
            ["--moe-spawn-method split", "--moe-router base"],
        ),
        ({"moe_spawn_method": "split", "moe_experts": 5}, ["--moe-spawn-method split", "--moe-experts is 5"]),
        ({"quant_noise_pq": 0.1}, ["--quant-noise-pq does not work", "leave it out"]),
        (
            {"criterion": "cross_entropy", "moe_balance_weight": 0.01},
            [
                "--criterion cross_entropy",
                "--moe-balance-weight",
                "use --criterion evomoe_cross_entropy",
                "0.01",
            ],
        ),
        ({"ddp_backend": "fully_sharded"}, ["--ddp-backend fully_sharded", "use legacy_ddp or pytorch_ddp"]),
        ({"ddp_backend": "slowmo"}, ["--ddp-backend slowmo", "use legacy_ddp or pytorch_ddp"]),
        ({"zero_sharding": "os"}, ["--zero-sharding os", "leave it out"]),
        ({"use_bmuf": True}, ["--use-bmuf does not work", "leave it out"]),
        ({"optimizer": "composite"}, ["--optimizer composite", "adam"]),
        (
            {"optimizer": "sgd", "moe_gate_lr_scale": 0.5},
            ["--moe-gate-lr-scale 0.5", "--optimizer sgd"],
        ),
        ({"optimizer": "adafactor", "moe_gate_lr_scale": 0.5}, ["--moe-gate-lr-scale 0.5", "adafactor do"]),
        ({"moe_a2a_dtype": "bf16"}, ["--moe-a2a-dtype", "--moe-expert-parallel 1"]),
    ],
    ids=lambda value: (
        "-".join("{}={}".format(*item) for item in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_refused(refuses, changes, parts):
    refuses(*parts, **changes)


def test_all_that_is_wrong_is_told_at_once(lm_data, tmp_path):
    """One sentence for each option, and the error says which they are."""
    wrong = {
        "moe_experts": 0,
        "moe_threshold": "nan",
        "moe_top_k": 2,
        "moe_anneal_updates": "120%",
        "quant_noise_pq": 0.1,
    }
    with pytest.raises(ConfigError) as raised:
        call("fairseq-train", lm_data, **{**LM, **wrong, "cpu": True, "save_dir": tmp_path / "refused"})
    names = {name.replace("moe_", "") for name in wrong}
    assert {error.option for error in raised.value.errors} == names
    assert len(str(raised.value).splitlines()) == len(wrong)
    for name in wrong:
        assert "--" + name.replace("_", "-") in str(raised.value)


def test_refused_in_a_translation_model(translation_data, refuses):
    refuses("--moe-freq 3", "number of layers (2)", settings=TRANSLATION, data=translation_data, moe_freq=3)
    refuses(
        "use --criterion evomoe_label_smoothed_cross_entropy",
        settings=TRANSLATION,
        data=translation_data,
        criterion="label_smoothed_cross_entropy",
        moe_balance_weight=0.01,
    )


@pytest.mark.parametrize(
    "changes", [{"moe_experts": 1}, {"max_update": 0}, {"criterion": "cross_entropy"}], ids=str
)
def test_allowed(lm_data, changes):
    """What looks like the contradictions above and is none."""
    setup = build(
        lm_data, **{**LM_ONE_LAYER, "moe_spawn_update": 14, "max_update": 20, "cpu": True, **changes}
    )
    assert setup.trainer().get_num_updates() == 0  # built, and not refused


@pytest.mark.parametrize("changes", [{}, {"moe_threshold": 1.0}], ids=str)
def test_sentence_is_the_last_line_of_the_command(lm_data, tmp_path, changes):
    settings = {**LM_ONE_LAYER, "moe_spawn_update": 14, **changes}
    result = run("fairseq-train", lm_data, check=False, **settings, cpu=True, save_dir=tmp_path)
    assert result.returncode != 0
    assert re.match(r"(\S+\.Config|Value)Error: --\S+ .+\.$", result.output.strip().splitlines()[-1])
    assert not result.lines("train_inner")


class OtherRouter(DenseToSparseRouter):
    """A router with parameters of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros(self.experts))


MISMATCHES = [
    ({"moe_experts": 2}, ["has 4 experts", "--moe-experts is 2", "give --moe-experts 4"]),
    ({"moe_experts": 8}, ["has 4 experts", "--moe-experts is 8", "give --moe-experts 4"]),
    ({"decoder_ffn_embed_dim": 32}, ["hidden units in all", "the model's 128", "ffn-embed-dim"]),
    ({"moe_router": "other"}, ["router", "--moe-router", "'router.bias'"]),
    ({"moe_gate_input": "table"}, ["the model's table", "give --moe-gate-input hidden.", "decoder.layers.1"]),
    ({"moe_freq": 1}, ["--moe-freq", "decoder.layers.1"]),
]


@pytest.fixture(scope="module")
def checkpoint(lm_data, tmp_path_factory):
    """A checkpoint of a model that has spawned."""
    folder = tmp_path_factory.mktemp("spawned")
    call("fairseq-train", lm_data, **{**LM, "max_update": 8, "cpu": True, "save_dir": folder})
    return folder / "checkpoint_last.pt"


@pytest.mark.parametrize(
    "changes, parts", MISMATCHES, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
@pytest.mark.parametrize("how", ["restore_file", "finetune_from_model"])
def test_checkpoint_that_does_not_fit_in_training(refuses, checkpoint, monkeypatch, how, changes, parts):
    if "moe_router" in changes:
        # the enumeration of --moe-router is made at import: another router under the one name that is in it
        monkeypatch.setitem(ROUTERS, "dts", OtherRouter)
        changes = {}
    refuses(*parts, settings=LM, error=CheckpointMismatch, **changes, **{how: checkpoint})


@pytest.mark.parametrize(
    "changes, parts", MISMATCHES, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_checkpoint_that_does_not_fit_in_evaluation(lm_data, checkpoint, monkeypatch, changes, parts):
    if "moe_router" in changes:
        monkeypatch.setitem(ROUTERS, "dts", OtherRouter)
        changes = {}
    with pytest.raises(CheckpointMismatch) as error:
        call(
            "fairseq-eval-lm",
            lm_data,
            user_dir=LM["user_dir"],
            cpu=True,
            path=checkpoint,
            model_overrides=changes,
        )
    refused(error, *parts)


def test_optimizer_state_of_one_expert_for_many(lm_data, checkpoint, refuses, tmp_path):
    one = tmp_path / "one"
    call(
        "fairseq-train",
        lm_data,
        **{**LM, "max_update": 7, "save_interval_updates": 3, "cpu": True, "save_dir": one},
    )
    refuses(
        "--moe-spawn-update 0",
        "--reset-optimizer",
        settings=LM,
        error=CheckpointMismatch,
        moe_spawn_update=0,
        restore_file=one / "checkpoint_1_3.pt",
    )


def test_nan_in_a_gate_names_the_layer(lm_data, checkpoint, tmp_path):
    state = torch.load(checkpoint)
    state["model"]["decoder.layers.1.moe.router.weight"][0] = float("nan")
    torch.save(state, tmp_path / "poisoned.pt")
    with pytest.raises(FloatingPointError) as error:
        call(
            "fairseq-train", lm_data, **LM, cpu=True, restore_file=tmp_path / "poisoned.pt", save_dir=tmp_path
        )
    refused_message = str(error.value)
    assert "NaN or Inf in the gate of decoder.layers.1" in refused_message
