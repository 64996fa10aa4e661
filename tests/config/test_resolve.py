"""Flat options become one typed configuration, or all that is wrong with them is told at once."""

import logging
import math
from types import SimpleNamespace

import pytest

from fairseq_evomoe.config.config import GROUPS, MoEConfig, declarations, owner, routers_with
from fairseq_evomoe.config.errors import ConfigError, as_flags
from fairseq_evomoe.config.presets import names
from fairseq_evomoe.config.resolve import (
    former_defaults,
    given_options,
    resolve,
    warn_of_idle_options,
    write_back,
)
from fairseq_evomoe.config.rules import gate_that_learns_nothing, rank_contradictions
from fairseq_evomoe.evolution.schedule import TemperatureSchedule
from fairseq_evomoe.evolution.spawn import SpawnMethod
from fairseq_evomoe.moe.routers import ROUTERS

RUN = {"max_update": 1000, "ffn_dims": [64]}
CLASSES = [("soft" if name == "low_rank" else "dts", group) for name, group in GROUPS.items()] + [
    (r, cls.Options) for r, cls in ROUTERS.items()
]
DECLARED = [
    pytest.param(router, declaration, id=f"{router}-{declaration.name}")
    for router, cls in CLASSES
    for declaration in cls.declared().values()
]


def refusals(given, **about):
    """What ``resolve`` refuses: the options that the errors are about, and what is printed."""
    with pytest.raises(ConfigError) as raised:
        resolve(given, **{**RUN, **about})
    error = raised.value
    lines = str(error).splitlines()
    assert len(lines) == len(error.errors) and error.option == error.errors[0].option
    assert all(line.endswith(".") and "`" not in line for line in lines), lines
    return [each.option for each in error.errors], str(error)


def flag(name):
    return "--moe-" + name.replace("_", "-")


# what is given is used, and only that


@pytest.mark.parametrize("router, declaration", DECLARED)
def test_every_option_is_refused_with_its_flag(router, declaration):
    name = declaration.name
    wrong = [math.nan, math.inf, "-inf", "many", -7.5] if declaration.type in (int, float) else ["many", 7]
    if declaration.type is str:
        wrong = ["many", "nan,1", "-1", "1e400"]
    for value in wrong:
        options, text = refusals({"router": router, name: value})
        assert options == [name]
        assert flag(name) in text and str(value) in text


@pytest.mark.parametrize("router, declaration", DECLARED)
def test_every_option_arrives_where_it_belongs(router, declaration):
    name = declaration.name
    companions = {
        "spawn_strength": {"spawn_method": "noise"},
        "stable_update": {"spawn_update": 3},
        "hashes": {"experts": 16},
        "temperature_end": {"temperature_start": 9.0},
        "random_second": {"top_k": 2, "renormalize": "always"},
        "balance_rate": {"balance": "bias"},
        "free_balance": {"zero_experts": 1},
        "teacher": {"meta_updates": 1, "module_updates": 1},
    }
    if declaration.choices:
        values = declaration.choices
    elif declaration.type is bool:
        values = (True, False)
    else:
        values = {
            "temperature_end": (0.25,),
            "total_ffn_dim": ("8x", "512"),
            "expert_sizes": ("arithmetic", "hybrid"),
            "spawn_update": (7, "auto"),
            "max_experts": (0, 32),
            "l1_factor": (1.5,),
            "mean_experts": (1.5,),
            "strata": ("8,8", "4,2,10"),
            "freeze": ("router", "router,backbone"),
            "teacher": ("dense.pt",),
        }.get(name, (0.5,) if declaration.type is float else (4,))
    for value in values:
        given = {"router": router, **companions.get(name, {}), name: value}
        config = resolve(given, **RUN)
        assert config.flat()[name] == value
        group = config.router_options if owner(name) is None else getattr(config, owner(name))
        found = getattr(group, name)
        assert getattr(found, "value", found) == value and type(config) is MoEConfig


def test_none_is_not_given():
    assert resolve(dict.fromkeys((*declarations(), "router", "preset"))) == resolve({})


def test_an_option_that_there_is_not_is_refused():
    options, text = refusals({"colour": "red"})
    assert options == ["colour"] and "--moe-colour is no option" in text


def test_a_configuration_is_frozen():
    config = resolve({})
    with pytest.raises(AttributeError):
        config.router = "switch"
    with pytest.raises(AttributeError):
        config.layer.experts = 3


# nothing given: EvoMoE as published


