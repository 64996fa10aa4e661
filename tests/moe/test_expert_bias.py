"""Experts without biases: those with biases that are 0 and stay so, in each way to compute them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.evolution.spawn import Spawn, SpawnMethod
from fairseq_evomoe.moe import Experts, Hidden, MoELayer, Routing
from fairseq_evomoe.moe.dispatch import kernels
from fairseq_evomoe.moe.dispatch import local as module
from fairseq_evomoe.moe.dispatch.kernels import launch, sums
from fairseq_evomoe.moe.dispatch.local import dispatch
from fairseq_evomoe.moe.loading import StateMismatch
from support.dispatching import routing_of, same


def twins(hidden, gated, dtype, widths=(16, 16, 16)):
    """Experts without biases, and the same ones with biases that are 0."""
    bare, full = (Experts(8, widths, Hidden(hidden), gated, bias).to(dtype) for bias in (False, True))
    for name in ("w1", "w2", "w3")[: 3 if gated else 2]:
        nn.init.normal_(getattr(bare, name), std=0.5)
    full.fill(bare.tensors())
    return bare, full


def values_and_gradients(x, routing, experts):
    y = dispatch(x, routing, experts)
    inputs = [x, routing.weight_N, *(p for name, p in experts.named_parameters() if name[0] == "w")]
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y)).sum(), inputs)]


def interpreted(monkeypatch):
    """The kernels of a GPU, in Triton's interpreter."""
    pytest.importorskip("triton")
    if not hasattr(F, "grouped_mm") or torch.cuda.is_available():
        pytest.skip("no grouped products, or a GPU, where test_gpu.py runs the kernels")
    monkeypatch.setattr(kernels, "usable", lambda x: launch.triton is not None)
    monkeypatch.setattr(module, "_can_fuse", lambda x, experts: False)
    monkeypatch.setattr(sums, "_PROGRAMS", 6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", ["fused", "grouped", "loop", "kernels", "one_function"])
def test_values_and_gradients_are_those_of_biases_of_zero(way, gated, monkeypatch):
    torch.manual_seed(0)
    if way == "grouped" and not hasattr(F, "grouped_mm"):
        pytest.skip("PyTorch without grouped_mm")
    if way in ("kernels", "one_function"):
        interpreted(monkeypatch)
        monkeypatch.setattr(module, "candidates", {way} - {"kernels"})
    hidden = torch.tanh if way in ("grouped", "loop") else F.silu
    dtype = torch.float64 if way in ("fused", "loop") else torch.float32
    bare, full = twins(hidden, gated, dtype)
    routing, x = routing_of(7, [2, 0, 5], dtype), torch.randn(7, 8, dtype=dtype, requires_grad=True)
    if way != "loop":
        assert module._can_fuse(x, bare) == (way == "fused") and (
            way == "fused" or module._can_group(x, bare)
        )
    got, expected = (values_and_gradients(x, routing, experts) for experts in (bare, full))
    assert same(got, expected, 1e-10 if dtype == torch.float64 else 1e-5)
    assert expected[0].abs().sum() > 0 and not (bare.b1.requires_grad or bare.b2.requires_grad)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 3], ids=["cpu", "kernels"])
def test_few_pairs_as_in_generation(tokens, gated, monkeypatch):
    torch.manual_seed(0)
    if tokens > 1:
        interpreted(monkeypatch)
        monkeypatch.setattr(kernels, "sort_pairs", None)
    monkeypatch.setattr(torch, "sort", None)
    bare, full = twins(F.silu, gated, torch.float32)
    token, expert = torch.tensor([0, tokens - 1]), torch.tensor([2, 0])
    routing, x = Routing(token, expert, torch.rand(2), tokens, 3), torch.randn(tokens, 8)
    with torch.no_grad():
        assert torch.allclose(dispatch(x, routing, bare), dispatch(x, routing, full), atol=1e-5)


def layer_of(method="copy", experts=4, **options):
    torch.manual_seed(0)
    widths = [4] * experts if method == "split" else [16] * experts
    spawner = Spawn(experts, method=SpawnMethod(method), widths=widths)
    return MoELayer(8, 16, experts, "topk", spawner=spawner, widths=widths, bias=False, **options)


@pytest.mark.parametrize("method", list(SpawnMethod))
def test_a_spawn_makes_none(method):
    layer = layer_of(method.value, shared_expert=True).train()
    for _ in range(3):
        layer(torch.randn(64, 8))  # what cluster and slice measure
    layer.spawn()
    for experts in (layer.experts, layer.shared):
        for bias in (experts.b1, experts.b2):
            assert not bias.requires_grad and not bias.any()
        assert experts.w1.requires_grad and experts.w1.any()
    layer(torch.randn(9, 8)).sum().backward()
    assert layer.experts.b1.grad is None and layer.shared.b2.grad is None
    counted = sum(p.numel() for p in layer.experts.parameters() if p.requires_grad)
    assert sum(layer.experts.parameters_of_each()) == counted


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_biases_of_a_state_are_not_left_out_in_silence(name):
    layer = layer_of()
    state = layer.state_dict()
    layer.load_state_dict(state)
    state[f"experts.{name}"] = torch.ones_like(state[f"experts.{name}"])
    with pytest.raises(
        StateMismatch, match="have biases, and with `expert_bias` none there are none"
    ) as error:
        layer.load_state_dict(state)
    assert error.value.option == "expert_bias"


def test_a_layer_with_biases_takes_the_state_of_one_without():
    bare = layer_of()
    full = MoELayer(8, 16, 4, "topk")
    full.load_state_dict(bare.state_dict())
    x = torch.randn(5, 8)
    assert torch.allclose(bare(x), full(x), atol=1e-6) and full.experts.b1.requires_grad
