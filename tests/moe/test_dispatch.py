"""Each way to compute the experts against a loop over pairs in float64, and when it is taken."""

import pytest
import torch
from torch.nn import functional as F

from fairseq_evomoe.moe import Hidden, Routing, RoutingContext
from fairseq_evomoe.moe.dispatch import fused, memory
from fairseq_evomoe.moe.dispatch import local as module
from fairseq_evomoe.moe.dispatch.local import dispatch, grouped_experts
from fairseq_evomoe.moe.routers import DenseToSparseRouter
from support.dispatching import make_experts, routing_of, same, slow, with_gradients

has_grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch without grouped_mm")


@pytest.mark.parametrize("rows", [1, 6, 1024])
@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [2, 0, 5, 1], [0, 0, 4, 4], [7, 1, 1, 1]])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [torch.relu, F.gelu, F.silu])
def test_groups_of_experts_of_any_loads(rows, counts, activation, gated, monkeypatch):
    monkeypatch.setattr(fused, "ROWS", rows)
    torch.manual_seed(0)
    experts, routing = make_experts(5, [4] * 4, Hidden(activation), gated), routing_of(7, counts)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert module._can_fuse(x, experts)
    assert same(
        with_gradients(dispatch, x, routing, experts), with_gradients(slow, x, routing, experts), 1e-10
    )


def test_weights_without_gradient_cost_none(monkeypatch):
    torch.manual_seed(0)
    experts, routing = make_experts(5, [4] * 4), routing_of(7, [2, 0, 5, 1])
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    expected = with_gradients(dispatch, x, routing, experts)
    routing.weight_N = routing.weight_N.detach()
    monkeypatch.setattr(fused._Group, "dot_own", None)
    y = dispatch(x, routing, experts)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    got = torch.autograd.grad((y * direction).sum(), [x, *experts.parameters()])
    assert all(torch.equal(a, b) for a, b in zip([y, *got], expected[:2] + expected[3:]))


def test_a_rank_that_has_no_expert():
    experts = make_experts(5, [4, 4])
    experts.allocate([4, 4], local=[])
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y, *gradients = with_gradients(dispatch, x, routing_of(7, []), experts)
    assert torch.equal(y, torch.zeros_like(x)) and gradients[1].shape == (0,)
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


@has_grouped
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", [[3, 3, 3], [2, 0, 5], [0, 0, 0], [0, 7, 0]])
def test_grouped_products(gated, counts):
    torch.manual_seed(0)
    experts = make_experts(8, [16] * 3, Hidden(torch.tanh), gated, torch.float32)
    routing = routing_of(7, counts, torch.float32)
    x = torch.randn(7, 8, requires_grad=True)
    assert module._can_group(x, experts) and not module._can_fuse(x, experts)
    got = with_gradients(dispatch, x, routing, experts)
    wide = routing_of(7, counts)
    wide.token_N, wide.expert_N = routing.token_N, routing.expert_N
    wide.weight_N = routing.weight_N.detach().double().requires_grad_()
    expected = with_gradients(
        dispatch, x.detach().double().requires_grad_(), wide, experts.double()
    )  # float64 goes by autograd
    assert same(got, expected, 1e-4)


@has_grouped
@pytest.mark.parametrize(
    "dim, widths, dtype, grouped",
    [
        (8, [16, 16], torch.float32, True),
        (8, [16, 16], torch.bfloat16, True),
        (8, [16, 16], torch.float64, False),
        (8, [16, 8], torch.float32, False),
        (6, [16, 16], torch.float32, False),
        (4, [16, 16], torch.float32, True),
        (4, [16, 16], torch.bfloat16, False),
    ],
)
def test_when_products_are_grouped(dim, widths, dtype, grouped):
    x = torch.randn(3, dim, dtype=dtype)
    experts = make_experts(dim, widths, Hidden(torch.tanh), dtype=dtype)
    assert module._can_group(x, experts) == grouped
    routing = Routing(torch.tensor([0, 2]), torch.tensor([1, 0]), torch.ones(2), 3, 2)
    y = dispatch(x, routing, experts)
    assert y.shape == x.shape and y.dtype == dtype and y[1].abs().sum() == 0 and y[0].abs().sum() > 0


@has_grouped
def test_grouped_products_under_autocast():
    experts = make_experts(8, [16] * 2, Hidden(torch.tanh), dtype=torch.float32)
    x, expert_N = torch.randn(5, 8), torch.tensor([0, 0, 1, 1, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_experts(x, expert_N, experts)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), experts(x, [2, 3]), atol=0.2, rtol=0.05)


