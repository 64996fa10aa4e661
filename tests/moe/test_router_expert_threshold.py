"""Expert Threshold against a loop over tokens in float64, and its cutoffs against sorted scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import MoELayer, RoutingContext
from fairseq_evomoe.moe.routers.expert_threshold import Cutoffs
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


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def reference(x, w, cutoff):
    """Weights (T x E), one token at a time."""
    rows = []
    for x_t in x.tolist():
        scores = [sigmoid(dot(x_t, w_e)) for w_e in w.tolist()]
        rows.append([s if s > c else 0.0 for s, c in zip(scores, cutoff.tolist())])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_reference(training):
    torch.manual_seed(1)
    router = make("expert-threshold", 6, 5).train(training)
    router.cutoffs.cutoff_E.copy_(torch.linspace(0.3, 0.7, 5))
    x = torch.randn(40, 6, dtype=torch.float64)
    routing = router(x, RoutingContext())
    weight, mask = dense(routing)
    expected = reference(x, router.weight, router.cutoffs.cutoff_E)
    assert torch.equal(mask, expected > 0) and close(weight, expected)
    assert len(set(mask.sum(1).tolist())) >= 3 and not routing.losses and not router.loss_weights


def test_the_cutoff_is_the_mean_of_what_the_worst_token_of_each_update_has():
    """Of 400 tokens each of 5 experts would take 160: the 160th best score, of two batches as one."""
    torch.manual_seed(2)
    router = make("expert-threshold", 6, 5, mean_experts=2.0, cutoff_decay=0.6).train()
    mean, expected = None, []
    for update in range(4):
        batches = [torch.randn(n, 6, dtype=torch.float64) + 0.2 * update for n in (300, 100)]
        for x in batches:
            router(x, RoutingContext())
        end_update(router)
        score = (torch.cat(batches) @ router.weight.t()).sigmoid()
        worst = score.sort(0, descending=True).values[159].detach()
        # the first updates count alike, until one has 1 - decay anyway
        step = max(1 / (update + 1), 0.4)
        mean = worst if mean is None else mean + step * (worst - mean)
        expected.append(mean)
        assert (router.cutoffs.cutoff_E - mean).abs().max() < 0.01
    assert (expected[0] - expected[-1]).abs().max() > 0.02


def test_loads_are_even_on_tokens_that_it_has_not_seen():
    torch.manual_seed(3)
    router = make("expert-threshold", 6, 5, mean_experts=1.0).train()
    skew = torch.tensor([1.0, 0, 0, 0, 0, 0]).double()
    for _ in range(5):
        router(torch.randn(500, 6, dtype=torch.float64) + skew, RoutingContext())
        end_update(router)
    load = router.eval()(torch.randn(2000, 6, dtype=torch.float64) + skew, RoutingContext()).load_E() / 2000
    assert (load - 0.2).abs().max() < 0.04


def test_only_training_on_tokens_changes_it():
    router = make("expert-threshold", 6, 5)
    router.eval()(torch.randn(9, 6, dtype=torch.float64), RoutingContext())
    end_update(router)
    router.train()(torch.zeros(0, 6, dtype=torch.float64), RoutingContext())
    end_update(router)
    assert (router.cutoffs.cutoff_E == 0.5).all() and router.cutoffs.updates == 0


def test_gradients():
    torch.manual_seed(4)
    assert gradients_are_right(make("expert-threshold", 4, 3), torch.randn(7, 4, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_it_is_causal(training):
    torch.manual_seed(5)
    router = make("expert-threshold", 6, 5).train()
    for _ in range(2):
        router(torch.randn(20, 6, dtype=torch.float64), RoutingContext())
        end_update(router)
    assert is_causal(router.train(training), torch.randn(9, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    torch.manual_seed(6)
    router = make("expert-threshold", 32, 8).to(dtype)
    assert router.cutoffs.cutoff_E.dtype == torch.float32
    x = torch.randn(64, 32).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x, RoutingContext())
    exact = router.double()(x.double(), RoutingContext())
    assert routing.weight_N.dtype == torch.float32
    assert torch.allclose(dense(routing)[0], dense(exact)[0], atol=1e-5)


def test_initialisation_and_the_state_of_a_layer():
    assert is_deterministic("expert-threshold", 4, 3)
    layer, other = (MoELayer(4, 8, 3, "expert-threshold", spawned=True).eval() for _ in range(2))
    layer.router.cutoffs.cutoff_E.fill_(0.4)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(layer(x), other(x))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 60),
    experts=st.integers(1, 5),
    share=st.floats(0.05, 1),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_about_its_share_of_an_update_is_over_the_cutoff(tokens, experts, share, scale):
    cutoffs = Cutoffs(experts, share, 0.99)
    score_TE = (scale * torch.randn(tokens, experts)).sigmoid()
    cutoffs.watch(score_TE)
    cutoffs.commit(cutoffs.drain())
    assert ((cutoffs.cutoff_E >= 0) & (cutoffs.cutoff_E <= 1)).all()
    assert ((score_TE > cutoffs.cutoff_E + 2 / 1024).sum(0) <= share * tokens + 1e-3).all()
    assert ((score_TE < cutoffs.cutoff_E - 2 / 1024).sum(0) <= (1 - share) * tokens + 1e-3).all()
