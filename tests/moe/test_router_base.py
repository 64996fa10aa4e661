"""The balanced assignment against scipy's exact one, and the BASE router against its formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import RoutingContext
from fairseq_evomoe.moe.assignment import _in_units, _prices, balanced_assignment
from fairseq_evomoe.moe.routers.base import BaseRouter, fill_orthogonal
from support.assignments import SCORES, best_sum, check_loads, normal


def check_optimal(score):
    """Loads even, and less than a thousandth of what there is to gain over any sharing out is missed."""
    tokens, experts = score.shape
    expert = balanced_assignment(score)
    check_loads(expert, tokens, experts)
    got = score[torch.arange(tokens), expert].sum().item()
    best, chance = best_sum(score), score.mean(1).sum().item()
    assert best - got <= 1e-3 * (best - chance) + 1e-9 * score.abs().sum().item()
    assert got - best <= 1e-9 * (1 + score.abs().sum().item())


@pytest.mark.parametrize("tokens, experts", [(256, 16), (250, 16), (5, 16), (17, 16), (60, 3)])
@pytest.mark.parametrize("kind", SCORES)
def test_the_assignment_is_balanced_and_optimal(kind, tokens, experts):
    check_optimal(SCORES[kind](tokens, experts).contiguous())


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    different=st.integers(1, 40),
    digits=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_the_assignment_is_optimal_for_any_shape(tokens, experts, scale, different, digits, seed):
    score = normal(different, experts, seed=seed)[torch.arange(tokens) % different]
    check_optimal(scale * (score * 10**digits).round())


@pytest.mark.parametrize("kind", SCORES)
def test_the_prices_leave_little_to_repair(kind):
    """The time of an assignment is in the moves of the repair: fewer than one for each expert."""
    score = _in_units(SCORES[kind](1024, 16))
    load = torch.bincount((score - _prices(score)).argmax(-1), minlength=16)
    assert (load - 64).clamp(min=0).sum() <= 16


def test_the_assignment_by_hand():
    """Tokens 0 and 1 both want expert 0, which can have one of them: token 0 has more to lose."""
    score = torch.tensor([[9.0, 1.0], [8.0, 5.0]])
    assert balanced_assignment(score).tolist() == [0, 1]
    # token 2 may go where it likes; it is the third of three tokens for two experts
    score = torch.tensor([[9.0, 1.0], [8.0, 5.0], [0.0, 1.0]])
    assert balanced_assignment(score).tolist() == [0, 0, 1]


def test_moving_along_a_chain():
    """Expert 0 has a token too many and expert 2 is free: the cheapest way is by expert 1."""
    score = torch.tensor([[1.0, 0.9, -9.0], [1.0, 0.9, -9.0], [0.0, 1.0, 0.9]])
    expert = balanced_assignment(score)
    assert sorted(expert[:2].tolist()) == [0, 1] and expert[2] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "max"])
def test_scores_that_are_not_finite_do_not_keep_it(dtype, bad):
    score = normal(50, 4).to(dtype)
    bad = torch.finfo(dtype).max if bad == "max" else bad
    score[::3, 1] = bad
    check_loads(balanced_assignment(score), 50, 4)
    score[:] = bad
    check_loads(balanced_assignment(score), 50, 4)


def test_the_same_scores_are_assigned_in_the_same_way_whatever_the_random_state():
    score = torch.zeros(100, 8)
    torch.manual_seed(1)
    first = balanced_assignment(score)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(balanced_assignment(score), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def make(dim, experts, **options):
    router = BaseRouter(dim, experts, **options)
    router.initialize(torch.Generator().manual_seed(0))
    return router


def sigmoid(s):
    return 1 / (1 + math.exp(-s))


@pytest.mark.parametrize("training", [True, False])
def test_routing_matches_the_formulas(training):
    x, router = normal(40, 6), make(6, 5).double().train(training)
    routing = router(x, RoutingContext())
    centroids = router.centroid_ED.tolist()
    scores = [[sum(a * b for a, b in zip(x_t, c_e)) for c_e in centroids] for x_t in x.tolist()]
    expert = routing.expert_N.tolist()
    if training:
        assert routing.load_E().tolist() == [8] * 5
        total = sum(row[e] for row, e in zip(scores, expert))
        assert total == pytest.approx(best_sum(torch.tensor(scores, dtype=torch.float64)), abs=1e-10)
    else:
        assert expert == [max(range(5), key=row.__getitem__) for row in scores]
    expected = [sigmoid(row[e]) for row, e in zip(scores, expert)]
    assert routing.weight_N.tolist() == pytest.approx(expected, abs=1e-10)
    assert routing.token_N.tolist() == list(range(40))
    assert routing.losses == {} and routing.probability_TE is None
    probability = torch.tensor(scores, dtype=torch.float64).softmax(-1)
    entropy = -(probability * probability.log()).sum()
    assert routing.gate_entropy.item() == pytest.approx(entropy.item(), abs=1e-10)


def test_gradients():
    router = make(4, 3).double().train()
    x = normal(7, 4).requires_grad_()
    centroid = router.centroid_ED.detach().clone().requires_grad_()

    def weights(x, centroid):
        del router._parameters["centroid_ED"]
        router._parameters["centroid_ED"] = centroid
        return router(x, RoutingContext()).weight_N

    assert torch.autograd.gradcheck(weights, (x, centroid))
    weights(x, centroid).sum().backward()
    assert (centroid.grad != 0).all()


@pytest.mark.parametrize("experts, dim", [(4, 10), (10, 4), (5, 5), (1, 3)])
def test_centroids_are_orthogonal_and_depend_on_the_generator_alone(experts, dim):
    torch.manual_seed(experts)
    c = make(dim, experts).centroid_ED.double()
    product = c @ c.t() if experts <= dim else c.t() @ c
    assert torch.allclose(product, 0.01 * torch.eye(min(experts, dim), dtype=torch.float64), atol=1e-8)
    assert torch.equal(c.float(), make(dim, experts).centroid_ED)
    other = torch.empty(experts, dim)
    fill_orthogonal(other, 0.1, torch.Generator().manual_seed(1))
    assert not torch.equal(c.float(), other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_is_computed_in_float32(dtype):
    x, router = normal(64, 32).to(dtype), make(32, 8).to(dtype).eval()
    routing = router(x, RoutingContext())
    score = x.double() @ router.centroid_ED.double().t()
    assert routing.weight_N.dtype == torch.float32
    assert torch.allclose(routing.weight_N.double(), score.max(-1)[0].sigmoid(), atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router.train()(x, RoutingContext())
    assert inside.weight_N.dtype == torch.float32
    assert inside.load_E().tolist() == [8] * 8


def test_a_gate_that_is_not_finite_shows_in_its_entropy():
    routing = make(4, 3).train()(torch.full((6, 4), float("nan")), RoutingContext())
    assert routing.load_E().tolist() == [2] * 3
    assert not torch.isfinite(routing.gate_entropy)


@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(0, 30), experts=st.integers(1, 9), training=st.booleans(), same=st.booleans())
def test_every_token_is_routed(tokens, experts, training, same):
    x = (torch.zeros(tokens, 3) if same else normal(tokens, 3).float()).requires_grad_()
    router = make(3, experts).train(training)
    routing = router(x, RoutingContext())
    assert routing.token_N.tolist() == list(range(tokens))
    assert (routing.weight_N > 0).all() and (routing.weight_N < 1).all()
    if training:
        check_loads(routing.expert_N, tokens, experts)
    routing.weight_N.sum().backward()
    assert torch.isfinite(router.centroid_ED.grad).all()
