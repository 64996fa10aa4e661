"""The kernels of a GPU in Triton's interpreter, against other ways and a loop over pairs in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.moe import Hidden, Routing
from fairseq_evomoe.moe.dispatch import grouped, kernels
from fairseq_evomoe.moe.dispatch import local as module
from fairseq_evomoe.moe.dispatch.kernels import launch, sums
from fairseq_evomoe.moe.dispatch.local import dispatch
from support.dispatching import make_experts, routing_of, same, slow, with_gradients

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch without grouped_mm"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels themselves"),
]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Kernels that run on the CPU (``conftest.py`` tells Triton so), and no other way for the experts."""
    monkeypatch.setattr(kernels, "usable", lambda x: launch.triton is not None)
    monkeypatch.setattr(module, "_can_fuse", lambda x, experts: False)
    monkeypatch.setattr(sums, "_PROGRAMS", 6)  # the interpreter takes a millisecond for each operation
    return monkeypatch


@pytest.fixture(params=[(), ("one_function",)], ids=["measured", "one_function"])
def way(request, monkeypatch):
    """The ways through the kernels; candidates are equal to what has been measured."""
    monkeypatch.setattr(module, "candidates", set(request.param))
    if request.param:
        monkeypatch.setattr(grouped, "sum_of_experts", None)


def exact(x, routing, experts):
    """Values and gradients in float64, one pair at a time."""
    wide = Routing(**{**vars(routing), "weight_N": routing.weight_N.detach().double().requires_grad_()})
    return with_gradients(slow, x.detach().double().requires_grad_(), wide, experts.double())


COUNTS = [[3, 3, 3], [2, 0, 5], [0, 7, 0], [130, 0, 70]]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [torch.relu, F.gelu, F.silu])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_values_and_gradients(counts, activation, gated, way):
    torch.manual_seed(0)
    tokens = max(counts)
    experts = make_experts(8, [16] * 3, Hidden(activation), gated, torch.float32)
    routing = routing_of(tokens + 1, counts, torch.float32)  # a token without experts
    x = torch.randn(tokens + 1, 8, requires_grad=True)
    assert module._can_use_kernels(x, routing.token_N, experts)
    got = with_gradients(dispatch, x, routing, experts)
    assert same(got, exact(x, routing, experts), 1e-3)


@pytest.mark.parametrize("hidden", [Hidden(torch.tanh), Hidden(norm=nn.LayerNorm(16))], ids=["tanh", "norm"])
def test_what_the_kernels_do_not_know_is_between_products(hidden, interpreter):
    torch.manual_seed(0)
    experts = make_experts(8, [16] * 3, hidden, dtype=torch.float32)
    routing, x = routing_of(7, [2, 0, 5], torch.float32), torch.randn(7, 8, requires_grad=True)
    assert module._can_use_kernels(x, routing.token_N, experts)
    assert same(with_gradients(dispatch, x, routing, experts), exact(x, routing, experts), 1e-3)


