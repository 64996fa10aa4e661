"""ReMoE's gate against a loop over tokens in float64, and its coefficient against the published rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import MoELayer, RoutingContext
from fairseq_evomoe.moe.routers.remoe import AdaptivePenalty
from support.router_checks import (
    close,
    dense,
    dot,
    end_update,
    gradients_are_right,
    is_causal,
    is_deterministic,
    make,
)


def reference(x, w, mean_experts):
    """Weights (T x E), and both forms of the penalty without a coefficient, one token at a time."""
    rows = [[max(dot(x_t, w_e), 0.0) for w_e in w.tolist()] for x_t in x.tolist()]
    tokens, experts = len(rows), len(rows[0])
    plain = sum(map(sum, rows)) / tokens
    balanced = 0.0
    for e in range(experts):
        frequency = experts / (mean_experts * tokens) * sum(row[e] > 0 for row in rows)
        balanced += sum(frequency * row[e] for row in rows) / tokens
    return torch.tensor(rows, dtype=torch.float64), {"plain": plain, "balanced": balanced}


@pytest.mark.parametrize("form", ["balanced", "plain"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_reference(form, training):
    torch.manual_seed(1)
    router = make("remoe", 6, 5, mean_experts=1.5, l1_form=form, l1_start=0.5).train(training)
    x = torch.randn(40, 6, dtype=torch.float64)
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    expected, penalty = reference(x, router.weight, 1.5)
    assert torch.equal(mask, expected > 0) and close(weight, expected)
    assert len(set(mask.sum(1).tolist())) >= 3
    assert routing.losses.keys() == {"l1"} == router.loss_weights.keys()
    assert close(routing.losses["l1"], 0.5 * penalty[form])


def test_two_tokens_by_hand():
    """Weights (2, 0), (1, 3): f = 2/2 * (2, 1), so that the penalty is (2 * 3 + 1 * 3) / 2."""
    router = make("remoe", 2, 2, l1_start=1.0)
    router.weight.data.copy_(torch.eye(2))
    x = torch.tensor([[2.0, -1.0], [1.0, 3.0]], dtype=torch.float64)
    routing = router(x, RoutingContext())
    assert dense(routing)[0].tolist() == [[2, 0], [1, 3]]
    assert close(routing.losses["l1"], 4.5)


@pytest.mark.parametrize("form", ["balanced", "plain"])
def test_gradients(form):
    torch.manual_seed(3)
    router = make("remoe", 4, 3, l1_form=form, l1_start=1.0)
    assert gradients_are_right(router, torch.randn(7, 4, dtype=torch.float64))


def test_the_coefficient_follows_the_published_rule():
    """Times 1.2 while there are too many experts, divided while there are too few, the same at K."""
    router = make("remoe", 2, 2, mean_experts=1.0, l1_start=1e-3)
    router.weight.data.copy_(torch.eye(2))
    both, one, none = [1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]
    expected = 1e-3
    for tokens, step in (([both, one], 1), ([both], 1), ([both, none], 0), ([one, none], -1), ([none], -1)):
        router.train()(torch.tensor(tokens, dtype=torch.float64), RoutingContext())
        end_update(router)
        expected *= 1.2**step
        assert router.penalty.coefficient.item() == pytest.approx(expected, rel=1e-6)


def test_nothing_changes_without_tokens_or_in_evaluation():
    router = make("remoe", 4, 3)
    before = router.penalty.coefficient.clone()
    router.train()(torch.zeros(0, 4, dtype=torch.float64), RoutingContext())
    end_update(router)
    router.eval()(torch.randn(9, 4, dtype=torch.float64), RoutingContext())
    end_update(router)
    assert torch.equal(router.penalty.coefficient, before)


def test_the_coefficient_stays_a_number():
    penalty = AdaptivePenalty(1.0, 1e-8, 1.2)
    for mean, end in ((4.0, penalty.MOST), (0.0, penalty.LEAST)):
        for _ in range(900):
            penalty.adapt(torch.tensor(mean))
        assert penalty.coefficient.item() == pytest.approx(end) and math.isfinite(end)


def test_layers_of_a_stack_have_one_coefficient():
    shared = {}
    layers = torch.nn.ModuleList(make("remoe", 4, 3, seed=i, shared=shared) for i in range(2))
    dense_one, sparse_one = layers
    dense_one.weight.data.fill_(1.0)
    sparse_one.weight.data.fill_(-1.0)
    for count, factor in ((1, 1.2), (4, 1 / 1.2)):  # of 3 + 0 pairs in 1 + 1 tokens, or in 1 + 4
        before = dense_one.penalty.coefficient.item()
        dense_one(torch.ones(1, 4, dtype=torch.float64), RoutingContext())
        sparse_one(torch.ones(count, 4, dtype=torch.float64), RoutingContext())
        end_update(layers)
        assert sparse_one.penalty.coefficient.item() == pytest.approx(before * factor, rel=1e-6)


def test_training_reaches_the_sparsity():
    """By the penalty alone, with a step of plain gradient descent."""
    torch.manual_seed(4)
    router = make("remoe", 8, 6, mean_experts=1.5, l1_start=1e-3).train()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    counts = []
    for _ in range(150):
        routing = router(torch.randn(200, 8, dtype=torch.float64) + 0.5, RoutingContext())
        optimizer.zero_grad()
        (routing.losses["l1"] + 0.1 * (1 - routing.weight_N).square().sum() / 200).backward()
        optimizer.step()
        end_update(router)
        counts.append(routing.token_N.shape[0] / 200)
    assert counts[0] > 2.2 and 1.2 < sum(counts[-30:]) / 30 < 1.8


@pytest.mark.parametrize("training", [True, False])
def test_it_is_causal(training):
    torch.manual_seed(5)
    assert is_causal(make("remoe", 6, 5).train(training), torch.randn(9, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    torch.manual_seed(2)
    router = make("remoe", 32, 8, l1_start=1.0).to(dtype)
    assert router.penalty.coefficient.dtype == torch.float32
    x = torch.randn(64, 32).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x, RoutingContext())
    exact = router.double()(x.double(), RoutingContext())
    assert routing.weight_N.dtype == routing.losses["l1"].dtype == torch.float32
    assert torch.allclose(dense(routing)[0], dense(exact)[0], atol=1e-5)
    routing.losses["l1"].backward()


def test_initialisation_and_the_state_of_a_layer():
    assert is_deterministic("remoe", 4, 3)
    torch.manual_seed(6)
    layer, other = (MoELayer(4, 8, 3, "remoe", spawned=True).eval() for _ in range(2))
    layer.router.penalty.coefficient.fill_(3.0)
    other.load_state_dict(layer.state_dict())
    assert other.router.penalty.coefficient == 3
    x = torch.randn(5, 4)
    assert torch.equal(layer(x), other(x))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 6),
    scale=st.sampled_from([0.0, 1.0, 1e6]),
    form=st.sampled_from(["balanced", "plain"]),
)
def test_weights_are_positive_and_losses_finite(tokens, experts, scale, form):
    router = make("remoe", 3, experts, l1_form=form, l1_start=1.0).train()
    routing = router(scale * torch.randn(tokens, 3, dtype=torch.float64), RoutingContext())
    weight, mask = dense(routing)
    assert torch.equal(weight > 0, mask)
    assert routing.losses["l1"] >= 0 and torch.isfinite(routing.losses["l1"])
    routing.losses["l1"].backward()
    assert torch.isfinite(router.weight.grad).all()
