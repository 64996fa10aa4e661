"""With no ``--moe-*`` flag at all, the models train EvoMoE as published, and a checkpoint says so."""

import pytest
import torch

from fairseq_evomoe.config.config import declarations
from fairseq_evomoe.config.errors import ConfigError
from support.cli import LM, build, call, call_hydra, help_of, parameters
from support.hydra import write_yaml
from support.tasks import DATA, TASKS

SHORT = {"max_update": 20, "disable_validation": True}
PUBLISHED = {
    "router": "dts",
    "gate_input": "hidden",
    "gate_noise": "always",
    "gate_weight": "softmax",
    "renormalize": "never",
    "threshold": 0.001,
    "balance_form": "published",
    "balance_weight": 0.0,
    "entropy_weight": 0.0,
    "temperature_start": 2.0,
    "temperature_end": 0.5,
    "temperature_schedule": "linear",
    "anneal_updates": 5000,
    "hard_update": 6000,
    "spawn_update": 2,
    "spawn_method": "mask",
    "eval_routing": "top1",
    "preset": None,
}


def without_moe(settings):
    return {name: value for name, value in settings.items() if not name.startswith("moe_")}


def saved(path):
    return torch.load(path / "checkpoint_last.pt", weights_only=False)


def says(state):
    """The options in a checkpoint; those of other routers are not given."""
    model = state["cfg"]["model"]
    names = ["preset", "router", *declarations()]
    options = {name: model["moe_" + name] for name in names}
    return {name: getattr(value, "value", value) for name, value in options.items() if value is not None}


@pytest.mark.parametrize("settings", TASKS)
def test_nothing_but_the_architecture(settings, tmp_path, request):
    data = request.getfixturevalue(DATA[settings["task"]])
    settings = {**without_moe(settings), **SHORT}
    result = call("fairseq-train", data, save_dir=tmp_path, **settings)
    steps = result.log("train_inner")
    assert [step["moe_phase"] for step in steps] == [0] * 2 + [1] * 18
    assert [step["moe_experts"] for step in steps[:2]] == [1, 1] and steps[2]["moe_experts"] > 3.9
    assert [step["moe_temperature"] for step in steps[:3]] == [2.0] * 3
    experts = 4 if settings["task"] == "translation" else 16
    (line,) = result.lines("spawned experts before update 2")
    assert f"1 -> {experts} experts" in line and "method mask (strength 0.1)" in line
    (line,) = result.lines("EvoMoE as published, which is the default since version 0.2")
    assert "--moe-preset evomoe_table" in line and "--moe-gate-input" in line
    assert not result.lines("no effect")

    state = saved(tmp_path)
    options = says(state)
    assert {name: options.get(name) for name in PUBLISHED} == PUBLISHED
    assert options["experts"] == experts and "auto" not in options.values()
    assert not {"top_k", "jitter", "hash", "slots"} & options.keys()
    gates = {name for name in state["model"] if ".moe.router." in name}
    assert gates and all(name.endswith("router.weight") for name in gates)


def test_the_gate_is_the_published_one(lm_data):
    """Every noise, weight and loss of the layer in training, against the formula."""
    setup = build(lm_data, **{**without_moe(LM), **SHORT})
    trainer = setup.train(4)
    moe = trainer.get_model().decoder.layers[1].moe
    options = moe.router.options
    assert (options.gate_noise, options.renormalize, options.gate_input) == ("always", "never", "hidden")
    assert not any(moe.loss_weights.values())
    _, _, log = setup.criterion(trainer.get_model().train(), setup.batches()[0])
    assert log["moe_phase"] == 1 and log["moe_temperature"] == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("name", ["evomoe_lm", "evomoe_lm_tiny"])
def test_yaml_without_any_option(name, lm_data, tmp_path):
    """The same with fairseq-hydra-train, by the model's own name and by an architecture's."""
    small = {"decoder_layers": 2, "decoder_attention_heads": 2, "dropout": 0.1}
    settings = {**without_moe(LM), **small, "max_update": 20}
    write_yaml(tmp_path / "train.yaml", lm_data, {**settings, "save_dir": str(tmp_path / "yaml")}, name=name)
    result = call_hydra(tmp_path / "train.yaml")
    assert len(result.lines("spawned experts before update 2: 1 -> 16")) == 1
    assert len(result.lines("EvoMoE as published, which is the default")) == 1
    assert not result.lines("no effect")
    options = says(saved(tmp_path / "yaml"))
    assert {option: options.get(option) for option in PUBLISHED} == PUBLISHED


