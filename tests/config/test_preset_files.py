"""Presets: published systems as files of options, which flags override."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fairseq_evomoe.config.config import declarations
from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.presets import FOLDER, load, names
from fairseq_evomoe.config.resolve import given_options, resolve, write_back
from fairseq_evomoe.moe.options import OptionError

NAMES = (
    "evomoe switch gshard mixtral base hash hash_balanced stable top_p hmoe_topk hmoe_topp dynmoe fusemoe "
    "comet rmoe soft mh_moe mode hypermoe deepseek upcycling drop_upcycling emoe evomoe_hmoe evomoe_context "
    "evomoe_table narrow_hash remoe loss_free quantile_balancing xmoe dtop_p "
    "expert_choice expert_threshold moe_plus_plus evomoe_activation modified_softmax ds_moe default_moe "
    "evomoe_stages smola m2mkd stratified"
).split()
RUN = {"max_update": 1000, "ffn_dims": [64]}


def test_there_are_the_systems_of_the_papers_and_ours():
    assert names() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_and_resolves(name):
    preset = load(name)
    assert preset.id == name and preset.name and preset.paper
    keys = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert set(keys) >= {"name", "paper", "differs", "options"}
    config = resolve({"preset": name}, **RUN)
    assert config.preset == name and config.router == preset.options.get("router", "dts")


@pytest.mark.parametrize("name", NAMES)
def test_it_has_nothing_that_is_a_default(name):
    """Leaving any option out makes another configuration."""
    options = load(name).options
    whole = resolve(options, **RUN)
    for left_out in set(options) - {"router"}:
        without = resolve({key: value for key, value in options.items() if key != left_out}, **RUN)
        assert without.flat()[left_out] != whole.flat()[left_out], left_out
    assert options.get("router") != "dts"


def test_the_published_system_is_what_nothing_given_is():
    assert resolve({"preset": "evomoe"}, **RUN).flat() == {**resolve({}, **RUN).flat(), "preset": "evomoe"}


WHAT_IS_PUBLISHED = {
    "switch": {"router": "switch", "balance_weight": 0.01, "capacity_factor": 1.25},
    "gshard": {"top_k": 2, "renormalize": "always", "random_second": True, "balance_choices": "first"},
    "mixtral": {"top_k": 2, "renormalize": "always", "expert_activation": "swiglu", "balance_choices": "all"},
    "hash_balanced": {"hash": "balanced", "hashes": 1},
    "stable": {"balance_weight": 0.3, "distillation_weight": 0.3, "light_dim": 50, "stable_update": 100},
    "top_p": {"top_p": 0.4, "entropy_weight": 1e-4, "renormalize": "never", "balance_weight": 0.01},
    "hmoe_topp": {"top_p": 0.6, "entropy_weight": 0.03, "penalty_weight": 0.1, "renormalize": "always"},
    "hmoe_topk": {"top_k": 2, "penalty_weight": 0.1, "balance_weight": 0.0, "expert_sizes": "arithmetic"},
    "dynmoe": {"diversity_weight": 0.01, "balance_weight": 0.01, "activity_weight": 0.01, "max_experts": 16},
    "rmoe": {"router": "recurrent", "recurrent_dim": 128, "top_k": 2},
    "deepseek": {"renormalize": "never", "shared_expert": True, "experts": 32, "top_k": 4},
    "emoe": {"spawn_method": "split", "top_k": 4},
    "upcycling": {"spawn_method": "copy", "router": "topk"},
    "drop_upcycling": {"spawn_method": "reinit", "router": "topk"},
    "evomoe_hmoe": {"spawn_method": "slice", "spawn_update": 100, "penalty_weight": 0.1},
    "evomoe_table": {
        "gate_input": "table",
        "renormalize": "straight-through",
        "gate_noise": "soft",
        "spawn_update": 0,
        "entropy_weight": 0.0,
    },
    "evomoe_context": {
        "gate_input": "both",
        "renormalize": "straight-through",
        "gate_noise": "soft",
        "entropy_weight": 0.03,
        "balance_weight": 0.1,
        "balance_form": "normalized",
        "spawn_update": 100,
    },
    "evomoe_stages": {
        "spawn_update": "100:4,250:16",
        "gate_warmup": 50,
        "hard_update": 0,
        "gate_input": "both",
        "entropy_weight": 0.03,
    },
    "remoe": {"mean_experts": 1.0, "l1_start": 1e-8, "l1_factor": 1.2, "l1_form": "balanced"},
    "loss_free": {"balance": "bias", "balance_rate": 0.001, "balance_weight": 0.0, "top_k": 4, "experts": 32},
    "quantile_balancing": {"balance": "quantile", "balance_weight": 0.0, "shared_expert": True},
    "xmoe": {"top_k": 1, "renormalize": "never", "routing_dim": 16, "balance_weight": 0.01},
    "dtop_p": {"router": "dtop-p", "mean_experts": 2.0, "top_p": 0.4},
    "expert_choice": {"mean_experts": 2.0},
    "expert_threshold": {"mean_experts": 1.0, "cutoff_decay": 0.99},
    "moe_plus_plus": {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2, "free_balance": 0.75},
    "evomoe_activation": {"router": "dts", "gate_activation": "gelu", "gate_input_activation": "identity"},
    "modified_softmax": {"router": "topk", "gate_activation": "identity", "gate_input_activation": "tanh"},
    "ds_moe": {"threshold": 0.0, "hard_update": -1, "mutual_information_weight": 0.01, "hard_experts": 2},
    "default_moe": {"router": "default-moe", "top_k": 2, "default_decay": 0.9, "balance_weight": 0.01},
    "smola": {"router": "soft", "rank": 4, "beside": "all", "slots": 1, "freeze": "backbone", "freq": 1},
    "m2mkd": {"router": "topk", "meta_updates": 200, "module_updates": 300, "module_alpha": 0.5},
    "stratified": {"strata": "8,8", "strata_norm": "every", "top_k": 2, "balance_weight": 0.01},
    "narrow_hash": {"hashes": 4, "experts": 32, "total_ffn_dim": "8x"},
}


@pytest.mark.parametrize("name", WHAT_IS_PUBLISHED)
def test_it_is_what_it_says(name):
    flat = resolve({"preset": name}, **RUN).flat()
    assert {option: flat[option] for option in WHAT_IS_PUBLISHED[name]} == WHAT_IS_PUBLISHED[name]


def other_value(option, value):
    """Another value than a preset's, which goes with the rest of the preset."""
    declared = declarations()[option][0]
    if declared.type is bool:
        return not value
    if declared.choices:
        fitting = [word for word in ("reinit", "slice", "never", "all", *declared.choices) if word != value]
        return next(word for word in fitting if word in declared.choices)
    return {
        "total_ffn_dim": "16x",
        "expert_sizes": "uniform",
        "experts": 8,
        "max_experts": 32,
        "freeze": "router",
    }.get(option, 4 if declared.type is int and value != 4 else 0.5 if declared.type is float else 2)


