"""Experts of other kinds than EvoMoE's, each against its formula in float64, one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairseq_evomoe.evolution.sizes import expert_widths, size_ratios
from fairseq_evomoe.moe import Experts, Routing, RoutingContext
from fairseq_evomoe.moe.dispatch.local import dispatch
from fairseq_evomoe.moe.hyper_adapter import HyperAdapter
from fairseq_evomoe.moe.multi_head import MultiHead
from fairseq_evomoe.moe.mutual_distillation import dispatch_and_compare
from support.experts import make_layer, routed
from support.router_checks import close

DIM, EXPERTS = 6, 4


@pytest.mark.parametrize(
    "sizes, total, expected",
    [
        ("arithmetic", 32768, [2304, 2816, 3328, 3840, 4352, 4864, 5376, 5888]),  # HMoE-3B
        ("geometric", 8 * 255, [8, 16, 32, 64, 128, 256, 512, 1024]),
        ("hybrid", 1024, [64, 64, 64, 64, 128, 128, 256, 256]),
        ("uniform", 8 * 50, [50] * 8),
        ("1,1,2,2,3,3,4,4", 160, [8, 8, 16, 16, 24, 24, 32, 32]),
    ],
)
def test_widths_as_published(sizes, total, expected):
    assert expert_widths(size_ratios(sizes, 8), total) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.integers(0, 500))
def test_widths_sum_to_the_total(ratios, more):
    total = 8 * (len(ratios) + more)
    widths = expert_widths(ratios, total)
    assert sum(widths) == total
    if len(set(ratios)) > 1:
        assert all(width >= 8 and width % 8 == 0 for width in widths)
        # no wider expert for a smaller ratio
        pairs = sorted(zip(ratios, widths))
        assert all(a[1] <= b[1] for a, b in zip(pairs, pairs[1:]) if a[0] < b[0])


@pytest.mark.parametrize("sizes", ["", "1,2", "1,2,3,x", "1,2,3,0", "1,2,3,-1", "1,2,3,inf", "quadratic"])
def test_sizes_refused(sizes):
    with pytest.raises(ValueError, match="`expert_sizes` must be one of uniform.* or 4 numbers"):
        size_ratios(sizes, 4)
    with pytest.raises(ValueError, match="`total_ffn_dim` must be at least 32 for 4 experts"):
        expert_widths([1, 2, 3, 4], 20)


def expert(experts, e, x):
    """Output of one expert for one token, by the formula."""
    start = sum(experts.widths[:e])
    rows = slice(start, start + experts.widths[e])
    hidden = experts.w1[rows] @ x + experts.b1[rows]
    if experts.gated:
        hidden = hidden * torch.sigmoid(hidden) * (experts.w3[rows] @ x)  # SwiGLU
    else:
        hidden = hidden.clamp(min=0)
    return experts.w2[rows].t() @ hidden + experts.b2[e]


def pairs(routing):
    return list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist()))


def slow(x, routing, experts):
    rows = [torch.zeros_like(x_t) for x_t in x]
    for t, e, w in pairs(routing):
        rows[t] = rows[t] + w * expert(experts, e, x[t])
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [False, True])
def test_experts_of_different_widths(gated):
    layer = make_layer(gated=gated)
    x = torch.randn(9, DIM, dtype=torch.float64)
    y, routing = routed(layer, x)
    assert layer.experts.widths == [8, 16, 24, 8]
    assert close(y, slow(x, routing, layer.experts))
    each = [width * (DIM * (3 if gated else 2) + 1) + DIM for width in (8, 16, 24, 8)]
    assert layer.experts.parameters_of_each() == each
    assert sum(each) == sum(p.numel() for p in layer.experts.parameters())


def test_gated_gradients():
    layer = make_layer(gated=True, dim=3, widths=(8, 8))
    routing = Routing(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), torch.rand(3).double(), 2, 2)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.experts.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: dispatch(x, routing, layer.experts), inputs)


def test_shared_expert_is_always_on():
    layer = make_layer(shared_expert=True)
    x = torch.randn(9, DIM, dtype=torch.float64)
    y, routing = routed(layer, x)
    shared = torch.stack([expert(layer.shared, 0, x_t) for x_t in x])
    assert close(y, slow(x, routing, layer.experts) + shared)


def test_shared_expert_starts_as_the_base_expert():
    layer = make_layer(widths=(8, 8), spawned=False, shared_expert=True)
    x = torch.randn(9, DIM, dtype=torch.float64)
    before = layer(x, RoutingContext())
    layer.spawn()
    assert close(layer.shared(x, [9]), before)
    # top-2 of two copies, renormalised, and the shared one
    assert close(layer(x, RoutingContext()), 2 * before)
    assert {name for name, _ in layer.named_parameters()} > {"shared.w1", "shared.b2"}


@pytest.mark.parametrize("spawned", [False, True])
def test_heads(spawned):
    layer = make_layer(widths=(8, 8, 8), heads=2, spawned=spawned)
    heads = layer.heads
    x = torch.randn(5, 2, DIM, dtype=torch.float64)
    mask = torch.tensor([[False, False], [False, True], [False, False], [True, True], [False, False]])
    y, routing = routed(layer, x, padding_mask=mask)
    kept = x[~mask]
    subs = torch.stack([part for x_t in kept for part in (heads.head(x_t)[:3], heads.head(x_t)[3:])])
    if spawned:
        assert routing.tokens == 2 * len(kept)
        out = slow(subs, routing, layer.experts)
        assert (y[mask] == 0).all()
    else:
        out = torch.stack([expert(layer.experts, 0, sub) for sub in subs])
    expected = torch.stack([heads.merge(torch.cat(list(out[i : i + 2]))) for i in range(0, len(out), 2)])
    assert close(y[~mask], expected)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="`heads` must divide the width 6"):
        MultiHead(6, 4)


def test_heads_tell_the_router_what_each_sub_token_is():
    layer = make_layer(widths=(8, 8), heads=2)
    seen = []
    layer.router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    x = torch.randn(2, 2, DIM, dtype=torch.float64)
    tokens, sequences = torch.tensor([[7, 8], [9, 10]]), torch.tensor([[0, 1], [0, 1]])
    layer(x, RoutingContext(), torch.tensor([[False, True], [False, False]]), tokens, sequences)
    assert seen[0].token_T.tolist() == [7, 7, 9, 9, 10, 10]
    assert seen[0].sequence_T.tolist() == [0, 0, 0, 0, 1, 1]


def test_mutual_distillation():
    layer = make_layer()
    x = torch.randn(9, DIM, dtype=torch.float64)
    routing = layer.router(x, RoutingContext())
    y, loss = dispatch_and_compare(x, routing, layer.experts)
    assert close(y, dispatch(x, routing, layer.experts))
    squares = []
    for t in range(9):
        outputs = [expert(layer.experts, e, x[t]) for token, e, _ in pairs(routing) if token == t]
        mean = sum(outputs) / len(outputs)
        squares += [(output - mean).square() for output in outputs]
    assert close(loss, torch.stack(squares).mean())
    layer.loss_weights["mutual_distillation"] = 0.1
    together, routing = routed(layer, x)
    assert close(together, y)
    assert close(routing.losses["mutual_distillation"], loss)


def test_mutual_distillation_by_hand():
    """Two experts that give 1 and 3 to token 0, and 5 to token 1 by one of them: (1 + 1 + 0) / 3."""
    experts = Experts(1, [8, 8]).double()
    with torch.no_grad():
        for p in experts.parameters():
            p.zero_()
        experts.b2.copy_(torch.tensor([[1.0], [3.0]]))
    routing = Routing(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.ones(3).double(), 2, 2)
    y, loss = dispatch_and_compare(torch.zeros(2, 1).double(), routing, experts)
    assert y.tolist() == [[4.0], [3.0]] and loss.item() == pytest.approx(2 / 3)


def test_hyper_adapter():
    shared = {}
    adapters = [HyperAdapter(DIM, EXPERTS, shared) for _ in range(2)]
    assert adapters[0].network is adapters[1].network
    for adapter in adapters:
        adapter.initialize(torch.Generator().manual_seed(0))
    x = torch.randn(9, DIM, dtype=torch.float64)
    layer = make_layer()
    routing = layer.router(x, RoutingContext())
    adapter = adapters[1].double()
    assert (adapter(x, routing) == 0).all()  # until the hypernetwork has learned
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.3)
    network = adapter.network
    for t, y_t in enumerate(adapter(x, routing)):
        chosen = {e for token, e, _ in pairs(routing) if token == t}
        unselected = sum(adapter.expert_embedding[e] for e in range(EXPERTS) if e not in chosen)
        inner = network.inner(torch.cat([unselected, adapter.layer_embedding])).clamp(min=0)
        down, up = (part(inner).view(64, DIM) for part in (network.down, network.up))
        assert close(y_t, up.t() @ (down @ x[t]).clamp(min=0))


def test_hyper_adapter_in_a_layer():
    layer = make_layer(hyper_adapter=True)
    plain = make_layer()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "hyper" not in k})
    x = torch.randn(9, DIM, dtype=torch.float64)
    y, routing = routed(layer, x)
    added = y - plain(x)
    assert added.abs().max() > 0.1
    assert close(added, layer.hyper_adapter(x, routing))


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 5),
    router=st.sampled_from(["topk", "switch", "dts"]),
    gated=st.booleans(),
    shared=st.booleans(),
    all_padding=st.booleans(),
    same=st.booleans(),
)
def test_any_shape(count, router, gated, shared, all_padding, same):
    weights = {} if router == "switch" else {"mutual_distillation": 1, "penalty": 1}
    layer = make_layer(
        gated=gated, router=router, shared_expert=shared, hyper_adapter=True, loss_weights=weights
    )
    x = torch.ones(count, 2, DIM, dtype=torch.float64)
    x = x if same else x * torch.randn_like(x)
    mask = torch.full((count, 2), all_padding)
    y, routing = routed(layer, x.requires_grad_(), padding_mask=mask)
    assert y.shape == x.shape and torch.isfinite(y).all()
    assert routing.tokens == (0 if all_padding else 2 * count)
    if all_padding:
        assert (y == 0).all()
    (y.sum() + sum(routing.losses.values())).backward()
    grads = [p.grad for p in layer.experts.parameters()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
