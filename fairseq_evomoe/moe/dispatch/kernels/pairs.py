"""The pairs of a routing in the order of their experts, and those of each token: a counting sort."""

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import cdiv, launch, power_of_2, triton

_PAIRS = 128  # pairs that one program sorts


class Pairs(NamedTuple):
    """The pairs of a routing, found by expert and by token.

    Attributes:
        token_N, expert_N: int64, as in the routing.
        end_E: int32, where each expert's rows end among those sorted by expert.
        row_N: int32, where each pair's row is among them.
        pair_S: int32, pair of each row.
        token_S: int32, token of each row.
        list_N: int32, the pairs of one token after another; within a token in any order.
        start_T: int32, where each token's pairs begin in ``list_N``.
        count_T: int32, how many each token has.
    """

    token_N: Tensor
    expert_N: Tensor
    end_E: Tensor
    row_N: Tensor
    pair_S: Tensor
    token_S: Tensor
    list_N: Tensor
    start_T: Tensor
    count_T: Tensor


def sort_pairs(token_N: Tensor, expert_N: Tensor, tokens: int, experts: int) -> Pairs:
    """Sort pairs by expert, stably, and list those of each token: a counting sort, three passes over them.

    Args:
        token_N: int64, token of each pair; at least one pair.
        expert_N: int64, expert of each pair.
        tokens: T.
        experts: E.
    """
    pairs, blocks = token_N.shape[0], cdiv(token_N.shape[0], _PAIRS)
    like = {"dtype": torch.int32, "device": token_N.device}
    # how many pairs of each expert are in each block, expert by expert, and how many pairs a token has
    count = torch.zeros(experts * blocks + tokens, **like)
    slot_N, row_N, pair_S, token_S, list_N = torch.empty(5, pairs, **like)
    end_E, start_T = torch.empty(experts, **like), torch.empty(tokens, **like)
    tensors = token_N, expert_N, count, slot_N
    launch(_count, (blocks, 1), tensors, (pairs, blocks, experts * blocks), (_PAIRS,))
    total = count.cumsum(0, dtype=torch.int32)
    launch(
        _place,
        (max(blocks, cdiv(tokens, _PAIRS)), 1),
        (token_N, expert_N, count, total, slot_N, row_N, pair_S, token_S, list_N, end_E, start_T),
        (pairs, blocks, tokens, experts),
        (_PAIRS, power_of_2(experts)),
    )
    return Pairs(
        *(token_N, expert_N, end_E, row_N, pair_S, token_S, list_N, start_T, count[experts * blocks :])
    )


if triton is not None:
    from triton import language as tl

    @triton.jit
    def _count(token, expert, count, slot, pairs, blocks, first, PAIRS: tl.constexpr):
        """Count each block's pairs by expert and all pairs by token; a slot for each pair in its token."""
        block = tl.program_id(0)
        n = block * PAIRS + tl.arange(0, PAIRS)
        here = n < pairs
        e = tl.load(expert + n, mask=here, other=-1).to(tl.int32)
        t = tl.load(token + n, mask=here, other=0)
        i = tl.arange(0, PAIRS)
        same = e[:, None] == e[None, :]
        later = tl.sum((same & (i[None, :] > i[:, None])).to(tl.int32), 1)
        number = tl.sum(same.to(tl.int32), 1)
        # the last one of each expert writes for all
        tl.store(count + e.to(tl.int64) * blocks + block, number, mask=here & (later == 0))
        tl.store(slot + n, tl.atomic_add(count + first + t, 1, mask=here), mask=here)

    @triton.jit
    def _place(
        token, expert, count, total, slot, row, pair, token_of, listed, end, start,
        pairs, blocks, tokens, experts, PAIRS: tl.constexpr, EXPERTS: tl.constexpr,
    ):  # fmt: skip
        """Where each pair belongs; ``total`` are the running totals of ``count``."""
        block = tl.program_id(0)
        first = experts * blocks
        i = tl.arange(0, PAIRS)
        n = block * PAIRS + i
        t = n
        of_token = t < tokens
        own = tl.load(count + first + t, mask=of_token, other=0)
        tl.store(start + t, tl.load(total + first + t, mask=of_token, other=0) - own - pairs, mask=of_token)
        if block == 0:
            e = tl.arange(0, EXPERTS)
            ends = tl.load(total + (e + 1).to(tl.int64) * blocks - 1, mask=e < experts, other=0)
            tl.store(end + e, ends, mask=e < experts)
        here = n < pairs
        e = tl.load(expert + n, mask=here, other=-1).to(tl.int32)
        t = tl.load(token + n, mask=here, other=0)
        earlier = tl.sum(((e[:, None] == e[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
        place = e.to(tl.int64) * blocks + block
        base = tl.load(total + place, mask=here, other=0) - tl.load(count + place, mask=here, other=0)
        at = base + earlier
        tl.store(row + n, at, mask=here)
        tl.store(pair + at, n, mask=here)
        tl.store(token_of + at, t.to(tl.int32), mask=here)
        begin = tl.load(total + first + t, mask=here, other=0) - tl.load(
            count + first + t, mask=here, other=0
        )
        tl.store(listed + begin - pairs + tl.load(slot + n, mask=here, other=0), n, mask=here)