@pytest.mark.parametrize("name", NAMES)
def test_flags_override_it(name):
    options = {key: value for key, value in load(name).options.items() if key != "router"}
    preset = resolve({"preset": name, "experts": 8}, **RUN).flat()
    for option, value in options.items():
        given = {"experts": 8, option: other_value(option, value)}
        if option == "renormalize" and options.get("random_second"):
            given["random_second"] = False
        flat = resolve({"preset": name, **given}, **RUN).flat()
        assert flat[option] == given[option] != value
        for other in set(options) - set(given):
            assert flat[other] == preset[other]


def test_a_router_over_a_preset_s_keeps_what_it_can_have():
    config = resolve({"preset": "hmoe_topp", "router": "topk"}, **RUN)
    flat = config.flat()
    assert config.router == "topk" and flat["top_k"] == 2
    assert flat["expert_sizes"] == "arithmetic" and flat["penalty_weight"] == 0.1  # of every router
    assert flat["renormalize"] == "always" and flat["entropy_weight"] == 0.03  # of both
    assert "top_p" not in flat
    assert resolve({"preset": "evomoe_table", "router": "base"}, **RUN).schedule.spawn_update == 0
    with pytest.raises(ConfigError, match="--moe-top-p 0.6 has no effect with --moe-router topk"):
        resolve({"preset": "hmoe_topp", "router": "topk", "top_p": 0.6}, **RUN)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_works_like_a_name(tmp_path):
    options = "options:\n  router: topk\n  top_k: 3\n  moe_experts: 24\n  spawn_update: 25%\n"
    path = write(tmp_path / "mine.yaml", "name: Mine\n" + options)
    flat = resolve({"preset": path, "top_k": 4}, **RUN).flat()
    assert (flat["preset"], flat["router"], flat["experts"]) == (path, "topk", 24)
    assert (flat["top_k"], flat["spawn_update"]) == (4, 250)


def test_a_single_stage_of_a_file_is_no_number_in_base_60(tmp_path):
    """As YAML 1.1 reads it: 400:4 would be update 24004, and 1:2.5 a number, too."""
    text = "name: Mine\noptions:\n  spawn_update: 400:4\n"
    config = resolve({"preset": write(tmp_path / "mine.yaml", text)}, **RUN)
    assert [tuple(stage) for stage in config.stages] == [(400, 4)] and config.experts == 4
    text = (
        "name: x\noptions: {a: 1:2.5, b: 1_000, c: 0x10, d: 2.5, e: true, f: null, g: 1e-3, h: .inf, i: -3}\n"
    )
    options = load(write(tmp_path / "mine.yaml", text)).options
    assert options.pop("a") == "1:2.5"
    assert options == {name: value for name, value in yaml.safe_load(text)["options"].items() if name != "a"}