def test_without_an_end_the_experts_wait_for_a_plateau(lm_data, tmp_path):
    settings = {**without_moe(LM), "max_update": 0, "max_epoch": 1, "disable_validation": True}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert len(result.lines("without --max-update, nothing limits how long --moe-spawn-update auto")) == 1
    options = says(saved(tmp_path))
    assert (options["spawn_update"], options["spawn_window"]) == ("auto", 500)


def test_a_preset_and_flags_over_it(lm_data, tmp_path):
    """The flags win, percentages are counted, and the checkpoint has numbers."""
    flags = {"moe_preset": "mixtral", "moe_experts": 4, "moe_top_k": 3, "moe_spawn_update": "10%"}
    settings = {**without_moe(LM), **SHORT, **flags}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert len(result.lines("spawned experts before update 2: 1 -> 4")) == 1
    assert not result.lines("is the default since version 0.2")
    options = says(saved(tmp_path))
    assert (options["preset"], options["router"], options["expert_activation"]) == (
        "mixtral",
        "topk",
        "swiglu",
    )
    assert (options["top_k"], options["spawn_update"], options["balance_choices"]) == (3, 2, "all")


def test_a_checkpoint_of_a_preset_file_is_used_without_the_file(lm_data, tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("name: Mine\noptions:\n  router: topk\n  total_ffn_dim: 8x\n  experts: 16\n")
    settings = {**without_moe(LM), "max_update": 2, "moe_preset": preset, "disable_validation": True}
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    preset.unlink()
    result = call(
        "fairseq-eval-lm", lm_data, path=tmp_path / "checkpoint_last.pt", user_dir=LM["user_dir"], cpu=True
    )
    assert "Perplexity" in result.output


WRONG = [
    (
        {"moe_balance_weight": float("nan")},
        "--moe-balance-weight must be a finite number at least 0, but is nan",
    ),
    ({"moe_threshold": float("inf")}, "--moe-threshold must be a finite number at least 0"),
    ({"moe_spawn_update": "110%"}, "--moe-spawn-update is 110%, more than the whole run"),
    ({"moe_spawn_window": "ten"}, "--moe-spawn-window must be a whole number of updates or a percentage"),
    ({"moe_top_k": 2}, "--moe-top-k 2 has no effect with --moe-router dts"),
    ({"moe_preset": "evomo"}, "--moe-preset evomo is no file and none of the presets"),
]


@pytest.mark.parametrize(
    "options, sentence", WRONG, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
@pytest.mark.parametrize("name", ["evomoe_lm", "evomoe_lm_tiny"])
def test_yaml_is_refused_like_flags(name, options, sentence, lm_data, tmp_path):
    settings = {**without_moe(LM), **options, "save_dir": str(tmp_path / "refused")}
    write_yaml(tmp_path / "train.yaml", lm_data, settings, name=name)
    with pytest.raises(ConfigError) as refused:
        call_hydra(tmp_path / "train.yaml")
    (error,) = refused.value.errors
    assert str(refused.value).startswith(sentence) and "moe_" + error.option in options
    assert not (tmp_path / "refused").exists() or not list((tmp_path / "refused").glob("*.pt"))


def test_a_checkpoint_s_options_make_the_same_model(lm_data, tmp_path):
    """What was decided is resolved to itself: training goes on from the checkpoint's own configuration."""
    settings = {**without_moe(LM), **SHORT, "max_update": 6, "moe_preset": "evomoe_context"}
    call("fairseq-train", lm_data, save_dir=tmp_path / "first", **settings)
    options = says(saved(tmp_path / "first"))
    explicit = {f"moe_{name}": value for name, value in options.items() if value is not False}
    call("fairseq-train", lm_data, save_dir=tmp_path / "second", **{**settings, **explicit})
    assert says(saved(tmp_path / "second")) == options
    first, second = (parameters(tmp_path / run / "checkpoint_last.pt") for run in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("settings", TASKS)
def test_help_has_every_option(settings):
    """Percent signs and all: it is formatted by argparse."""
    text = help_of("data", **without_moe(settings))
    for name in ("preset", "router", *declarations()):
        assert "--moe-" + name.replace("_", "-") + " " in text
    assert "10% of max-update" in text and "(i + 1) % moe-freq is 0" in text
