"""A limit to the tokens that an expert takes."""

import torch
from torch import Tensor

from .ranks import ALONE, Ranks
from .routing import Routing


def keep_pairs(routing: Routing, keep_N: Tensor) -> None:
    """Leave out the pairs for which ``keep_N`` (bool) is false, in place."""
    routing.token_N = routing.token_N[keep_N]
    routing.expert_N = routing.expert_N[keep_N]
    routing.weight_N = routing.weight_N[keep_N]


def limit_load(routing: Routing, factor: float, top_k: int = 1, ranks: Ranks = ALONE) -> None:
    """Leave out, in place, the pairs for which their expert has no room (Switch, arXiv 2101.03961).

    An expert takes at most ``floor(factor * k * ceil(T / E))`` pairs of all ranks, as in fairseq's GShard and
    Switch: those with the best expert of their token first, then those with the second one,
    ..., each in the order of the ranks and their tokens.
    ``routing.dropped`` tells how many were left out.

    Args:
        routing: all pairs, those with the best expert of each token first, then those with the second, ...
        factor: the capacity factor; 0: no limit.
        top_k: k, how many experts a token may have.
        ranks: those whose tokens compete for room.
    """
    if factor <= 0 or (routing.expert_N.numel() == 0 and ranks.size == 1):
        return
    experts = routing.experts
    choice_N = position(routing.token_N, max(routing.tokens, 1))
    position_N = position(choice_N * experts + routing.expert_N, top_k * experts)

    # what comes before this rank's pairs of each choice and expert
    count_KE = torch.bincount(choice_N * experts + routing.expert_N, minlength=top_k * experts)
    tokens = torch.tensor([routing.tokens], device=count_KE.device)
    count_WK = ranks.gather_counts(torch.cat([count_KE, tokens]))
    count_WKE = count_WK[:, :-1].view(-1, top_k, experts)
    count_KE = count_WKE.sum(0)
    before_KE = count_KE.cumsum(0) - count_KE + count_WKE[: ranks.rank].sum(0)

    even = torch.ceil(count_WK[:, -1].sum().double() / experts)
    capacity = torch.floor(factor * top_k * even)
    keep_N = position_N + before_KE[choice_N, routing.expert_N] < capacity
    routing.dropped = (~keep_N).sum()
    keep_pairs(routing, keep_N)


def position(expert_N: Tensor, experts: int) -> Tensor:
    """How many pairs of the same expert are listed before each pair: int64, shape (N,)."""
    sorted_N, order_N = torch.sort(expert_N, stable=True)
    count_E = torch.bincount(expert_N, minlength=experts)
    first_E = count_E.cumsum(0) - count_E
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device) - first_E[sorted_N]
    return position_N
