"""What a schedule of spawns costs, against a loop over all updates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_evomoe.evolution import budget
from fairseq_evomoe.evolution.budget import Stage, Step


def one_by_one(spawns, updates, soft_updates, restarts):
    """Experts, and whether the gate is soft, at each update."""
    for update in range(updates):
        start, experts = max([(0, 1), *[spawn for spawn in spawns if spawn[0] <= update]])
        origin = start if restarts or experts == 1 else spawns[0][0]
        yield experts, experts > 1 and update - origin < soft_updates


def step_of(stage):
    """Figures that no other stage has."""
    return Step(stage.experts + 0.5 * stage.soft, 10.0 * stage.experts, stage.experts - 1.0)


@given(
    spawns=st.lists(st.integers(0, 40), unique=True, max_size=4).map(sorted),
    updates=st.integers(1, 30),
    soft=st.one_of(st.integers(0, 12), st.just(float("inf"))),
    restarts=st.booleans(),
)
def test_stages_are_what_each_update_has(spawns, updates, soft, restarts):
    spawns = [(update, 4 ** (n + 1)) for n, update in enumerate(spawns)]
    stages = budget.stages(spawns, updates, soft, restarts)
    expected = list(one_by_one(spawns, updates, soft, restarts))
    assert [(s.experts, s.soft) for s in stages for _ in range(s.updates)] == expected
    assert all(stage.updates > 0 for stage in stages)

    cost = budget.cost(stages, step_of)
    steps = [step_of(Stage(1, experts, is_soft)) for experts, is_soft in expected]
    assert cost.seconds == pytest.approx(sum(s.seconds for s in steps))
    assert cost.memory_seconds == pytest.approx(sum(s.seconds * s.memory for s in steps))
    assert cost.peak_memory == max(s.memory for s in steps)
    assert cost.sent == pytest.approx(sum(s.sent for s in steps))


def test_a_spawn_after_the_end_never_comes():
    assert budget.stages([(50, 4)], 20) == [Stage(20, 1)]