@pytest.mark.parametrize("pairs", [0, 1, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 0.2)])
def test_one_token_without_sorting(pairs, gated, dtype, tolerance, monkeypatch):
    torch.manual_seed(0)
    experts = make_experts(5, [3, 8, 1, 5], gated=gated)
    routing = Routing(
        torch.zeros(pairs, dtype=torch.long), torch.tensor([2, 0, 3])[:pairs], torch.rand(pairs), 1, 4
    )
    x = torch.randn(1, 5, dtype=torch.float64)
    expected = slow(x, routing, experts)
    monkeypatch.setattr(torch, "sort", None)
    with torch.no_grad():
        y = dispatch(x.to(dtype), routing, experts.to(dtype))
    assert y.dtype == dtype and torch.allclose(y.double(), expected, rtol=0.02, atol=tolerance)


def test_one_token_allocates_the_same_for_any_number_of_experts():
    def allocated(count):
        experts = make_experts(8, [16] * count, dtype=torch.float32)
        routing = Routing(torch.tensor([0]), torch.tensor([1]), torch.ones(1), 1, count)
        x = torch.randn(1, 8)
        with torch.no_grad():
            dispatch(x, routing, experts)  # what is set up once
            with torch.autograd.profiler.profile(profile_memory=True) as profile:
                dispatch(x, routing, experts)
        return sum(max(event.cpu_memory_usage, 0) for event in profile.function_events)

    few, many = allocated(2), allocated(64)
    assert few == many > 0


def test_statistics_are_left_out_only_on_request():
    router = DenseToSparseRouter(6, 4).eval()
    router.initialize(torch.Generator().manual_seed(0))
    x = torch.randn(5, 6)
    told, untold = (router(x, RoutingContext(statistics=s)) for s in (True, False))
    assert set(told.losses) == set(router.loss_weights) and told.gate_entropy > 0
    assert not untold.losses and untold.gate_entropy is None
    assert torch.equal(told.expert_N, untold.expert_N) and torch.equal(told.weight_N, untold.weight_N)


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="PyTorch without torch.compile")
@pytest.mark.parametrize("way", ["grouped", "segments"])
def test_experts_compile_into_one_graph(way):
    if way == "grouped" and not hasattr(F, "grouped_mm"):
        pytest.skip("PyTorch without grouped_mm")
    dtype = torch.bfloat16 if way == "grouped" else torch.float32
    experts = make_experts(8, [16] * 3, Hidden(torch.tanh), dtype=dtype)
    x, expert_N = torch.randn(6, 8, dtype=dtype), torch.tensor([0, 0, 1, 2, 2, 2])

    def compute(x):
        return grouped_experts(x, expert_N, experts) if way == "grouped" else experts(x, [2, 1, 3])

    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="eager")  # which needs no C++ compiler
    assert torch.allclose(compiled(x), compute(x), atol=1e-5)


def test_memory_is_used_again_once_the_last_tensor_in_it_is_gone(monkeypatch):
    monkeypatch.setattr(memory, "HUGE", 1)
    memory.release()
    like = torch.empty(0)
    first = memory.empty(30, 40, like=like, reuse=True)
    address, part = first.data_ptr(), first[3:5]
    del first
    second = memory.empty(30, 40, like=like, reuse=True)
    assert second.data_ptr() != address  # a view is still there
    del part
    assert memory.empty(40, 30, like=like, reuse=True).data_ptr() == address
    assert memory.empty(40, 30, like=like).data_ptr() != second.data_ptr()
    assert memory.empty(3, like=like.to(torch.bfloat16), reuse=True).fill_(2).tolist() == [2.0] * 3


def test_gradients_that_are_kept_are_not_overwritten(monkeypatch):
    monkeypatch.setattr(memory, "HUGE", 1)
    torch.manual_seed(0)
    experts, routing = make_experts(5, [4] * 4), routing_of(7, [2, 0, 5, 1])
    x = torch.randn(7, 5, dtype=torch.float64)
    dispatch(x, routing, experts).sum().backward()
    kept = [p.grad for p in experts.parameters()]
    values = [g.clone() for g in kept]
    experts.zero_grad(set_to_none=True)
    dispatch(2 * x, routing, experts).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, values))
    assert not torch.equal(kept[0], experts.w1.grad)
    doubled = [p.grad.clone() for p in experts.parameters()]
    dispatch(2 * x, routing, experts).sum().backward()  # adds up
    assert all(torch.allclose(p.grad, 2 * d) for p, d in zip(experts.parameters(), doubled))