def test_a_name_of_the_package_comes_first(tmp_path, monkeypatch):
    write(tmp_path / "switch", "name: Mine\noptions:\n  router: topk\n")
    monkeypatch.chdir(tmp_path)
    assert resolve({"preset": "switch"}, **RUN).router == "switch"
    assert resolve({"preset": "./switch"}, **RUN).router == "topk"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "cannot be read"),
        ("- a\n- b\n", "cannot be read"),
        ("name: [\n", "cannot be read"),
        ("options: {}\n", "name"),
        ("name: x\ncolour: red\n", "colour"),
        ("name: [x]\n", "name must be text"),
        ("name: x\nnot_for: [lm]\n", "not_for must be names with reasons"),
        ("name: x\nnot_for: {lm: [a]}\n", "not_for must be names with reasons"),
        ("name: x\nid: y\n", "id"),
        ("name: x\noptions: [1]\n", "options must be names with values"),
        ("name: x\noptions:\n  1: 2\n", "options must be names with values"),
        ("name: x\noptions:\n", "options must be names with values"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_preset(text, words, tmp_path):
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(ConfigError) as raised:
        resolve({"preset": path}, **RUN)
    assert raised.value.option == "preset" and words in str(raised.value)
    assert str(raised.value).startswith(f"--moe-preset {path}") and "\n" not in str(raised.value)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"PK\x03\x04\xff\xfe\x80")
    with pytest.raises(OptionError, match="`preset` .*checkpoint.pt cannot be read"):
        load(str(path))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "mine.yaml", "name: Mine\n")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(OptionError, match="`preset` .*mine.yaml cannot be read: .*Permission denied"):
        load(path)


def test_words_of_a_file_are_as_they_are_written(tmp_path):
    """Not numbers and dates, of which the paper's last zero would be lost."""
    text = "name: 12\npaper: 2112.14390\ndiffers: 2024-01-02\nnot_for: {lm: no}\n"
    preset = load(write(tmp_path / "mine.yaml", text))
    assert (preset.name, preset.paper, preset.differs) == ("12", "2112.14390", "2024-01-02")
    assert preset.not_for == {"lm": "no"}


@pytest.mark.parametrize(
    "options, option, words",
    [
        ({"colour": "red"}, "preset", "--moe-preset has colour, which is no option"),
        ({"preset": "switch"}, "preset", "has preset, which is no option"),
        ({"router": "many"}, "router", "--moe-router must be one of"),
        ({"top_k": 2}, "top_k", "--moe-top-k 2 has no effect with --moe-router dts"),
        ({"threshold": "nan"}, "threshold", "--moe-threshold must be a finite number"),
        ({"spawn_update": [1, 2]}, "spawn_update", "--moe-spawn-update must be"),
        ({"shared_expert": "perhaps"}, "shared_expert", "true or false"),
    ],
    ids=str,
)
def test_a_file_with_options_that_cannot_be(options, option, words, tmp_path):
    path = write(tmp_path / "mine.yaml", yaml.safe_dump({"name": "Mine", "options": options}))
    with pytest.raises(ConfigError) as raised:
        resolve({"preset": path}, **RUN)
    assert raised.value.option == option and words in str(raised.value)


def test_a_mistake_in_a_file_is_told_with_another_router_too(tmp_path):
    path = write(tmp_path / "mine.yaml", "name: Mine\noptions:\n  colour: red\n")
    with pytest.raises(ConfigError, match="has colour, which is no option"):
        resolve({"preset": path, "router": "switch"}, **RUN)


def test_null_in_a_file_is_not_given(tmp_path):
    path = write(tmp_path / "mine.yaml", "name: Mine\noptions:\n  experts: null\n  top_k: null\n")
    assert resolve({"preset": path}, **RUN).flat() == {**resolve({}, **RUN).flat(), "preset": path}


def test_a_folder_and_an_unknown_name_are_refused(tmp_path):
    for name in (str(tmp_path), "transformer", ""):
        with pytest.raises(OptionError, match="is no file and none of the presets base, .*: give one"):
            load(name)


def test_a_checkpoint_of_a_preset_file_needs_the_file_no_more(tmp_path):
    """What was decided is in the checkpoint, which may be used elsewhere, or after the file has changed."""
    path = write(tmp_path / "mine.yaml", "name: Mine\noptions:\n  router: topk\n  total_ffn_dim: 8x\n")
    config = resolve({"preset": path}, **RUN)
    cfg = SimpleNamespace()
    write_back(cfg, config)
    write(tmp_path / "mine.yaml", "name: Mine\noptions:\n  router: topk\n  spawn_strength: 0.5\n  top_k: 3\n")
    assert resolve(given_options(cfg), **RUN) == config
    (tmp_path / "mine.yaml").unlink()
    assert resolve(given_options(cfg), **RUN) == config


@pytest.mark.parametrize("name", NAMES)
def test_tasks_that_it_is_not_for_have_a_reason(name):
    preset = load(name)
    assert set(preset.not_for) <= {"lm", "masked_lm", "translation"}
    assert all(preset.not_for.values())
    assert preset.dense_updates in ("", "50%")
