"""DTop-p against a loop over tokens in float64, and its controller against the rule by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import MoELayer, RoutingContext
from fairseq_evomoe.moe.routers.dtop_p import ProportionalIntegral
from support.router_checks import (
    check_precision,
    close,
    dense,
    dot,
    end_update,
    gradients_are_right,
    is_causal,
    is_deterministic,
    make,
    softmax,
)


def reference(x, w, scale, p):
    """Weights and probabilities (T x E), one token at a time."""
    weights, probabilities = [], []
    for x_t in x.tolist():
        logits = [dot(x_t, w_e) for w_e in w.tolist()]
        mean = sum(logits) / len(logits)
        deviation = math.sqrt(sum((z - mean) ** 2 for z in logits) / len(logits) + 1e-6)
        probability = softmax([scale * (z - mean) / deviation for z in logits])
        found, total = [], 0.0
        for e in sorted(range(len(logits)), key=lambda e: -probability[e]):
            found.append(e)
            total += probability[e]
            if total >= p:
                break
        weights.append([q if e in found else 0.0 for e, q in enumerate(probability)])
        probabilities.append(probability)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(probabilities, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p, scale", [(0.5, 1.0), (0.8, 2.5)])
def test_equals_the_reference(p, scale, training):
    torch.manual_seed(1)
    router = make("dtop-p", 6, 5).train(training)
    router.controller.p.fill_(p)
    router.scale.data.fill_(scale)
    x = torch.randn(40, 6, dtype=torch.float64)
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    expected, probability = reference(x, router.weight, scale, p)
    assert torch.equal(mask, expected > 0) and close(weight, expected)
    assert close(routing.probability_TE, probability)
    assert len(set(mask.sum(1).tolist())) > 1


def test_the_controller_by_hand():
    """p = .4, target 2 of 4: a mean of 3 is an error of -1/4, then one of 2 is none."""
    controller = ProportionalIntegral(2.0, 4, 0.4, proportional=0.2, integral=0.1)
    for mean, correction, p in ((3.0, -0.025, 0.325), (2.0, -0.025, 0.375), (0.0, 0.025, 0.525)):
        controller.commit(torch.tensor([10 * mean, 10]))
        assert controller.correction.item() == pytest.approx(correction)
        assert controller.p.item() == pytest.approx(p)
    controller.commit(torch.zeros(2))  # an update without tokens
    assert controller.p.item() == pytest.approx(0.525)


def test_what_cannot_be_reached_does_not_pile_up():
    controller = ProportionalIntegral(4.0, 4, 0.4, proportional=0.2, integral=0.1)
    for mean, end in ((1.0, 1.0), (8.0, 0.01)):
        for _ in range(500):
            controller.adapt(torch.tensor(mean))
        assert controller.p.item() == pytest.approx(end)
        assert 0.009 < 0.4 + controller.correction.item() < 1.001


def test_the_mean_of_all_layers_reaches_the_target():
    """Of two layers that differ in their factor the surer one gets fewer experts."""
    torch.manual_seed(2)
    shared = {}
    layers = torch.nn.ModuleList(
        make("dtop-p", 8, 8, seed=i, shared=shared, mean_experts=3.0) for i in range(2)
    ).train()
    layers[0].scale.data.fill_(3.0)
    means = []
    for _ in range(120):
        x = torch.randn(150, 8, dtype=torch.float64)
        means.append([len(layer(x, RoutingContext()).token_N) / 150 for layer in layers])
        end_update(layers)
    sure, unsure = (sum(mean) / 20 for mean in zip(*means[-20:]))
    assert (sure + unsure) / 2 == pytest.approx(3.0, abs=0.1) and sure + 1 < unsure
    assert abs(sum(means[0]) / 2 - 3.0) > 0.2


def test_only_training_changes_it():
    router = make("dtop-p", 6, 5).eval()
    before = router.controller.p.clone()
    router(torch.randn(9, 6, dtype=torch.float64), RoutingContext())
    end_update(router)
    assert torch.equal(router.controller.p, before)


def test_gradients():
    torch.manual_seed(3)
    router = make("dtop-p", 4, 3, top_p=0.6).eval()
    router.scale.data.fill_(1.5)
    assert gradients_are_right(router, torch.randn(7, 4, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_it_is_causal(training):
    torch.manual_seed(5)
    assert is_causal(make("dtop-p", 6, 5).train(training), torch.randn(9, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    check_precision("dtop-p", dtype)


def test_initialisation_and_the_state_of_a_layer():
    assert is_deterministic("dtop-p", 4, 3)
    layer, other = (MoELayer(4, 8, 3, "dtop-p", spawned=True).eval() for _ in range(2))
    layer.router.controller.p.fill_(0.9)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(layer(x), other(x))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(2, 6),
    p=st.floats(0.01, 1.0),
    scale=st.sampled_from([0.0, 1.0, 1e6]),
)
def test_the_fewest_experts_that_have_p_together(tokens, experts, p, scale):
    router = make("dtop-p", 3, experts)
    router.controller.p.fill_(p)
    x = (scale * torch.randn(tokens, 3, dtype=torch.float64)).requires_grad_()
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    assert mask.any(1).all() and (weight.sum(1) >= p - 1e-6).all()
    if tokens:
        least = routing.probability_TE.detach().masked_fill(~mask, 2).min(1).values
        assert (weight.sum(1) - least < p + 1e-6).all()
    (routing.weight_N.sum() + sum(routing.losses.values())).backward()
    assert all(torch.isfinite(each.grad).all() for each in (x, *router.parameters()))
