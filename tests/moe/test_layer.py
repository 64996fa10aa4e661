"""The MoE layer against a loop over tokens and experts in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.evolution.spawn import Spawn
from fairseq_evomoe.moe import Experts, Hidden, MoELayer, Routing, RoutingContext, record
from fairseq_evomoe.moe.dispatch import local as dispatch_module
from fairseq_evomoe.moe.dispatch.local import dispatch
from support.experts import make_experts, random_routing, routed, slow_dispatch


def make_layer(dim=6, width=10, experts=4, spawned=True, method="noise", **options):
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(dim, width), nn.Linear(width, dim)
    spawner = Spawn(experts, method=method, strength=None)

    def initialize(experts, index):
        experts.set_expert(index, fc1, fc2)

    layer = MoELayer(dim, width, experts, "dts", spawner=spawner, initialize=initialize, **options)
    if spawned:
        layer.spawn()
    return layer, fc1, fc2


@pytest.fixture(params=["fused", "autograd"])
def path(request, monkeypatch):
    """Each of the ways to compute the experts."""
    monkeypatch.setattr(dispatch_module, "_can_fuse", lambda x, e: request.param == "fused")


@pytest.mark.parametrize("widths", [[8], [8, 8, 8], [3, 8, 1, 5]])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", [torch.relu, F.gelu])
def test_dispatch_equals_a_loop_over_pairs(path, widths, density, activation):
    torch.manual_seed(1)
    experts = make_experts(5, widths, hidden=Hidden(activation))
    routing = random_routing(17, len(widths), density)
    routing.weight_N.requires_grad_()
    x = torch.randn(17, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, routing.weight_N, *experts.parameters()]
    direction = torch.randn(17, 5, dtype=torch.float64)
    results = []
    for function in (dispatch, slow_dispatch):
        y = function(x, routing, experts)
        grads = (
            torch.autograd.grad((y * direction).sum(), inputs, allow_unused=True) if y.requires_grad else []
        )
        results.append((y, [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs)]))
    (y, grads), (expected, expected_grads) = results
    assert torch.allclose(y, expected, rtol=0, atol=1e-10)
    for got, want in zip(grads, expected_grads):
        assert torch.allclose(got, want, rtol=0, atol=1e-10)


def test_a_permutation_worked_by_hand():
    """Tokens 10, 20, 30; experts times 1 and times 100: token 0 to both, 1 to the second, 2 to none."""
    experts = Experts(1, [1, 1])
    with torch.no_grad():
        experts.w1.copy_(torch.tensor([[1.0], [100.0]]))
        experts.w2.fill_(1.0)
        experts.b1.zero_()
        experts.b2.zero_()
    routing = Routing(
        token_N=torch.tensor([1, 0, 0]),
        expert_N=torch.tensor([1, 1, 0]),
        weight_N=torch.tensor([1.0, 0.5, 0.25]),
        tokens=3,
        experts=2,
    )
    y = dispatch(torch.tensor([[10.0], [20.0], [30.0]]), routing, experts)
    assert y.flatten().tolist() == [0.25 * 10 + 0.5 * 1000, 2000.0, 0.0]


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(0, 12),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
def test_dispatch_on_random_shapes(tokens, widths, density, seed):
    torch.manual_seed(seed)
    experts = make_experts(3, widths)
    routing = random_routing(tokens, len(widths), density)
    x = torch.randn(tokens, 3, dtype=torch.float64)
    expected = slow_dispatch(x, routing, experts)
    assert torch.allclose(dispatch(x, routing, experts), expected, rtol=0, atol=1e-10)


def test_what_is_more_than_an_activation_is_left_to_autograd():
    x = torch.randn(3, 4)
    dropout = nn.Dropout(0.5)
    for hidden, fused in (
        (Hidden(), True),
        (Hidden(F.gelu), True),
        (Hidden(torch.tanh), False),
        (Hidden(norm=nn.LayerNorm(4)), False),
        (Hidden(dropout=dropout.train()), False),
    ):
        assert dispatch_module._can_fuse(x, Experts(4, [4], hidden)) == fused
    assert dispatch_module._can_fuse(x, Experts(4, [4], Hidden(dropout=nn.Dropout(0.5).eval())))


def test_large_gradients_are_the_same_on_huge_pages(monkeypatch):
    from fairseq_evomoe.moe.dispatch import memory

    layer, _, _ = make_layer(dim=8, width=16)
    x = torch.randn(40, 8)
    grads = []
    for size in (memory.HUGE, 1):
        monkeypatch.setattr(memory, "HUGE", size)
        layer.zero_grad()
        layer.eval()(x, RoutingContext()).sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_layer_gradcheck(path):
    layer, _, _ = make_layer(dim=3, width=4, experts=3, eval_routing="adaptive")
    layer = layer.double().eval()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, RoutingContext(temperature=0.5)), (x, *parameters))


def test_before_the_growth_it_is_the_dense_layer():
    layer, fc1, fc2 = make_layer(spawned=False)
    x = torch.randn(7, 3, 6)
    y, routing = routed(layer, x)
    assert torch.allclose(y, fc2(torch.relu(fc1(x))), atol=1e-6)
    dense = sum(p.numel() for p in [*fc1.parameters(), *fc2.parameters()])
    assert sum(p.numel() for p in layer.parameters()) == dense
    assert routing.tokens == 21 and routing.load_E().tolist() == [21.0]


def test_copies_with_a_dense_gate_compute_what_the_base_computed():
    layer, fc1, fc2 = make_layer(method="copy")
    layer.train()
    x = torch.randn(50, 6)
    y, routing = routed(layer, x, RoutingContext(temperature=1e4))
    assert routing.token_N.shape[0] == 50 * 4
    assert torch.allclose(y, fc2(torch.relu(fc1(x))), atol=1e-5)


def test_padding_is_neither_routed_nor_counted():
    layer, _, _ = make_layer()
    layer.eval()
    x = torch.randn(2, 5, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    y, routing = routed(layer, x, RoutingContext(), mask)
    assert routing.tokens == 8 and routing.token_N.shape[0] == 8
    assert (y[mask] == 0).all()
    alone = layer(x[0, :3], RoutingContext())
    assert torch.allclose(y[0, :3], alone, atol=1e-6)
    _, routing = routed(layer, x, RoutingContext(), torch.ones(2, 5, dtype=torch.bool))
    assert routing.tokens == 0


def test_all_padding_still_gives_every_parameter_a_gradient():
    """A parameter without gradient would stop DistributedDataParallel."""
    layer, _, _ = make_layer()
    mask = torch.ones(2, 3, dtype=torch.bool)
    y, routing = routed(layer.train(), torch.randn(2, 3, 6), padding_mask=mask)
    (y.sum() + routing.losses["balance"]).backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_token_does_not_depend_on_the_others(batch):
    layer, _, _ = make_layer(dim=32, width=64, experts=8)
    layer.eval()
    x = torch.randn(batch, 32)
    together = layer(x, RoutingContext())
    alone = torch.cat([layer(row.unsqueeze(0), RoutingContext()) for row in x])
    assert torch.allclose(together, alone, atol=1e-6)


def test_low_precision_keeps_its_dtype():
    layer, _, _ = make_layer()
    y = layer.to(torch.bfloat16)(torch.randn(4, 6, dtype=torch.bfloat16), RoutingContext())
    assert y.dtype == torch.bfloat16


def test_states_load_across_the_growth():
    spawned, _, _ = make_layer()
    single, fc1, _ = make_layer(spawned=False)

    before = make_layer(spawned=False)[0]
    before.load_state_dict(spawned.state_dict())
    assert before.spawned and torch.equal(before.experts.w2, spawned.experts.w2)
    assert torch.equal(before.router.weight, spawned.router.weight)

    after = make_layer(method="copy")[0]
    after.load_state_dict(single.state_dict())
    assert torch.equal(after.experts.w1, torch.cat([fc1.weight] * 4))

    with pytest.raises(ValueError, match="has 4 experts in the layer, but `experts` is 8"):
        make_layer(experts=8)[0].load_state_dict(spawned.state_dict())


def test_parameters_have_one_order_however_the_layer_grew():
    spawned, _, _ = make_layer()
    loaded = make_layer(spawned=False)[0]
    loaded.load_state_dict(spawned.state_dict())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in spawned.named_parameters()]


def test_a_layer_that_was_used_can_be_copied():
    layer, _, _ = make_layer()
    x = torch.randn(3, 6)
    with record() as routings:
        y = layer.eval()(x)
        assert torch.equal(copy.deepcopy(layer)(x), y)
    assert len(routings) == 2 and y.requires_grad


def test_unused_experts_get_zero_gradients():
    experts = make_experts(3, [4, 4])
    routing = Routing(torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]), 1, 2)
    dispatch(torch.randn(1, 3, dtype=torch.float64), routing, experts).sum().backward()
    assert (experts.w1.grad[:4] == 0).all() and (experts.w1.grad[4:] != 0).any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_autocast_gives_the_dtype_of_the_tokens(heads, padded):
    layer = MoELayer(8, 16, 4, "switch", spawned=True, heads=heads)
    x, mask = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 2] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, padding_mask=mask if padded else None)
    assert y.dtype == torch.float32 and (y[0, 2] == 0).all() == padded
