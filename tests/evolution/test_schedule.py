"""Phase and temperature as functions of the update."""

import math

import pytest

from fairseq_evomoe.evolution.schedule import Phase, Schedule, TemperatureSchedule


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("linear", [2.0, 2.0, 1.25, 0.5, 0.5]),
        ("exponential", [2.0, 2.0, 1.0, 0.5, 0.5]),
        ("constant", [2.0] * 5),
    ],
)
def test_temperature(kind, expected):
    schedule = Schedule(100, 2.0, 0.5, TemperatureSchedule(kind), 1000)
    got = [schedule.temperature(n) for n in (0, 100, 600, 1100, 5000)]
    assert got == pytest.approx(expected)


def test_temperature_after_training_is_the_last_one():
    assert Schedule(anneal_updates=10).temperature(None) == 0.5
    assert Schedule(kind=TemperatureSchedule.constant).temperature(None) == 2.0


def test_an_anneal_of_no_length_is_over_at_once():
    assert Schedule(anneal_updates=0).temperature(0) == 0.5


def test_published_setting():
    """2.0 -> 0.5 over 5000 updates, hard from 6000."""
    schedule = Schedule()
    assert schedule.hard_after == 6000
    assert schedule.phase(5999, stage=1) == Phase.SOFT
    assert schedule.phase(6000, stage=1) == Phase.HARD


@pytest.mark.parametrize("hard, phases", [(None, "SSHHH"), (0, "HHHHH"), (-1, "SSSSS"), (1000, "SSSSH")])
def test_phases_after_the_spawn(hard, phases):
    schedule = Schedule(spawn_update=50, anneal_updates=100, hard_update=hard)
    got = [schedule.phase(n, stage=1) for n in (50, 169, 170, 1049, 1050)]
    assert [p.name[0] for p in got] == list(phases)


def test_one_expert_is_the_diversify_phase():
    assert Schedule(spawn_update=10).phase(100, stage=0) == Phase.DIVERSIFY


def test_a_grown_checkpoint_with_its_counter_reset_waits_for_the_anneal():
    schedule = Schedule(spawn_update=100, anneal_updates=50)
    assert schedule.phase(0, stage=1) == Phase.SOFT
    assert schedule.temperature(0) == schedule.temperature(100) == 2.0


@pytest.mark.parametrize("hard_update, last", [(None, Phase.HARD), (30, Phase.HARD), (-1, Phase.SOFT)])
@pytest.mark.parametrize("kind", ["linear", "exponential", "constant"])
def test_experts_that_have_spawned_in_another_run_are_in_the_last_stage(kind, hard_update, last):
    schedule = Schedule(-math.inf, 2.0, 0.5, TemperatureSchedule(kind), 20, hard_update)
    for update in (0, 1, 10**6, None):
        assert schedule.phase(update, stage=1) == last
        assert schedule.temperature(update) == (2.0 if kind == "constant" else 0.5)
