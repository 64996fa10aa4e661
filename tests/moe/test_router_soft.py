"""Soft MoE against a loop over sequences, slots and tokens in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairseq_evomoe.moe import Experts, MoELayer, RoutingContext, record
from fairseq_evomoe.moe.dispatch import local as dispatch_module
from fairseq_evomoe.moe.dispatch.local import dispatch
from support.router_checks import close, dot, entropy, gradients_are_right, is_deterministic, make, softmax


@pytest.fixture(params=["fused", "autograd"])
def path(request, monkeypatch):
    """Each of the ways to compute the experts."""
    monkeypatch.setattr(dispatch_module, "_can_fuse", lambda x, e: request.param == "fused")


def make_experts(dim, widths):
    experts = Experts(dim, widths).double()
    for p in experts.parameters():
        nn.init.normal_(p)
    return experts


def unit(row):
    return [v / math.sqrt(dot(row, row) + 1e-6) for v in row]


def expert_output(experts, e, x):
    """One expert on one row."""
    start = sum(experts.widths[:e])
    rows = slice(start, start + experts.widths[e])
    hidden = torch.relu(experts.w1[rows] @ x + experts.b1[rows])
    return hidden @ experts.w2[rows] + experts.b2[e]


def reference(router, experts, x, sequence):
    """Outputs and, for each token, the share of each expert in it; one sequence at a time."""
    y, share = torch.zeros_like(x), torch.zeros(len(x), router.experts, dtype=x.dtype)
    slots = [unit(row) for row in router.weight.tolist()]
    for number in set(sequence):
        members = [t for t, s in enumerate(sequence) if s == number]
        logits = {t: [router.scale.item() * dot(unit(x[t].tolist()), s) for s in slots] for t in members}
        outputs = []
        for s in range(len(slots)):
            dispatch_weights = softmax([logits[t][s] for t in members])
            mixed = sum(w * x[t] for w, t in zip(dispatch_weights, members))
            outputs.append(expert_output(experts, s // router.slots, mixed))
        for t in members:
            for s, w in enumerate(softmax(logits[t])):
                y[t] = y[t] + w * outputs[s]
                share[t, s // router.slots] += w
    return y, share


def context(sequence):
    return RoutingContext(sequence_T=torch.tensor(sequence, dtype=torch.long))


SEQUENCES = [
    [0] * 9,
    [0, 1, 2, 0, 1, 2, 0, 1, 0],  # (position, sequence), padding removed: the layout of fairseq's layers
    [3, 3, 3, 3, 0, 0, 7, 7, 7],
    list(range(9)),
]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_equals_the_reference(path, sequence, slots):
    torch.manual_seed(1)
    router, experts = make("soft", 5, 4, slots=slots), make_experts(5, [3, 8, 1, 5])
    router.scale.data.fill_(6.0)
    x = torch.randn(9, 5, dtype=torch.float64)
    routing = router(x, context(sequence))
    expected, share = reference(router, experts, x, sequence)
    assert close(dispatch(x, routing, experts), expected)
    assert close(routing.probability_TE, share)
    assert close(routing.gate_entropy, sum(entropy(row) for row in share.tolist()))
    # statistics: every expert has its slots of every sequence
    sequences = len(set(sequence))
    assert routing.tokens == 9
    assert routing.load_E().tolist() == [sequences * slots] * 4
    assert routing.token_N.tolist() == list(range(4 * slots * sequences))
    assert routing.losses == {}


def test_without_sequences_all_tokens_are_one():
    torch.manual_seed(2)
    router, experts = make("soft", 5, 4), make_experts(5, [3] * 4)
    x = torch.randn(9, 5, dtype=torch.float64)
    one = dispatch(x, router(x, context([0] * 9)), experts)
    assert torch.equal(dispatch(x, router(x, RoutingContext()), experts), one)


def test_two_tokens_and_two_slots_by_hand():
    """Equal logits: each slot is the mean of the tokens, each output the mean of the experts'."""
    router, experts = make("soft", 1, 2), make_experts(1, [1, 1])
    with torch.no_grad():
        router.scale.fill_(0.0)
        experts.w1.copy_(torch.tensor([[1.0], [10.0]]))
        experts.w2.fill_(1.0)
        experts.b1.zero_()
        experts.b2.zero_()
    x = torch.tensor([[1.0], [3.0], [100.0]], dtype=torch.float64)
    # means 2 and 100; (2 + 20) / 2 = 11 and (100 + 1000) / 2 = 550
    y = dispatch(x, router(x, context([0, 0, 1])), experts)
    assert close(y, [[11.0], [11.0], [550.0]])


