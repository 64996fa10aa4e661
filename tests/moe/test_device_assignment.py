"""The balanced assignment on a GPU, without one: balanced, nearly the best, and asking for no value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import RoutingContext
from fairseq_evomoe.moe.device_assignment import nearly_best_assignment
from fairseq_evomoe.moe.routers import base
from support.assignments import SCORES, best_sum, check_loads, normal
from support.router_checks import make

ALIKE = ("few different tokens", "ties")
"""Where many assignments are nearly as good."""


@pytest.mark.parametrize("tokens, experts", [(256, 16), (250, 16), (512, 8)])
@pytest.mark.parametrize("kind", sorted(set(SCORES) - {"identical tokens", "all 0"}))
def test_it_is_balanced_and_nearly_the_best(kind, tokens, experts):
    score = SCORES[kind](tokens, experts).contiguous()
    expert = nearly_best_assignment(score)
    check_loads(expert, tokens, experts)
    got = score[torch.arange(tokens), expert].sum().item()
    best, chance = best_sum(score), score.mean(1).sum().item()
    assert best - got <= (0.05 if kind in ALIKE else 0.01) * (best - chance)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    different=st.integers(1, 40),
    digits=st.integers(0, 3),
    bad=st.sampled_from([0.0, float("nan"), float("inf"), -1e38]),
    seed=st.integers(0, 1000),
)
def test_it_is_balanced_whatever_the_scores(tokens, experts, different, digits, bad, seed):
    score = (normal(different, experts, seed=seed)[torch.arange(tokens) % different] * 10**digits).round()
    score[::3, :1] = bad
    if tokens:
        check_loads(nearly_best_assignment(score), tokens, experts)
    assert nearly_best_assignment(score).shape == (tokens,)


@pytest.mark.skipif(not hasattr(torch, "compiler"), reason="PyTorch before 2.1 knows too few on meta")
def test_it_needs_no_value():
    """Tensors of the device ``meta`` have none."""
    assert nearly_best_assignment(torch.empty(50, 4, device="meta")).shape == (50,)


def test_the_router_takes_it(monkeypatch):
    router, x = make("base", 6, 4).train(), torch.randn(40, 6)
    measured = router(x, RoutingContext())
    monkeypatch.setattr(base, "on_device", True)
    monkeypatch.setattr(base, "balanced_assignment", None)
    routing = router(x, RoutingContext())
    assert routing.load_E().tolist() == [10] * 4
    assert routing.weight_N.sum() >= 0.98 * measured.weight_N.sum()
