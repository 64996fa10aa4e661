"""Expert Choice against a loop over sequences in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import MoELayer, RoutingContext
from fairseq_evomoe.moe.routers.expert_choice import best_of_sequences
from support.router_checks import (
    check_precision,
    close,
    dense,
    dot,
    entropy,
    gradients_are_right,
    is_causal,
    is_deterministic,
    make,
    softmax,
)


def reference(x, w, sequence, mean_experts):
    """Weights and probabilities (T x E): each expert looks at each sequence."""
    p = [softmax([dot(x_t, w_e) for w_e in w.tolist()]) for x_t in x.tolist()]
    experts = len(p[0]) if p else 0
    weights = [[0.0] * experts for _ in p]
    for s in set(sequence):
        tokens = [t for t, own in enumerate(sequence) if own == s]
        for e in range(experts):
            best = sorted(tokens, key=lambda t: -p[t][e])
            for t in best[: math.ceil(mean_experts * len(tokens) / experts)]:
                weights[t][e] = p[t][e]
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(p, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mean_experts", [0.5, 2.0, 5.0])
def test_equals_the_reference(mean_experts, training):
    torch.manual_seed(1)
    router = make("expert-choice", 6, 5, mean_experts=mean_experts).train(training)
    x = torch.randn(40, 6, dtype=torch.float64)
    sequence_T = torch.randint(4, (40,))  # their tokens may lie anywhere
    routing = router(x, RoutingContext(sequence_T=sequence_T))
    expected, p = reference(x, router.weight, sequence_T.tolist(), mean_experts)
    weight, mask = dense(routing)
    assert torch.equal(mask, expected > 0) and close(weight, expected)
    assert close(routing.probability_TE, p)
    assert close(routing.losses["entropy"], sum(map(entropy, p.tolist())) / 40)
    assert routing.losses.keys() == router.loss_weights.keys()
    load = routing.load_E()
    assert (load == load[0]).all()


def test_a_sequence_by_hand():
    """Four tokens, two experts, one each on average: each takes the two that it likes best."""
    router = make("expert-choice", 2, 2, mean_experts=1.0)
    router.weight.data.copy_(torch.eye(2))
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], dtype=torch.float64)
    weight, _ = dense(router(p.log(), RoutingContext()))
    assert close(weight, [[0.9, 0], [0.8, 0], [0, 0.3], [0, 0.4]])


def test_a_sequence_does_not_depend_on_the_others():
    torch.manual_seed(2)
    router = make("expert-choice", 6, 5)
    parts = [torch.randn(n, 6, dtype=torch.float64) for n in (7, 1, 12)]
    sequence_T = torch.tensor([0] * 7 + [1] + [2] * 12)
    whole, _ = dense(router(torch.cat(parts), RoutingContext(sequence_T=sequence_T)))
    for own, part in zip(whole.split([7, 1, 12]), parts):
        assert torch.equal(own, dense(router(part, RoutingContext()))[0])


def test_it_is_not_causal_and_says_so():
    torch.manual_seed(3)
    router = make("expert-choice", 6, 5, mean_experts=1.0)
    assert router.needs_whole_sequence
    assert not is_causal(router, torch.randn(9, 6, dtype=torch.float64))


def test_gradients():
    torch.manual_seed(4)
    router = make("expert-choice", 4, 3)
    context = RoutingContext(sequence_T=torch.tensor([0, 0, 1, 1, 1, 0, 2]))
    assert gradients_are_right(router, torch.randn(7, 4, dtype=torch.float64), context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    check_precision("expert-choice", dtype)


def test_initialisation():
    assert is_deterministic("expert-choice", 4, 3)


def test_a_layer_tells_the_sequences_and_leaves_out_padding():
    torch.manual_seed(5)
    layer = MoELayer(6, 8, 4, "expert-choice", spawned=True).eval()
    x = torch.randn(2, 5, 6)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    sequences = torch.arange(2).unsqueeze(1).expand(2, 5)
    y = layer(x, padding_mask=padding, sequences=sequences)
    assert torch.allclose(y[1, :3], layer(x[1:, :3])[0], atol=1e-6) and not y[1, 3:].any()


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=4),
    experts=st.integers(1, 5),
    share=st.floats(0.01, 1),
    same=st.booleans(),
)
def test_each_takes_its_share_of_the_best(lengths, experts, share, same):
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    sequence_T = sequence_T[torch.randperm(len(sequence_T))]
    score_TE = torch.zeros(len(sequence_T), experts) if same else torch.rand(len(sequence_T), experts)
    taken_TE = best_of_sequences(score_TE, sequence_T, share)
    for s, length in enumerate(lengths):
        own = sequence_T == s
        assert (taken_TE[own].sum(0) == math.ceil(share * length)).all()
        worst = score_TE[own].masked_fill(~taken_TE[own], 2).amin(0) if length else torch.zeros(experts)
        assert (score_TE[own].masked_fill(taken_TE[own], -1) <= worst).all()
        if same and length:  # earlier tokens first
            assert (taken_TE[own].long().diff(dim=0) <= 0).all()