def test_gradients_of_the_mixing():
    torch.manual_seed(3)
    router = make("soft", 4, 3, slots=2)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    sequence = context([0, 0, 1, 0, 1])
    assert gradients_are_right(router, x, sequence)

    def mixing(*_):
        slots = router(x, sequence).slots
        return slots.mix(x), slots.spread(torch.arange(48.0).double().view(12, 4))

    assert torch.autograd.gradcheck(mixing, (x, *router.parameters()))


def test_gradients_through_the_experts(path):
    torch.manual_seed(4)
    router, experts = make("soft", 3, 2), make_experts(3, [4, 2])
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *router.parameters(), *experts.parameters())

    def run(*_):
        return dispatch(x, router(x, context([0, 1, 0, 1, 1])), experts)

    assert torch.autograd.gradcheck(run, inputs)


def test_a_row_of_zeros_has_a_finite_gradient():
    router = make("soft", 4, 3).float()
    x = torch.zeros(5, 4, requires_grad=True)
    slots = router(x, RoutingContext()).slots
    slots.mix(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(router.weight.grad).all()


def make_layer(dim, experts, slots=1):
    torch.manual_seed(5)
    layer = MoELayer(dim, 8, experts, "soft", slots=slots)
    layer.spawn("noise")
    return layer


def test_a_sequence_does_not_depend_on_its_batch_or_padding():
    """In a padded batch each sequence gets what it gets alone."""
    layer = make_layer(6, 4, slots=2).double()
    lengths = [5, 1, 3]
    x = torch.randn(5, 3, 6, dtype=torch.float64)  # (seq, batch, dim)
    mask = torch.arange(5).unsqueeze(1) >= torch.tensor(lengths)
    sequences = torch.arange(3).expand(5, 3)
    with record() as routings:
        y = layer(x, RoutingContext(), mask, sequences=sequences)
    routing = routings[layer]
    assert routing.tokens == 9 and routing.token_N.shape[0] == 3 * 8
    x[mask] = 1e3
    assert torch.equal(layer(x, RoutingContext(), mask, sequences=sequences), y)
    for b, length in enumerate(lengths):
        alone = layer(x[:length, b], RoutingContext())
        assert close(y[:length, b], alone)
        assert (y[length:, b] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_precision(dtype, autocast):
    torch.manual_seed(6)
    layer = make_layer(32, 8).to(dtype)
    x = torch.randn(64, 32).to(dtype).requires_grad_()
    sequences = torch.arange(64) % 5
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with record() as routings:
            y = layer(x, RoutingContext(), sequences=sequences)
    routing = routings[layer]
    assert y.dtype == dtype
    assert routing.probability_TE.dtype == routing.slots.dispatch_BSL.dtype == torch.float32
    router = make("soft", 32, 8)
    router.load_state_dict(layer.router.state_dict())
    expected = router(x.double(), context(sequences.tolist()))
    assert torch.allclose(routing.probability_TE.double(), expected.probability_TE, atol=1e-6)
    assert torch.allclose(routing.slots.dispatch_BSL.double(), expected.slots.dispatch_BSL, atol=1e-6)
    exact = make_layer(32, 8).double()
    exact.load_state_dict(layer.state_dict())
    exact_y = exact(x.double(), RoutingContext(), sequences=sequences)
    rounding = 2e-2 if autocast or dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(y.double(), exact_y, atol=rounding)
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in layer.parameters())


def test_initialisation():
    assert is_deterministic("soft", 4, 3)
    router = make("soft", 100, 10, slots=5)
    assert router.weight.std().item() == pytest.approx(0.1, rel=0.05) and router.scale.item() == 1


def test_refused():
    with pytest.raises(ValueError, match="`slots` must be at least 1, but is 0"):
        make("soft", 4, 3, slots=0)


@settings(deadline=None, max_examples=50)
@given(
    sequence=st.lists(st.integers(0, 4), max_size=12),
    experts=st.integers(1, 5),
    slots=st.integers(1, 3),
    same=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_shares_are_distributions(sequence, experts, slots, same, scale):
    tokens = len(sequence)
    router, layer_experts = make("soft", 3, experts, slots=slots), make_experts(3, [2] * experts)
    router.scale.data.fill_(scale)
    x = (torch.zeros(tokens, 3) if same else torch.randn(tokens, 3)).double().requires_grad_()
    routing = router(x, context(sequence))
    y = dispatch(x, routing, layer_experts)
    assert y.shape == x.shape
    assert close(y, reference(router, layer_experts, x, sequence)[0])
    assert close(routing.probability_TE.sum(1), torch.ones(tokens))
    dispatch_BSL = routing.slots.dispatch_BSL
    assert dispatch_BSL.shape[0] == len(set(sequence)) and (dispatch_BSL >= 0).all()
    assert close(dispatch_BSL.sum(-1), torch.ones(dispatch_BSL.shape[:2]))
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters())
