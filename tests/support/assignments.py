"""Scores of tokens for experts, and what an assignment of them must be."""

import pytest
import torch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best_sum(score):
    """The highest sum of scores with floor or ceil of T / E tokens for each expert, by scipy."""
    numpy = pytest.importorskip("numpy")
    optimize = pytest.importorskip("scipy.optimize")
    tokens, experts = score.shape
    low, high = tokens // experts, -(-tokens // experts)
    places = numpy.repeat(score.numpy(), high, axis=1)
    # every expert's first places come before all others
    must = numpy.tile(numpy.arange(high) < low, experts)
    prize = must * 4 * tokens * (score.abs().max().item() + 1) * (low < high)
    return places[optimize.linear_sum_assignment(-(places + prize))].sum()


def check_loads(expert, tokens, experts):
    assert expert.shape == (tokens,) and expert.dtype == torch.int64
    load = torch.bincount(expert, minlength=experts)
    assert load.shape == (experts,)
    assert load.min() >= tokens // experts and load.max() <= -(-tokens // experts)


SCORES = {
    "random": lambda t, e: normal(t, e),
    "small": lambda t, e: 1e-3 * normal(t, e),
    "large": lambda t, e: 1e3 * normal(t, e),
    "one expert is the best for all": lambda t, e: normal(t, e) + 10.0 * (torch.arange(e) == 0),
    "experts in one order for all": lambda t, e: 0.1 * normal(t, e) + torch.arange(e),
    "few different tokens": lambda t, e: normal(7, e)[torch.arange(t) % 7],
    "nearly the same tokens": lambda t, e: normal(1, e) + 1e-4 * normal(t, e),
    "ties": lambda t, e: normal(t, e).round(),
    "identical tokens": lambda t, e: normal(1, e).expand(t, e),
    "all 0": lambda t, e: torch.zeros(t, e, dtype=torch.float64),
    "low rank": lambda t, e: normal(t, 2) @ normal(2, e, seed=1),
    "heavy tails": lambda t, e: normal(t, e) ** 5,
    "tokens of all sizes": lambda t, e: normal(t, e) * (3 * normal(t, 1, seed=1)).exp(),
}
