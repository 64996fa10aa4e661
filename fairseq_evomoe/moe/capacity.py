"""A limit to the tokens that an expert takes."""

from typing import Any, Optional

import torch
from torch import Tensor

from .ranks import ALONE, Ranks
from .routing import Routing, RoutingContext

CAPACITY = (
    "While training, an expert takes at most this many times its even share of a batch's tokens, and the "
    "overflow goes on by the residual connection alone; 0 drops nothing. Of a token's several experts all "
    "tokens' first ones have priority, as published; in a decoder, which must not see later tokens, all of "
    "an earlier token's."
)
EVAL_CAPACITY = (
    "The same in evaluation, where 0 drops nothing whatever moe-capacity-factor is; for encoders only, since "
    "in a decoder it would tell how many tokens come later."
)


def keep_pairs(routing: Routing, keep_N: Tensor) -> None:
    """Leave out the pairs for which ``keep_N`` (bool) is false, in place."""
    routing.token_N = routing.token_N[keep_N]
    routing.expert_N = routing.expert_N[keep_N]
    routing.weight_N = routing.weight_N[keep_N]


def limit_load(
    routing: Routing,
    factor: float,
    top_k: int = 1,
    ranks: Ranks = ALONE,
    causal: bool = False,
    tokens: Optional[int] = None,
) -> None:
    """Leave out, in place, the pairs for which their expert has no room (Switch, arXiv 2101.03961).

    An expert takes at most ``floor(factor * k * ceil(T / E))`` pairs of all ranks, as in fairseq's GShard and
    Switch: those with the best expert of their token first, then those with the second one,
    ..., each in the order of the ranks and their tokens.  So the first choice of a later token takes the room
    of the second one of an earlier token; with ``causal`` all choices of earlier tokens come first.
    ``routing.dropped`` tells how many were left out.

    Args:
        routing: all pairs, those with the best expert of each token first, then those with the second, ...
        factor: the capacity factor; 0: no limit.
        top_k: k, how many experts a token may have.
        ranks: those whose tokens compete for room.
        causal: whether no token may lose its expert to a later one.
        tokens: T; those of the routing if not given.
    """
    if factor <= 0 or (routing.expert_N.numel() == 0 and ranks.size == 1):
        return
    experts = routing.experts
    # those of a lower turn are served first, and within a turn those that are listed first
    turns = 1 if causal else top_k
    turn_N = torch.zeros_like(routing.token_N)
    order_N = torch.arange(len(turn_N), device=turn_N.device)
    if causal:
        order_N = torch.sort(routing.token_N, stable=True).indices
    else:
        turn_N = position(routing.token_N, max(routing.tokens, 1))
    key_N = turn_N * experts + routing.expert_N
    position_N = torch.empty_like(key_N)
    position_N[order_N] = position(key_N[order_N], turns * experts)

    # what comes before this rank's pairs of each turn and expert
    count_KE = torch.bincount(key_N, minlength=turns * experts)
    tokens_1 = torch.tensor([routing.tokens if tokens is None else tokens], device=count_KE.device)
    count_WK = ranks.gather_counts(torch.cat([count_KE, tokens_1]))
    count_WKE = count_WK[:, :-1].view(-1, turns, experts)
    count_KE = count_WKE.sum(0)
    before_KE = count_KE.cumsum(0) - count_KE + count_WKE[: ranks.rank].sum(0)

    even = torch.ceil(count_WK[:, -1].sum().double() / experts)
    capacity = torch.floor(factor * top_k * even)
    keep_N = position_N + before_KE[turn_N, routing.expert_N] < capacity
    routing.dropped = (~keep_N).sum()
    keep_pairs(routing, keep_N)


def drop_overflow(
    routing: Routing, options: Any, training: bool, context: RoutingContext, top_k: int = 1
) -> None:
    """Leave out, in place, what the options of a router say that an expert has no room for in this phase.

    Args:
        routing: see ``limit_load``.
        options: with ``capacity_factor`` and ``eval_capacity_factor``.
        training: whether the router is being trained.
        context: of the pass.
        top_k: k, how many experts a token may have.
    """
    factor = options.capacity_factor if training else options.eval_capacity_factor
    # how many tokens come to a later pass tells of later tokens, too: there, room is that for all of them
    tokens = context.part.rows if context.causal and context.part is not None else None
    limit_load(routing, factor, top_k, context.ranks, context.causal, tokens)


def position(expert_N: Tensor, experts: int) -> Tensor:
    """How many pairs of the same expert are listed before each pair: int64, shape (N,)."""
    sorted_N, order_N = torch.sort(expert_N, stable=True)
    count_E = torch.bincount(expert_N, minlength=experts)
    first_E = count_E.cumsum(0) - count_E
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device) - first_E[sorted_N]
    return position_N
