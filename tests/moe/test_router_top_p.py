"""Top-p routing against a loop over tokens in float64."""

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
    entropy,
    gradients_are_right,
    is_deterministic,
    make,
    softmax,
)


def reference(x, w, top_p, renormalize):
    """Weights and probabilities (T x E), one token at a time."""
    weights, probabilities = [], []
    for x_t in x.tolist():
        p = softmax([dot(x_t, w_e) for w_e in w.tolist()])
        chosen, total = [], 0.0
        for e in sorted(range(len(p)), key=lambda e: -p[e]):
            chosen.append(e)
            total += p[e]
            if total >= top_p:
                break
        scale = total if renormalize else 1.0
        weights.append([p_e / scale if e in chosen else 0.0 for e, p_e in enumerate(p)])
        probabilities.append(p)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(probabilities, dtype=torch.float64)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top_p", [0.01, 0.4, 0.6, 0.99])
def test_equals_the_reference(top_p, renormalize):
    torch.manual_seed(1)
    router = make("top-p", 6, 5, top_p=top_p, renormalize="always" if renormalize else "never")
    router.weight.data.mul_(4)
    x = torch.randn(40, 6, dtype=torch.float64)
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    expected, p = reference(x, router.weight, top_p, renormalize)
    assert torch.equal(mask, expected > 0)
    assert close(weight, expected)
    assert close(routing.probability_TE, p)
    share = (expected > 0).double().sum(0) / (expected > 0).sum()
    assert close(routing.losses["balance"], 5 * (share * p.mean(0)).sum())
    entropies = [entropy(row) for row in p.tolist()]
    assert close(routing.losses["entropy"], sum(entropies) / 40)
    assert close(routing.gate_entropy, sum(entropies))
    logits = x @ router.weight.t()
    assert close(routing.losses["z"], (logits.exp().sum(1).log() ** 2).mean())


def test_three_tokens_and_two_experts_by_hand():
    """p = (.7, .3), (.5, .5), (.2, .8) and top_p = .6: one expert, both, one."""
    router = make("top-p", 2, 2, top_p=0.6)
    router.weight.data.copy_(torch.eye(2))
    p = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    routing = router(p.log(), RoutingContext())
    weight, _ = dense(routing)
    assert close(weight, [[0.7, 0.0], [0.5, 0.5], [0.0, 0.8]])
    # of the 4 pairs each expert has 2; mean p = (1.4 / 3, 1.6 / 3): 2 * (.5 * 1.4 / 3 + .5 * 1.6 / 3)
    assert routing.losses["balance"].item() == pytest.approx(1.0)
    weights = router.weight
    router = make("top-p", 2, 2, top_p=0.6, renormalize="always")
    router.weight = weights
    weight, _ = dense(router(p.log(), RoutingContext()))
    assert close(weight, [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])


def test_the_expert_that_reaches_p_exactly_is_the_last():
    """Four equal probabilities of 1/4: p = 1/2 needs two, a little more needs three."""
    for top_p, count in ((0.25, 1), (0.5, 2), (0.5001, 3), (1.0, 4)):
        router = make("top-p", 3, 4, top_p=top_p)
        routing = router(torch.zeros(5, 3, dtype=torch.float64), RoutingContext())
        assert routing.token_N.bincount().tolist() == [count] * 5


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients(renormalize):
    torch.manual_seed(3)
    router = make("top-p", 4, 3, top_p=0.6, renormalize="always" if renormalize else "never")
    router.weight.data.mul_(3)
    assert gradients_are_right(router, torch.randn(7, 4, dtype=torch.float64))


def test_entropy_loss_has_a_gradient_where_a_probability_is_0():
    router = make("top-p", 2, 2).float()
    router.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    routing = router(torch.tensor([[1000.0, 0.0], [0.1, 0.0]]), RoutingContext())
    assert (routing.probability_TE == 0).any()
    routing.losses["entropy"].backward()
    assert torch.isfinite(router.weight.grad).all() and router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [False, True])
def test_precision(dtype, renormalize):
    check_precision("top-p", dtype, renormalize="always" if renormalize else "never")


def test_initialisation():
    assert is_deterministic("top-p", 4, 3)


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.1])
def test_refused(top_p):
    with pytest.raises(ValueError, match="`top_p` must be greater than 0 and at most 1, but is"):
        make("top-p", 4, 3, top_p=top_p)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 9),
    top_p=st.floats(0.01, 1.0),
    scale=st.sampled_from([0.0, 1.0, 50.0]),
    renormalize=st.booleans(),
    same=st.booleans(),
)
def test_the_smallest_set_that_reaches_p(tokens, experts, top_p, scale, renormalize, same):
    router = make("top-p", 3, experts, top_p=top_p, renormalize="always" if renormalize else "never")
    x = torch.randn(1, 3).repeat(tokens, 1) if same else torch.randn(tokens, 3)
    routing = router((scale * x).double(), RoutingContext())
    weight, mask = dense(routing)
    p = routing.probability_TE.detach()
    assert mask.any(1).all()
    reached = (p * mask).sum(1)
    assert (reached >= top_p - 1e-9).all()
    # without its least probable expert a set does not reach p, and none left out is more probable
    least = p.masked_fill(~mask, 2).min(1).values if tokens else p.new_zeros(0)
    assert (reached - least < top_p + 1e-9).all()
    assert (p.masked_fill(mask, 0) <= least.unsqueeze(1)).all()
    if renormalize:
        assert close(weight.sum(1), torch.ones(tokens))
    assert all(torch.isfinite(loss) for loss in routing.losses.values())
