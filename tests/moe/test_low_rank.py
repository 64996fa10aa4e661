"""Low-rank experts beside a linear layer (SMoLA) against a loop over sequences and slots in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe.low_rank import LowRankExperts
from support.router_checks import close, dot, softmax


def make(dim, out_dim, experts, rank, slots=1, seed=0):
    """Experts in float64, whose second matrices are not zero."""
    made = LowRankExperts(dim, out_dim, experts, rank, slots)
    generator = torch.Generator().manual_seed(seed)
    made.initialize(generator)
    made.up_ERO.data.copy_(torch.randn(made.up_ERO.shape, generator=generator))
    return made.double()


def unit(row):
    return [v / math.sqrt(dot(row, row) + 1e-6) for v in row]


def reference(made, x, sequence):
    """What each token gets, one sequence, one slot and one token at a time."""
    router = made.router
    vectors, scale = [unit(row) for row in router.weight.tolist()], router.scale.item()
    y = torch.zeros(len(x), made.up_ERO.shape[2], dtype=x.dtype)
    for number in set(sequence):
        members = [t for t, s in enumerate(sequence) if s == number]
        logits = {t: [scale * dot(unit(x[t].tolist()), v) for v in vectors] for t in members}
        outputs = []
        for s in range(len(vectors)):
            shares = softmax([logits[t][s] for t in members])
            mixed = sum(share * x[t] for share, t in zip(shares, members))
            e = s // router.slots
            outputs.append(mixed @ made.down_EDR[e] @ made.up_ERO[e])
        for t in members:
            y[t] = sum(share * output for share, output in zip(softmax(logits[t]), outputs))
    return y


SEQUENCES = [[0] * 9, [0, 1, 2, 0, 1, 2, 0, 1, 0], [3, 3, 3, 3, 0, 0, 7, 7, 7], list(range(9))]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_equals_the_reference(sequence, slots):
    torch.manual_seed(1)
    made = make(5, 7, 4, 2, slots)
    made.router.scale.data.fill_(6.0)
    x = torch.randn(9, 5, dtype=torch.float64)
    assert close(made(x, torch.tensor(sequence)), reference(made, x, sequence))


def test_without_sequences_all_tokens_are_one():
    made, x = make(5, 3, 4, 2), torch.randn(6, 5, dtype=torch.float64)
    assert torch.equal(made(x), made(x, torch.zeros(6, dtype=torch.long)))


def test_by_hand():
    """Equal logits: both slots are the mean 2 of the tokens, each output half of 30 and 14."""
    made = make(1, 1, 2, 1)
    made.router.scale.data.zero_()
    made.down_EDR.data.copy_(torch.tensor([[[3.0]], [[1.0]]]))
    made.up_ERO.data.copy_(torch.tensor([[[5.0]], [[7.0]]]))
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    assert close(made(x), [[22.0], [22.0]])


def test_gradients():
    torch.manual_seed(2)
    made = make(4, 3, 2, 2, slots=2)
    x, sequence = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 1, 0, 1])
    assert torch.autograd.gradcheck(lambda *_: made(x, sequence), (x, *made.parameters()))


def test_it_adds_nothing_at_first_and_yet_learns():
    made = LowRankExperts(6, 4, 3, 2)
    made.initialize(torch.Generator().manual_seed(1))
    y = made(torch.randn(5, 6))
    assert torch.equal(y, torch.zeros(5, 4))
    (y - 1).square().sum().backward()
    assert made.up_ERO.grad.abs().sum() > 0


def test_initialisation_comes_from_the_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, same, other = (make(6, 4, 3, 2, seed=seed) for seed in (0, 0, 1))
    assert not torch.equal(one.down_EDR, other.down_EDR)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype, autocast):
    torch.manual_seed(3)
    made = make(32, 16, 4, 4).to(dtype)
    x, sequence = torch.randn(40, 32).to(dtype), torch.arange(40) % 3
    exact = make(32, 16, 4, 4)
    exact.load_state_dict(made.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = made(x, sequence)
    assert y.dtype == dtype
    rounding = 5e-2 if autocast or dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(y.double(), exact(x.double(), sequence), atol=rounding)
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in made.parameters())


@settings(deadline=None, max_examples=50)
@given(
    sequence=st.lists(st.integers(0, 3), max_size=8),
    experts=st.integers(1, 3),
    slots=st.integers(1, 2),
    rank=st.integers(1, 3),
    zero=st.booleans(),
)
def test_any_sequences(sequence, experts, slots, rank, zero):
    """Of any number of tokens, none included; a sequence gets what it gets alone."""
    made = make(4, 3, experts, rank, slots)
    x = (torch.zeros if zero else torch.randn)(len(sequence), 4, dtype=torch.float64)
    x.requires_grad_()
    y = made(x, torch.tensor(sequence, dtype=torch.long))
    assert close(y, reference(made, x.detach(), sequence))
    for number in set(sequence):
        of_it = torch.tensor(sequence) == number
        assert close(made(x[of_it]), y[of_it].detach())
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="`rank` must be from 1 to 4, .* but is"):
        LowRankExperts(6, 4, 2, rank)
