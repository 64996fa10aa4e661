"""What --moe-spawn-update says of stages, and how many children experts have."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.evolution.schedule import Phase
from fairseq_evomoe.evolution.selection import allot

RUN = {"max_update": 1000, "ffn_dims": [64]}


def config(spawn_update, **options):
    return resolve({"router": "switch", "spawn_update": spawn_update, **options}, **RUN)


@pytest.mark.parametrize(
    "value, experts, written, spawns",
    [
        ("5%:4,15%:16,40%:64", None, "50:4,150:16,400:64", (50, 150, 400)),
        ("5%:25%, 20%:100%", 16, "50:4,200:16", (50, 200)),
        ("5%:25%,20%:100%", 4, "50:2,200:4", (50, 200)),
        ("0:2,100:8", None, "0:2,100:8", (0, 100)),
        ("10%:4", None, "100:4", (100,)),
        ("auto:4,auto:16", None, "auto:4,auto:16", (250, 500)),
        ("auto", 4, "auto", (500,)),
        (70, 4, 70, (70,)),
    ],
)
def test_stages_in_updates_and_experts(value, experts, written, spawns):
    given_experts = {} if experts is None else {"experts": experts}
    found = config(value, **given_experts)
    assert found.schedule.spawn_update == written and found.latest_spawns == spawns
    assert found.make_schedule().spawn_updates == spawns
    assert found.experts == found.stages[-1].experts == (experts or int(value.split(":")[-1]))
    again = resolve(found.flat(), **RUN)
    assert again.flat() == found.flat()


REFUSED = {
    "3:": "must be one moment, or moments with numbers of experts, such as 5%:4,15%:16",
    "3:x,5:8": "must be one moment",
    "x:2,5:8": "must be one moment",
    "3:4,8": "must be one moment",
    "50:8,100:4": "50:8, 100:4 must have more experts in each stage, and at least 2 in the first: raise them",
    "50:1,100:4": "must have more experts in each stage",
    "100:2,100:4": "must have a later update in each stage: raise them",
    "auto:2,100:4": "counts updates in some stages and waits for a plateau in others: give auto for all",
    "50:4,100:6": "makes 6 experts of 4, which cannot all have as many children: give a multiple, or",
    "120%:2,130%:4": "more than the whole run",
}


@pytest.mark.parametrize("value", REFUSED)
def test_stages_that_contradict_themselves_are_refused_in_a_sentence(value):
    with pytest.raises(ConfigError) as error:
        config(value)
    (one,) = error.value.errors
    assert one.option == "spawn_update" and REFUSED[value] in str(one)
    assert str(error.value).startswith("--moe-spawn-update ") and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "options, option, text",
    [
        ({"experts": 16}, "spawn_update", "ends with 8 experts, but --moe-experts is 16: leave that out"),
        (
            {"spawn_method": "split"},
            "spawn_method",
            "split makes experts and a gate of the base expert alone",
        ),
        ({"expert_sizes": "hybrid"}, "expert_sizes", "Children are as wide as their parents"),
        ({"router": "comet", "spawn_select": "load"}, "spawn_select", "decides by itself which expert"),
        ({"router": "topk", "top_k": 4}, "top_k", "must be from 1 to the 2 experts, but is 4"),
        (
            {"router": "stable", "stable_update": 20},
            "stable_update",
            "before --moe-spawn-update (50:2,100:8)",
        ),
    ],
)
def test_what_stages_do_not_go_with(options, option, text):
    with pytest.raises(ConfigError) as error:
        config("50:2,100:8", **options)
    assert error.value.option == option and text in str(error.value)


def test_a_number_that_is_no_multiple_needs_a_selection():
    assert config("50:4,100:6", spawn_select="load").stages[-1].experts == 6
    assert config("50:4,100:6", router="dynmoe").stages[-1].experts == 6  # whose experts come and go


def test_stable_freezes_after_the_last_stage():
    found = config("5%:2,40%:8", router="stable")
    assert found.router_options.stable_update == 460
    schedule = found.make_schedule()
    assert schedule.phase(459, 2) == Phase.SOFT and schedule.phase(460, 2) == Phase.HARD
    by_itself = config("auto:2,auto:8", router="stable").make_schedule([100, 200])
    assert by_itself.phase(279, 2) == Phase.SOFT and by_itself.phase(280, 2) == Phase.HARD


def test_narrow_experts_have_one_width_in_all_stages():
    found = config("5%:4,40%:16", total_ffn_dim="2x")
    assert found.first_widths(64) == [8] * 4 and found.spawning.spawn_method == "slice"


def test_a_schedule_of_stages_is_a_function_of_update_and_stage():
    options = {"router": "dts", "anneal_updates": 100, "hard_update": 120}
    restart = config("50:2,100:4,400:8", **options).make_schedule()
    go_on = config("50:2,100:4,400:8", stage_temperature="continue", **options).make_schedule()
    for update, stage, temperatures, phases in (
        (20, 0, (2.0, 2.0), "DD"),
        (100, 1, (1.25, 1.25), "SS"),  # saved before the spawn
        (100, 2, (2.0, 1.25), "SS"),
        (180, 2, (0.8, 0.5), "SH"),
        (390, 2, (0.5, 0.5), "HH"),
        (450, 3, (1.25, 0.5), "SH"),
        (None, 3, (0.5, 0.5), "HH"),
    ):
        for schedule, temperature, phase in zip((restart, go_on), temperatures, phases):
            assert schedule.temperature(update, stage) == pytest.approx(temperature)
            assert schedule.phase(update, stage).name[0] == phase
    assert [restart.next_spawn(stage) for stage in range(4)] == [50, 100, 400, float("inf")]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 12))
def test_children_are_as_many_as_wanted_and_the_greatest_demand_is_least(demand, more):
    experts = len(demand)
    counts = allot(experts, experts + more, torch.tensor(demand))
    assert sum(counts) == experts + more and min(counts) >= 1
    if any(demand):
        worst = max(d / c for d, c in zip(demand, counts))
        # no expert could do with one child less without having a greater one
        assert all(c == 1 or d / (c - 1) >= worst for d, c in zip(demand, counts))


def test_without_a_demand_they_are_even():
    assert allot(3, 12) == [4, 4, 4] and allot(3, 7) == [3, 2, 2]
    assert allot(2, 4, torch.zeros(2)) == [2, 2]
    assert allot(3, 6, torch.tensor([7.0, 1.0, 0.0])) == [4, 1, 1]
    with pytest.raises(ValueError, match="3 experts cannot have 2 children"):
        allot(3, 2)
