"""Experts with random weights, and what they must compute, one pair at a time."""

import torch
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.evolution.spawn import Spawn
from fairseq_evomoe.moe import Experts, Hidden, MoELayer, Routing, record


def experts_of(widths, seed=0, gated=False, dim=5):
    torch.manual_seed(seed)
    experts = Experts(dim, widths, gated=gated).double()
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    return experts


def tensors_of(experts):
    return {name: p.detach() for name, p in experts.named_parameters(recurse=False)}


def make_experts(dim, widths, dtype=torch.float64, hidden=None):
    experts = Experts(dim, widths, hidden).to(dtype)
    for p in experts.parameters():
        nn.init.normal_(p)
    return experts


def slow_dispatch(x, routing, experts):
    """One pair at a time."""
    starts = [sum(experts.widths[:e]) for e in range(len(experts.widths))]
    y = [torch.zeros_like(x[0]) for _ in range(len(x))] if len(x) else []
    for t, e, w in zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N):
        rows = slice(starts[e], starts[e] + experts.widths[e])
        hidden = experts.hidden(experts.w1[rows] @ x[t] + experts.b1[rows])
        y[t] = y[t] + w * (experts.w2[rows].t() @ hidden + experts.b2[e])
    return torch.stack(y) if y else torch.zeros_like(x)


def random_routing(tokens, experts, density, dtype=torch.float64):
    mask = torch.rand(tokens, experts) < density
    token, expert = mask.nonzero(as_tuple=True)
    order = torch.randperm(len(token))
    weight = torch.rand(len(token), dtype=dtype)
    return Routing(token[order], expert[order], weight, tokens, experts)


def make_layer(seed=0, gated=False, router="topk", dim=6, widths=(8, 16, 24, 8), spawned=True, **options):
    """A layer with random weights in float64."""
    torch.manual_seed(seed)
    between = Hidden(F.silu if gated else torch.relu)
    options = {"spawner": Spawn(len(widths), method="copy"), "widths": widths, "gated": gated, **options}
    layer = MoELayer(dim, 8, len(widths), router, between=between, spawned=spawned, **options)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer.double()


def routed(layer, *args, **kwargs):
    """What a layer returns, and how it has routed."""
    with record() as routings:
        y = layer(*args, **kwargs)
    return y, routings[layer]