@pytest.mark.parametrize("missing", ["x", "weight", "experts"])
def test_gradients_that_nobody_wants(missing, way):
    torch.manual_seed(0)
    experts = make_experts(8, [16] * 2, dtype=torch.float32)
    routing, x = routing_of(5, [3, 4], torch.float32), torch.randn(5, 8, requires_grad=True)
    whole = with_gradients(dispatch, x, routing, experts)
    names = ["y", "x", "weight"] + ["experts"] * 4
    x.requires_grad_(missing != "x")
    routing.weight_N.requires_grad_(missing != "weight")
    experts.requires_grad_(missing != "experts")
    inputs = [p for p in (x, routing.weight_N, *experts.parameters()) if p.requires_grad]
    y = dispatch(x, routing, experts)
    direction = torch.linspace(-1, 1, y.numel()).view_as(y)
    got = [y, *torch.autograd.grad((y * direction).sum(), inputs)]
    expected = [tensor for name, tensor in zip(names, whole) if name != missing]
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_bfloat16_is_as_exact_as_by_the_other_way(interpreter, way):
    """But for the interpreter, which cuts bits off where a GPU rounds."""
    torch.manual_seed(0)
    experts = make_experts(32, [64] * 4, dtype=torch.float32)
    routing, x = routing_of(60, [60, 20, 0, 40], torch.float32), torch.randn(60, 32)
    experts.bfloat16().float()  # the same numbers in both
    expected = [tensor.detach() for tensor in exact(x.bfloat16().float(), routing, experts)]
    experts.bfloat16()
    errors = []
    for without in (set(), {"kernels"}):
        interpreter.setattr(module, "without", without)
        got = with_gradients(dispatch, x.bfloat16().requires_grad_(), routing, experts)
        got = [tensor.detach() for tensor in got]
        assert [tensor.dtype for tensor in got[:2]] == [torch.bfloat16] * 2
        pairs = zip(got, expected)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in pairs])
    assert all(ours < 2 * other for ours, other in zip(*errors)), errors
    assert max(errors[0]) < 0.02


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [torch.relu, F.gelu, F.silu])
@pytest.mark.parametrize("tokens, counts", [(1, [0, 1, 0]), (3, [2, 0, 3])])
def test_few_pairs_without_gradients(tokens, counts, activation, gated, interpreter):
    torch.manual_seed(0)
    experts = make_experts(8, [16] * 3, Hidden(activation), gated, torch.float32)
    routing, x = routing_of(tokens, counts, torch.float32), torch.randn(tokens, 8)
    interpreter.setattr(kernels, "sort_pairs", None)
    with torch.no_grad():
        got = dispatch(x, routing, experts)
        assert torch.allclose(got.double(), slow(x.double(), routing, experts.double()), atol=1e-4)


@pytest.mark.parametrize("tokens, pairs, experts", [(1, 1, 1), (5, 300, 3), (400, 1000, 70), (1000, 129, 2)])
def test_pairs_are_sorted(tokens, pairs, experts):
    torch.manual_seed(0)
    token, expert = torch.randint(tokens, (pairs,)), torch.randint(experts, (pairs,))
    found = kernels.sort_pairs(token, expert, tokens, experts)
    order = torch.sort(expert, stable=True).indices
    assert found.pair_S.tolist() == order.tolist() and found.token_S.tolist() == token[order].tolist()
    assert torch.equal(found.row_N[order], torch.arange(pairs, dtype=torch.int32))
    assert torch.equal(found.end_E, torch.bincount(expert, minlength=experts).cumsum(0).int())
    starts, counts = found.start_T.tolist(), found.count_T.tolist()
    lists = [sorted(found.list_N[i : i + n].tolist()) for i, n in zip(starts, counts)]
    assert lists == [(token == t).nonzero().flatten().tolist() for t in range(tokens)]


def test_a_sum_does_not_depend_on_the_order_of_a_tokens_list():
    torch.manual_seed(0)
    token, expert = torch.zeros(40, dtype=torch.long), torch.arange(40) % 4
    pairs = kernels.sort_pairs(token, expert, 1, 4)
    rows, weight = torch.randn(40, 8) * 10.0 ** torch.randint(-4, 5, (40, 1)), torch.rand(40)
    sums = []
    for _ in range(3):
        shuffled = pairs._replace(list_N=pairs.list_N[torch.randperm(40)].contiguous())
        sums.append(kernels.add_up(rows, shuffled, torch.float32, weight))
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_autocast(way):
    torch.manual_seed(0)
    experts = make_experts(8, [16] * 3, dtype=torch.float32)
    routing, x = routing_of(7, [2, 0, 5], torch.float32), torch.randn(7, 8, requires_grad=True)

    def under_autocast(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return dispatch(*args)

    got = with_gradients(under_autocast, x, routing, experts)
    assert {tensor.dtype for tensor in got} == {torch.float32}
    for ours, theirs in zip(got, exact(x, routing, experts)):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_when_the_kernels_are_not_used(interpreter):
    experts, x = make_experts(8, [16] * 2, dtype=torch.float32), torch.randn(3, 8)
    one, none = torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    assert module._can_use_kernels(x, one, experts)
    assert not module._can_use_kernels(x, none, experts)
    assert not module._can_use_kernels(x.double(), one, experts.double())
    experts.float()
    interpreter.setattr(module, "without", {"kernels"})
    assert not module._can_use_kernels(x, one, experts) and module._can_group(x, experts)
    interpreter.setattr(module, "without", {"grouped"})
    assert not module._can_group(x, experts)
    interpreter.setattr(module, "without", set())
    interpreter.setattr(launch, "triton", None)
    assert not module._can_use_kernels(x, one, experts)
