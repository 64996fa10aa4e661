"""X-MoE's cosine gate against a loop over tokens in float64."""

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
    dot,
    gradients_are_right,
    is_causal,
    is_deterministic,
    make,
    softmax,
)


def reference(x, projection, w, temperature, k):
    """Weights and probabilities (T x E), one token at a time."""
    weights, probabilities = [], []
    for x_t in x.tolist():
        h = [dot(x_t, p_r) for p_r in projection.tolist()]
        cosines = [dot(h, w_e) / math.sqrt(dot(h, h) * dot(w_e, w_e)) for w_e in w.tolist()]
        p = softmax([c / temperature for c in cosines])
        best = sorted(range(len(p)), key=lambda e: -p[e])[:k]
        weights.append([p_e if e in best else 0.0 for e, p_e in enumerate(p)])
        probabilities.append(p)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(probabilities, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("temperature", [0.3, 0.05])
def test_equals_the_reference(temperature, k):
    torch.manual_seed(1)
    router = make("xmoe", 6, 5, routing_dim=3, cosine_temperature=temperature, top_k=k)
    x = torch.randn(40, 6, dtype=torch.float64)
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    expected, p = reference(x, router.projection, router.weight, temperature, k)
    # the temperature is kept as a logarithm in float32
    assert torch.equal(mask, expected > 0) and torch.allclose(weight, expected, atol=1e-6)
    assert torch.allclose(routing.probability_TE, p, atol=1e-6)
    choices = (expected > 0).double().mean(0)
    assert torch.allclose(routing.losses["balance"], 5 * (choices * p.mean(0)).sum(), atol=1e-6)


def test_a_token_by_hand():
    """Along the first expert, at 45 degrees to the second: cosines 1 and .71 at temperature 1/2."""
    router = make("xmoe", 3, 2, routing_dim=2)
    router.projection.data.copy_(torch.eye(2, 3))
    router.weight.data.copy_(torch.tensor([[4.0, 0.0], [1.0, 1.0]]))
    router.log_scale.data.fill_(math.log(2))
    routing = router(torch.tensor([[3.0, 0.0, 7.0]], dtype=torch.float64), RoutingContext())
    assert close(routing.probability_TE, [softmax([2.0, math.sqrt(2)])])
    assert routing.expert_N.tolist() == [0]


def test_gradients():
    torch.manual_seed(3)
    router = make("xmoe", 4, 3, routing_dim=2, top_k=2)
    assert gradients_are_right(router, torch.randn(7, 4, dtype=torch.float64))


def test_lengths_do_not_matter_and_the_temperature_has_a_least_value():
    torch.manual_seed(4)
    router = make("xmoe", 6, 5, routing_dim=3)
    x = torch.randn(9, 6, dtype=torch.float64)
    expected = router(x, RoutingContext()).probability_TE
    router.weight.data.mul_(7)
    assert close(router(100 * x, RoutingContext()).probability_TE, expected)
    router.log_scale.data.fill_(50.0)
    cosine = router.logits(x, RoutingContext()) / 100
    assert cosine.abs().max() <= 1 + 1e-9 and cosine.abs().max() > 0.5


@pytest.mark.parametrize("training", [True, False])
def test_it_is_causal(training):
    torch.manual_seed(5)
    assert is_causal(make("xmoe", 6, 5).train(training), torch.randn(9, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    check_precision("xmoe", dtype, top_k=2)


def test_initialisation():
    assert is_deterministic("xmoe", 4, 3)
    weight = make("xmoe", 8, 4, routing_dim=6).weight
    assert torch.allclose(weight @ weight.t(), 0.32**2 * torch.eye(4).double(), atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 6),
    routing_dim=st.integers(1, 5),
    scale=st.sampled_from([0.0, 1.0, 1e30]),
)
def test_probabilities_are_within_what_the_temperature_allows(tokens, experts, routing_dim, scale):
    router = make("xmoe", 3, experts, routing_dim=routing_dim)
    x = (scale * torch.randn(tokens, 3, dtype=torch.float64)).requires_grad_()
    routing = router(x, RoutingContext())
    p = routing.probability_TE
    assert close(p.sum(1), torch.ones(tokens))
    assert (p.max(1).values / p.min(1).values <= math.exp(2 / 0.3) * 1.001).all() if tokens else True
    (routing.weight_N.sum() + sum(routing.losses.values())).backward()
    assert all(torch.isfinite(each.grad).all() for each in (x, *router.parameters()))
