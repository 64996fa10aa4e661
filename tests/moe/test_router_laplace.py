"""The Laplace gate against a loop over tokens in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import RoutingContext
from support.router_checks import (
    check_precision,
    close,
    dense,
    entropy,
    gradients_are_right,
    is_deterministic,
    make,
    softmax,
)


def distance(a, b):
    return math.sqrt(sum((u - v) ** 2 for u, v in zip(a, b)))


def reference(x, w, k):
    """Weights and probabilities over all experts (T x E), one token at a time."""
    weights, probabilities = [], []
    for x_t in x.tolist():
        logits = [-distance(x_t, w_e) for w_e in w.tolist()]
        nearest = sorted(range(len(logits)), key=lambda e: -logits[e])[:k]
        among = dict(zip(nearest, softmax([logits[e] for e in nearest])))
        weights.append([among.get(e, 0.0) for e in range(len(logits))])
        probabilities.append(softmax(logits))
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(probabilities, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_the_reference(k):
    torch.manual_seed(1)
    router = make("laplace", 6, 5, top_k=k)
    router.weight.data.mul_(4)
    x = torch.randn(40, 6, dtype=torch.float64)
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    expected, p = reference(x, router.weight, k)
    assert torch.equal(mask, expected > 0)
    assert close(weight, expected)
    assert close(routing.probability_TE, p)
    # all choices count, as in topk
    assert close(routing.losses["balance"], 5 * ((expected > 0).double().mean(0) * p.mean(0)).sum())
    assert close(routing.losses["entropy"], sum(entropy(row) for row in p.tolist()) / 40)


def test_three_tokens_and_two_experts_by_hand():
    """Experts at 0 and 3; the token at 1 has distances 1 and 2, so e^-1 : e^-2."""
    router = make("laplace", 1, 2)
    router.weight.data.copy_(torch.tensor([[0.0], [3.0]]))
    routing = router(torch.tensor([[1.0], [1.5], [5.0]], dtype=torch.float64), RoutingContext())
    near = 1 / (1 + math.exp(-1))
    far = 1 / (1 + math.exp(-3))
    assert close(dense(routing)[0], [[near, 1 - near], [0.5, 0.5], [1 - far, far]])


def test_gradients():
    torch.manual_seed(3)
    router = make("laplace", 4, 3)
    assert gradients_are_right(router, torch.randn(7, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_at_distance_0(dtype):
    router = make("laplace", 4, 3).to(dtype)
    x = router.weight.detach().clone().requires_grad_()
    routing = router(x, RoutingContext())
    assert (router.logits(x, RoutingContext()).diagonal() == 0).all()
    (routing.weight_N.square().sum() + sum(routing.losses.values())).backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(router.weight.grad).all()
    assert router.weight.grad.abs().sum() > 0


def test_a_small_distance_is_exact():
    """By way of a matrix product, a distance of 1e-3 from a vector of length 1000 would be lost."""
    router = make("laplace", 2, 2).float()
    router.weight.data.copy_(torch.tensor([[600.0, 800.0], [600.0, 801.0]]))
    logits = router.logits(torch.tensor([[600.0, 800.0009765625]]), RoutingContext())
    assert logits[0, 0].item() == pytest.approx(-0.0009765625)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    check_precision("laplace", dtype)


def test_initialisation():
    assert is_deterministic("laplace", 4, 3)


@pytest.mark.parametrize("k, words", [(0, "at least 1, but is 0"), (4, "from 1 to the 3 experts, but is 4")])
def test_refused(k, words):
    with pytest.raises(ValueError, match=f"`top_k` must be {words}"):
        make("laplace", 4, 3, top_k=k)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 1000.0]),
    same=st.booleans(),
    data=st.data(),
)
def test_the_nearest_experts(tokens, experts, scale, same, data):
    k = data.draw(st.integers(1, experts))
    router = make("laplace", 3, experts, top_k=k)
    if same:  # ties: all experts at one place
        router.weight.data.fill_(0.5)
    x = (scale * torch.randn(tokens, 3)).double().requires_grad_()
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    assert (mask.sum(1) == k).all()
    assert close(weight.sum(1), torch.ones(tokens))
    p = routing.probability_TE.detach()
    if tokens:
        assert (p.masked_fill(mask, 0) <= p.masked_fill(~mask, 2).min(1, keepdim=True).values).all()
    sum(routing.losses.values()).backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(router.weight.grad).all()