def test_nothing_given_is_evomoe_as_published():
    config = resolve({}, **RUN)
    flat = config.flat()
    published = {
        "router": "dts",
        "experts": 16,
        "freq": 2,
        "gate_input": "hidden",
        "gate_noise": "always",
        "gate_weight": "softmax",
        "renormalize": "never",
        "threshold": 0.001,
        "eval_routing": "top1",
        "balance_form": "published",
        "balance_weight": 0.0,
        "entropy_weight": 0.0,
        "z_weight": 0.0,
        "temperature_start": 2.0,
        "temperature_end": 0.5,
        "temperature_schedule": "linear",
        "anneal_updates": 5000,
        "hard_update": 6000,
        "hard_experts": 1,
        "spawn_update": 100,
        "spawn_method": "mask",
        "expert_activation": "model",
        "shared_expert": False,
    }
    assert {name: flat[name] for name in published} == published
    assert not any(config.loss_weights().values())
    schedule = config.make_schedule()
    assert (schedule.spawn_update, schedule.hard_after) == (100, 6000)
    assert schedule.temperature(100) == 2.0 and schedule.temperature(2600) == 1.25
    assert config.make_plateau() is None


def test_without_an_end_the_plateau_decides():
    config = resolve({})
    assert config.spawns_by_itself and config.latest_spawn == math.inf
    assert config.make_plateau().window == config.plateau.spawn_window == 500
    config = resolve({"spawn_update": "auto"}, max_update=4000)
    assert config.latest_spawn == 2000 and config.plateau.spawn_window == 100
    assert resolve({"spawn_update": "auto"}, max_update=100).plateau.spawn_window == 10


def test_one_expert_never_spawns():
    assert resolve({"experts": 1}, **RUN).schedule.spawn_update == 0
    assert resolve({"experts": 1}).make_plateau() is None


@pytest.mark.parametrize("max_update, spawn", [(1000, 100), (14, 1), (10, 1), (2, 1), (1, 0)])
def test_the_spawn_is_after_a_tenth_of_the_run_and_never_at_its_end(max_update, spawn):
    assert resolve({}, max_update=max_update).schedule.spawn_update == spawn


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "dts"])
def test_rivals_have_their_experts_from_the_start(router):
    config = resolve({"router": router}, **RUN)
    assert config.schedule.spawn_update == 0
    decided = {"stable": {"stable_update": 100}, "stratified": {"strata": "8,8"}}.get(router, {})
    assert config.router_options == ROUTERS[router].Options(**decided)


def test_the_model_s_own_number_of_experts_is_a_default():
    assert resolve({}, experts=4).experts == 4
    assert resolve({"experts": 8}, experts=4).experts == 8


# what is not given and depends on others


@pytest.mark.parametrize(
    "given, ffn_dims, method",
    [
        ({}, [64], "mask"),
        ({}, [], "mask"),
        ({"expert_sizes": "arithmetic"}, [64], "slice"),
        ({"expert_sizes": "arithmetic"}, [], "slice"),
        ({"expert_sizes": "1,1,1,1", "experts": 4}, [64], "mask"),
        ({"total_ffn_dim": "16x"}, [64], "mask"),
        ({"total_ffn_dim": 16 * 64}, [64], "mask"),
        ({"total_ffn_dim": "8x"}, [64], "slice"),
        ({"total_ffn_dim": 16 * 64}, [64, 32], "slice"),
        ({"expert_sizes": "arithmetic", "spawn_method": "reinit", "total_ffn_dim": "4x"}, [64], "reinit"),
        ({"spawn_method": "split"}, [64], "split"),
    ],
    ids=str,
)
def test_experts_as_wide_as_the_base_are_masked_and_others_sliced(given, ffn_dims, method):
    config = resolve(given, max_update=1000, ffn_dims=ffn_dims)
    assert config.spawning.spawn_method == SpawnMethod(method)
    assert config.make_spawn(3, config.widths(64)).method == SpawnMethod(method)


@pytest.mark.parametrize(
    "given, hard",
    [({}, 6000), ({"anneal_updates": 10}, 12), ({"anneal_updates": "50%"}, 600), ({"anneal_updates": 0}, 0)],
    ids=str,
)
def test_the_hard_update_is_a_fifth_after_the_anneal(given, hard):
    assert resolve(given, **RUN).schedule.hard_update == hard
    assert resolve({**given, "hard_update": -1}, **RUN).schedule.hard_update == -1


