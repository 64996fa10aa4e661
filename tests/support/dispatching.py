"""Random experts and routings, and what dispatch must compute, one pair at a time."""

import torch
from torch import nn

from fairseq_evomoe.moe import Experts, Routing


def make_experts(dim, widths, hidden=None, gated=False, dtype=torch.float64):
    experts = Experts(dim, widths, hidden, gated).to(dtype)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.5)
    return experts


def slow(x, routing, experts):
    """One pair at a time."""
    starts = [sum(experts.widths[:e]) for e in range(len(experts.widths))]
    y = [torch.zeros_like(x[0]) for _ in x]
    for t, e, w in zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N):
        units = slice(starts[e], starts[e] + experts.widths[e])
        factor = None if experts.w3 is None else experts.w3[units] @ x[t]
        hidden = experts.hidden(experts.w1[units] @ x[t] + experts.b1[units], factor)
        y[t] = y[t] + w * (experts.w2[units].t() @ hidden + experts.b2[e])
    return torch.stack(y)


def routing_of(tokens, counts, dtype=torch.float64):
    """So many pairs for each expert, of random tokens, in random order."""
    expert = torch.tensor([e for e, n in enumerate(counts) for _ in range(n)], dtype=torch.long)
    order = torch.randperm(len(expert))
    token = torch.cat([torch.empty(0, dtype=torch.long)] + [torch.randperm(tokens)[:n] for n in counts])
    weight = torch.rand(len(expert), dtype=dtype, requires_grad=True)
    return Routing(token[order], expert[order], weight, tokens, len(counts))


def with_gradients(function, x, routing, experts):
    y = function(x, routing, experts)
    inputs = [x, routing.weight_N, *experts.parameters()]
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * direction).sum(), inputs)]


def same(a, b, tolerance):
    return all(torch.allclose(x.double(), y.double(), rtol=0, atol=tolerance) for x, y in zip(a, b))
