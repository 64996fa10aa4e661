"""A limit to the tokens that an expert takes."""

import math

import torch
from torch import Tensor

from .routing import Routing


def keep_pairs(routing: Routing, keep_N: Tensor) -> None:
    """Leave out the pairs for which ``keep_N`` (bool) is false, in place."""
    routing.token_N = routing.token_N[keep_N]
    routing.expert_N = routing.expert_N[keep_N]
    routing.weight_N = routing.weight_N[keep_N]


def limit_load(routing: Routing, factor: float, top_k: int = 1) -> None:
    """Leave out, in place, the pairs for which their expert has no room (Switch, arXiv 2101.03961).

    An expert takes at most ``ceil(factor * k * T / E)`` pairs, in the order in which they are listed.
    ``routing.dropped`` tells how many were left out.

    Args:
        routing: all pairs.
        factor: the capacity factor; 0: no limit.
        top_k: k, how many experts a token may have.
    """
    if factor <= 0 or routing.expert_N.numel() == 0:
        return
    capacity = math.ceil(factor * top_k * routing.tokens / routing.experts)
    keep_N = place(routing.expert_N, routing.experts) < capacity
    routing.dropped = (~keep_N).sum()
    keep_pairs(routing, keep_N)


def place(expert_N: Tensor, experts: int) -> Tensor:
    """How many pairs of the same expert are listed before each pair: int64, shape (N,)."""
    sorted_N, order_N = torch.sort(expert_N, stable=True)
    count_E = torch.bincount(expert_N, minlength=experts)
    first_E = count_E.cumsum(0) - count_E
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device) - first_E[sorted_N]
    return place_N