def test_stable_freezes_a_tenth_of_the_run_after_the_spawn():
    stable = {"router": "stable"}
    assert resolve(stable, **RUN).router_options.stable_update == 100
    assert resolve({**stable, "spawn_update": 500}, **RUN).router_options.stable_update == 550
    config = resolve({**stable, "spawn_update": "auto"}, **RUN)  # counted from the spawn, when it was
    assert config.router_options.stable_update is None
    assert config.make_schedule([200]).hard_after == 80


# durations


@pytest.mark.parametrize(
    "name, router, others",
    [
        ("spawn_update", "dts", {}),
        ("anneal_updates", "dts", {}),
        ("hard_update", "dts", {}),
        ("spawn_window", "dts", {"spawn_update": "auto"}),
        ("stable_update", "stable", {}),
        ("dynmoe_window", "dynmoe", {}),
    ],
)
def test_durations_may_be_percentages(name, router, others):
    assert all(declaration.duration for declaration in declarations()[name])
    given = {"router": router, **others}
    for text, updates in (
        ("10%", 100),
        ("12.34%", 123),
        (" 5 % ", 50),
        (".1%", 1),
        ("0.01%", 1),
        ("100%", 1000),
    ):
        assert resolve({**given, name: text}, **RUN).flat()[name] == updates
    for text, words in (
        ("101%", "more than the whole run: give at most 100%"),
        ("-1%", "a percentage of all updates, such as 10%"),
        ("ten%", "a percentage of all updates"),
        ("%", "a percentage of all updates"),
        ("nan%", "a percentage of all updates"),
    ):
        options, printed = refusals({**given, name: text})
        assert options == [name] and words in printed and flag(name) in printed
    options, printed = refusals({**given, name: "10%"}, max_update=0)
    assert options[0] == name and "--max-update, which is not given" in printed


def test_only_durations_may_be_percentages():
    counts = {name for name, declared in declarations().items() if any(d.duration for d in declared)}
    assert counts == {
        "spawn_update", "anneal_updates", "hard_update", "spawn_window", "stable_update", "dynmoe_window",
        "leaf_search", "gate_warmup", "meta_updates", "module_updates",
    }  # fmt: skip
    options, text = refusals({"experts": "10%"})
    assert options == ["experts"] and "a whole number" in text
    options, text = refusals({"threshold": "10%"})
    assert options == ["threshold"] and "a finite number" in text


def test_a_percentage_of_nothing_is_nothing():
    config = resolve({"spawn_update": "0%", "anneal_updates": "0%"}, **RUN)
    assert (config.schedule.spawn_update, config.schedule.anneal_updates) == (0, 0)


# contradictions

