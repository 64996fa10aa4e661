"""Routers with a fixed number of experts a token ask a GPU for nothing: an answer waits for all before it."""

from contextlib import nullcontext

import pytest
import torch

from fairseq_evomoe.moe import RoutingContext, Vocabulary
from fairseq_evomoe.moe.routing import at_pairs, count_experts
from support.router_checks import make

V = 17


def route_and_go_back(name, device, hard=False):
    router = make(name, 6, 5, vocabulary=Vocabulary(V, torch.ones(V))).to(device).train()
    x_TD = torch.randn(40, 6, device=device, requires_grad=True)
    routing = router(
        x_TD, RoutingContext(token_T=torch.zeros(40, dtype=torch.long, device=device), hard=hard)
    )
    routing.report()
    total = routing.weight_N.sum() + sum(routing.losses.values())
    if total.requires_grad:
        total.backward()


@pytest.mark.parametrize(
    "name, hard",
    [(name, False) for name in ("switch", "topk", "hash", "laplace", "recurrent", "stable")]
    + [("dts", True)],
)
def test_a_step_needs_no_value(name, hard, monkeypatch):
    """Tensors of the device ``meta`` have none, so that whatever needs one fails."""
    monkeypatch.setattr(
        torch, "autocast", lambda **settings: nullcontext()
    )  # which does not know that device
    route_and_go_back(name, "meta", hard)


def test_a_step_with_any_number_of_experts_does(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda **settings: nullcontext())
    with pytest.raises(NotImplementedError, match="nonzero"):
        route_and_go_back("dts", "meta")


def test_values_at_pairs_are_those_of_an_index():
    torch.manual_seed(0)
    value_TE = torch.randn(7, 3).t().contiguous().t().requires_grad_()  # not in the order of its rows
    token_N, expert_N = (torch.rand(7, 3) < 0.5).nonzero(as_tuple=True)
    found = [at_pairs(value_TE, token_N, expert_N), value_TE[token_N, expert_N]]
    factor_N = torch.randn(len(token_N))
    grads = [torch.autograd.grad((values * factor_N).sum(), value_TE)[0] for values in found]
    assert torch.equal(*found) and torch.equal(*grads)


class LooksLikeAGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


def test_experts_are_counted_alike(monkeypatch):
    expert_N = torch.tensor([3, 0, 3, 3, 1, 5])
    expected = count_experts(expert_N, 7)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda end, device: arange(end))
    got = count_experts(expert_N.as_subclass(LooksLikeAGpu), 7)
    assert got.tolist() == expected.tolist() == [1, 1, 0, 3, 0, 1, 0] and got.dtype == expected.dtype