CONTRADICTIONS = [
    ({"router": "many"}, "router", ["--moe-router must be one of", "'many'"]),
    ({"preset": "many"}, "preset", ["--moe-preset many", "evomoe_context", "give one of them"]),
    ({"temperature_end": 3.0}, "temperature_end", ["--moe-temperature-start (2.0)", "dense to sparse"]),
    ({"hard_experts": 17}, "hard_experts", ["from 1 to the 16 experts", "17"]),
    ({"router": "topk", "top_k": 17}, "top_k", ["from 1 to the 16 experts"]),
    ({"router": "laplace", "top_k": 17}, "top_k", ["from 1 to the 16 experts"]),
    ({"router": "recurrent", "top_k": 17}, "top_k", ["from 1 to the 16 experts"]),
    ({"router": "comet", "top_k": 17}, "top_k", ["from 1 to the 16 experts"]),
    ({"router": "topk", "random_second": True, "top_k": 1}, "random_second", ["--moe-top-k 2"]),
    (
        {"router": "topk", "random_second": True, "renormalize": "never"},
        "random_second",
        ["--moe-renormalize always"],
    ),
    ({"router": "dynmoe", "max_experts": 3}, "max_experts", ["at least the 16 experts", "but is 3"]),
    ({"router": "hash", "hashes": 3}, "hashes", ["a divisor of the 16 experts", "3"]),
    ({"router": "hash", "hashes": 4, "hash": "balanced"}, "hashes", ["--moe-hash balanced", "must be 1"]),
    ({"router": "stable", "stable_update": 5, "spawn_update": 6}, "stable_update", ["(5) is before", "(6)"]),
    ({"router": "stable", "stable_update": 5, "spawn_update": "auto"}, "stable_update", ["may be before"]),
    ({"spawn_strength": 1.5}, "spawn_strength", ["between 0 and 1", "--moe-spawn-method mask", "1.5"]),
    ({"spawn_strength": 0.5, "spawn_method": "copy"}, "spawn_strength", ["no effect", "leave it out"]),
    ({"spawn_strength": 0.5, "spawn_method": "split"}, "spawn_strength", ["no effect", "leave it out"]),
    ({"expert_sizes": "1,2"}, "expert_sizes", ["16 numbers", "'1,2'"]),
    ({"expert_sizes": ",".join(["nan"] * 16)}, "expert_sizes", ["16 numbers greater than 0"]),
    ({"expert_sizes": "arithmetic", "total_ffn_dim": 16}, "total_ffn_dim", ["at least 128", "16"]),
    ({"total_ffn_dim": "0x"}, "total_ffn_dim", ["greater than 0", "0x"]),
    (
        {"expert_sizes": "arithmetic", "spawn_method": "mask"},
        "spawn_method",
        ["--moe-spawn-method slice", "leave out --moe-expert-sizes"],
    ),
    ({"spawn_method": "split", "experts": 5}, "spawn_method", ["64 units", "--moe-experts is 5"]),
    (
        {"router": "switch", "mutual_distillation_weight": 0.1},
        "mutual_distillation_weight",
        ["--moe-router switch gives only one"],
    ),
    (
        {"router": "soft", "mutual_distillation_weight": 0.1},
        "mutual_distillation_weight",
        ["--moe-router soft", "mixtures"],
    ),
    ({"experts": 1, "hyper_adapter": True}, "hyper_adapter", ["--moe-experts 1", "leave it out"]),
    ({"router": "soft", "hyper_adapter": True}, "hyper_adapter", ["--moe-router soft"]),
    ({"router": "dynmoe", "hyper_adapter": True}, "hyper_adapter", ["--moe-dynmoe-window 0"]),
    ({"router": "stratified", "strata": "4,4"}, "strata", ["sum to the --moe-experts (16), but is 4,4"]),
    ({"router": "stratified", "strata": "15,1"}, "top_k", ["the last of the --moe-strata", "but is 2"]),
    ({"router": "stratified", "shared_expert": True}, "shared_expert", ["several times", "leave one"]),
    (
        {"router": "switch", "spawn_update": 5, "spawn_rescale": True, "shared_expert": True},
        "spawn_rescale",
        ["--moe-shared-expert a copy of it goes on beside them", "leave one of them out"],
    ),
    (
        {"router": "topk", "spawn_update": 5, "spawn_rescale": True, "spawn_method": "split"},
        "spawn_rescale",
        ["--moe-spawn-method split divides it"],
    ),
    ({"router": "stratified", "hyper_adapter": True}, "hyper_adapter", ["--moe-router stratified"]),
    (
        {"router": "stratified", "spawn_update": "3:8,6:16", "spawn_select": "load"},
        "spawn_select",
        ["--moe-router stratified grow alike", "give one stage"],
    ),
    (
        {"router": "stratified", "spawn_update": "3:8,6:16", "strata": "8,8"},
        "strata",
        ["sum to the --moe-experts (8), but is 8,8"],
    ),
    ({"router": "stratified", "heads": 2}, "heads", ["--moe-router stratified", "leave one of them out"]),
    ({"router": "topk", "strata": "8,8"}, "strata", ["no effect with --moe-router topk", "stratified"]),
    ({"router": "stratified", "balance": "bias"}, "balance", ["no effect with --moe-router stratified"]),
    ({"router": "soft", "output_masking": 0.1}, "output_masking", ["--moe-router soft", "leave it out"]),
    ({"output_masking": 1.0}, "output_masking", ["at least 0 and less than 1"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "given, option, parts", CONTRADICTIONS, ids=lambda x: str(x) if isinstance(x, dict) else ""
)
def test_contradictions(given, option, parts):
    options, text = refusals(given)
    assert options == [option]
    assert all(part in text for part in parts), text


def test_stable_needs_an_end_or_an_update():
    options, text = refusals({"router": "stable"}, max_update=0)
    assert options == ["stable_update"] and "give --moe-stable-update" in text
    assert resolve({"router": "stable", "stable_update": 50}).router_options.stable_update == 50


@pytest.mark.parametrize(
    "given",
    [
        {"router": "hash", "hashes": 4, "mutual_distillation_weight": 0.1},
        {"router": "dynmoe", "hyper_adapter": True, "dynmoe_window": 0},
        {"router": "dynmoe", "max_experts": 16},
        {"spawn_method": "noise", "spawn_strength": 1.5},
        {"experts": 1, "expert_sizes": "arithmetic"},
        {"temperature_end": 2.0},
        {"expert_sizes": "arithmetic", "spawn_method": "mask", "spawn_update": 0},
    ],
    ids=str,
)
def test_what_looks_like_a_contradiction_and_is_none(given):
    resolve(given, **RUN)


MODEL = dict(quant_noise_pq=0.1, quant_noise_scalar=0.0, base_layers=2)


def test_all_contradictions_are_told_at_once():
    given = {
        "threshold": math.nan,
        "balance_weight": -1,
        "experts": 0,
        "anneal_updates": "200%",
        "top_k": 3,
        "spawn_method": "clone",
        "total_ffn_dim": "8x",
    }
    options, text = refusals(given, model=SimpleNamespace(**MODEL))
    assert sorted(options) == sorted(
        ["quant_noise_pq", "base_layers", *(name for name in given if name != "total_ffn_dim")]
    )
    for part in (
        "--quant-noise-pq does not work",
        "--base-layers does not work",
        "--moe-top-k 3 has no effect",
    ):
        assert part in text
    two = {"temperature_end": 3.0, "hard_experts": 17, "spawn_strength": 0.5, "spawn_method": "copy"}
    assert refusals(two)[0] == ["temperature_end", "spawn_strength", "hard_experts"]


@pytest.mark.parametrize("router", ROUTERS)
def test_options_of_other_routers_are_refused_even_at_their_default(router):
    for name in declarations():
        if owner(name) is not None or router in routers_with(name):
            continue
        other = routers_with(name)[0]
        value = getattr(ROUTERS[other].Options(), name)
        value = 5 if value is None else getattr(value, "value", value)
        if ROUTERS[other].Options.declared()[name].loss:
            resolve({"router": router, name: 0.0}, **RUN)  # that there is no such loss is true
            value = value or 0.1
        options, text = refusals({"router": router, name: value})
        assert options == [name]
        assert f"{flag(name)} {value} has no effect with --moe-router {router}: leave it out" in text
        assert all(each in text for each in routers_with(name))


def test_options_for_many_ranks_are_checked_when_there_is_a_run():
    def errors(**given):
        return [error.option for error in rank_contradictions(resolve(given, **RUN))]

    assert errors() == errors(expert_parallel=16, a2a_dtype="bf16", sharded_checkpoint=True) == []
    assert errors(expert_parallel=2, a2a_compress="lsh", lsh_hashes=3, lsh_dim=2) == []
    assert errors(expert_parallel=17) == ["expert_parallel"]
    assert errors(a2a_dtype="bf16") == errors(a2a_compress="lsh") == ["a2a_dtype"]
    assert errors(sharded_checkpoint=True) == ["sharded_checkpoint"]
    assert errors(lsh_dim=8) == ["lsh_hashes"]
    assert errors(expert_parallel=2, router="topk", mutual_distillation_weight=0.1) == [
        "mutual_distillation_weight"
    ]
    assert len(errors(sharded_checkpoint=True, a2a_dtype="fp16", lsh_dim=8)) == 3


def test_only_the_command_line_prints_flags():
    assert as_flags("`top_k` is 5 with `router` topk") == "--moe-top-k is 5 with --moe-router topk"


# what is written back says what was meant


def written(config):
    """A model's options after ``write_back``."""
    cfg = SimpleNamespace(moe_other="kept")
    write_back(cfg, config)
    assert cfg.moe_other == "kept"
    return cfg


def check_idempotent(given, **about):
    config = resolve(given, **{**RUN, **about})
    cfg = written(config)
    assert not [name for name, value in vars(cfg).items() if value == "auto" and name != "moe_spawn_update"]
    again = resolve(given_options(cfg), **{**RUN, **about})
    assert again == config and vars(written(again)) == vars(cfg)
    return cfg


@pytest.mark.parametrize("preset", names())
def test_a_resolved_preset_resolves_to_itself(preset):
    cfg = check_idempotent({"preset": preset})
    assert cfg.moe_preset == preset


@pytest.mark.parametrize("router, declaration", DECLARED)
def test_resolved_options_resolve_to_themselves(router, declaration):
    value = declaration.default
    if declaration.duration:
        value = "30%"
    elif value is None or declaration.name in ("temperature_end", "temperature_start"):
        return
    elif declaration.choices and declaration.name != "spawn_method":
        value = declaration.choices[-1]
    elif declaration.type is bool:
        value = True
    cfg = check_idempotent({"router": router, declaration.name: getattr(value, "value", value)})
    assert getattr(cfg, "moe_" + declaration.name) is not None


def test_old_auto_is_written_as_what_it_means():
    given = {"gate_input": "auto", "renormalize": "auto", "balance_form": "auto"}
    cfg = check_idempotent(given)
    assert cfg.moe_gate_input == "table" and cfg.moe_renormalize == "straight-through"
    cfg = check_idempotent(given, masked=True)
    assert (cfg.moe_gate_input, cfg.moe_entropy_weight, cfg.moe_balance_form) == (
        "hidden",
        0.03,
        "normalized",
    )


def test_a_run_that_waits_for_a_plateau_says_so():
    cfg = check_idempotent({}, max_update=0)
    assert cfg.moe_spawn_update == "auto" and cfg.moe_spawn_window == 500


def test_options_of_other_routers_stay_unknown():
    cfg = written(resolve({"router": "switch"}))
    assert cfg.moe_jitter == 0.01 and not hasattr(cfg, "moe_top_k")
    assert cfg.moe_temperature_schedule == TemperatureSchedule.linear.value


# warnings


def warnings_of(given, caplog, **about):
    config = resolve(given, **{**RUN, **about})
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_idle_options(config)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "given, where, flags",
    [
        (
            {"router": "switch", "anneal_updates": 5000, "hard_update": 6000},
            "with --moe-router switch",
            ["--moe-anneal-updates", "--moe-hard-update"],
        ),
        (
            {"spawn_window": 10, "spawn_plateau": 0.2},
            "without --moe-spawn-update auto",
            ["--moe-spawn-window"],
        ),
        (
            {"spawn_update": 0, "spawn_statistics": "all"},
            "with --moe-spawn-update 0",
            ["--moe-spawn-statistics"],
        ),
        ({"table_std": 0.5}, "with --moe-gate-input hidden", ["--moe-table-std"]),
        (
            {"router": "switch", "gate_input": "table", "jitter": 0.1},
            "with --moe-gate-input table",
            ["--moe-jitter"],
        ),
        (
            {"router": "topk", "balance": "bias", "balance_choices": "first"},
            "with --moe-balance bias",
            ["--moe-balance-choices"],
        ),
    ],
    ids=str,
)
def test_stages_that_do_not_come_are_warned_of(given, where, flags, caplog):
    (warning,) = warnings_of(given, caplog)
    assert warning.startswith(f"no effect {where}: ") and all(flag in warning for flag in flags)


@pytest.mark.parametrize("router", ROUTERS)
def test_what_was_not_given_is_not_warned_of(router, caplog):
    assert not warnings_of({"router": router}, caplog)
    assert not warnings_of({"router": router, "spawn_update": 5}, caplog)


def test_former_defaults_are_named_to_those_who_relied_on_them():
    def line(**given):
        config = resolve(given, **RUN)
        return former_defaults(config)

    assert "--moe-preset evomoe_table" in line() and "--moe-gate-input" in line()
    relied = line(gate_input="hidden", spawn_update=5)
    assert "--moe-renormalize, --moe-gate-noise;" in relied and "--moe-spawn-update" not in relied
    assert line(preset="evomoe") is None and line(router="switch") is None
    assert line(gate_input="hidden", renormalize="never", gate_noise="always", spawn_update=5) is None


@pytest.mark.parametrize(
    "given, way_out",
    [
        ({"preset": "mixtral", "top_k": 1}, "give --moe-renormalize straight-through or never"),
        ({"router": "stratified", "top_k": 1}, "--moe-renormalize"),
        ({"router": "recurrent", "top_k": 1}, "--moe-renormalize"),
        ({"router": "switch", "renormalize": "always"}, "--moe-renormalize"),
        ({"router": "dts", "renormalize": "always"}, "--moe-renormalize"),
        ({"router": "laplace", "top_k": 1}, "give --moe-top-k 2 or more"),
    ],
    ids=str,
)
def test_a_gate_that_learns_nothing_is_named(given, way_out, caplog):
    (line,) = warnings_of(given, caplog)
    assert "learns nothing from the task" in line and way_out in line


@pytest.mark.parametrize("preset", [None, *names()])
def test_every_preset_s_gate_learns(preset):
    assert gate_that_learns_nothing(resolve({"preset": preset}, **RUN, masked=True)) is None
