"""Triton kernels around the experts' products: sort pairs, add biases and activate, weigh and add up.

What a grouped product cannot do by itself, in as few launches and passes over the memory as there can be.  No
sum depends on the order in which a GPU's threads run, so that results are the same on every run.  Where
Triton or the GPU is missing, `usable` says so, and `dispatch.py` goes another way.

Suffixes: see ``routing.py``; besides, M hidden units of one expert (all have as many), ``_S`` of what is
sorted by expert.
"""

from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton
    from triton import language as tl
except ImportError:  # no kernels
    triton = None

ACTIVATIONS: Dict[Any, str] = {torch.relu: "relu", F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
"""The activation functions that the kernels know; GELU is the exact one."""

_PAIRS = 128  # pairs that one program sorts
_ROWS, _COLUMNS = 32, 128  # of a tile of hidden units
_PROGRAMS = 128  # parts into which the rows of all experts are cut, about; each sums up its own
_CHUNK = 1024  # columns that one program takes at a time
_LIST = 16  # pairs of a token that are looked at together


def usable(x: Tensor) -> bool:
    """Whether the kernels run where ``x`` is: on a GPU, with Triton, and not while PyTorch compiles."""
    if triton is None or x.device.type != "cuda" or not hasattr(torch, "compiler"):  # PyTorch before 2.1
        return False
    return not torch.compiler.is_compiling()


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
    pairs, blocks = token_N.shape[0], triton.cdiv(token_N.shape[0], _PAIRS)
    like = {"dtype": torch.int32, "device": token_N.device}
    # how many pairs of each expert are in each block, expert by expert, and how many pairs a token has
    count = torch.zeros(experts * blocks + tokens, **like)
    slot_N, row_N, pair_S, token_S, list_N = torch.empty(5, pairs, **like)
    end_E, start_T = torch.empty(experts, **like), torch.empty(tokens, **like)
    _count[(blocks,)](token_N, expert_N, count, slot_N, pairs, blocks, experts * blocks, _PAIRS)
    total = count.cumsum(0, dtype=torch.int32)
    _place[(max(blocks, triton.cdiv(tokens, _PAIRS)),)](
        *(token_N, expert_N, count, total, slot_N, row_N, pair_S, token_S, list_N, end_E, start_T),
        *(pairs, blocks, tokens, experts, _PAIRS, triton.next_power_of_2(experts)),
    )
    return Pairs(
        *(token_N, expert_N, end_E, row_N, pair_S, token_S, list_N, start_T, count[experts * blocks :])
    )


def add_up(
    row_SD: Tensor,
    pairs: Pairs,
    dtype: torch.dtype,
    weight_N: Optional[Tensor] = None,
    bias_ED: Optional[Tensor] = None,
) -> Tensor:
    """The sum of each token's rows, each plus its expert's bias and times its weight, in float32 within.

    Args:
        row_SD: rows sorted by expert, shape (N, D).
        pairs: what `sort_pairs` has found.
        dtype: of the result.
        weight_N: float32, in the order of the routing; ``None``: 1.
        bias_ED: shape (E, D); ``None``: 0.

    Returns:
        shape (T, D); 0 for a token without pairs.
    """
    tokens, dim = pairs.count_T.shape[0], row_SD.shape[1]
    y_TD = torch.empty(tokens, dim, dtype=dtype, device=row_SD.device)
    block = min(triton.next_power_of_2(dim), _CHUNK)
    _add_up[(tokens, triton.cdiv(dim, block))](
        *(row_SD, weight_N, bias_ED, pairs.expert_N, pairs.row_N, pairs.list_N),
        *(pairs.start_T, pairs.count_T, y_TD, dim),
        *(weight_N is not None, bias_ED is not None, block, _LIST),
    )
    return y_TD


def spread(
    grad_TD: Tensor, pairs: Pairs, row_SD: Tensor, weight_N: Tensor, bias_ED: Tensor, of_weight: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    """The gradients of `add_up`, but for that of the bias: of the rows, and of the weights if wanted."""
    rows, dim = row_SD.shape
    grad_SD = torch.empty_like(row_SD)
    grad_N = torch.empty_like(weight_N) if of_weight else None
    block = min(triton.next_power_of_2(dim), _CHUNK)
    _spread[(rows,)](
        *(grad_TD, row_SD, weight_N, bias_ED, pairs.expert_N, pairs.pair_S, pairs.token_S),
        *(grad_SD, grad_N, dim, of_weight, block),
    )
    return grad_SD, grad_N


def activate(
    before_SM: Tensor, bias_EM: Tensor, end_E: Tensor, activation: str, factor_SM: Optional[Tensor] = None
) -> Tensor:
    """``f(before + bias)``, times ``factor`` if given; with ReLU in place of ``before``."""
    out_SM = before_SM if activation == "relu" and factor_SM is None else torch.empty_like(before_SM)
    experts, columns = bias_EM.shape
    parts = max(_PROGRAMS // experts, 1)
    _activate[(triton.cdiv(columns, _COLUMNS), experts * parts)](
        *(before_SM, bias_EM, factor_SM, end_E, out_SM, columns, parts),
        *(activation, factor_SM is not None, _ROWS, _COLUMNS),
    )
    return out_SM


def activate_backward(
    grad_SM: Tensor,
    saved_SM: Tensor,
    bias_EM: Tensor,
    end_E: Tensor,
    activation: str,
    factor_SM: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """The gradients of `activate`.

    Args:
        grad_SM: gradient of its output; that of ``before`` is written in its place.
        saved_SM: ``before``; with ReLU in place, the output.
        bias_EM: as there.
        end_E: as there.
        activation: as there.
        factor_SM: as there.

    Returns:
        of ``before``, of the bias and, if there is one, of the factor.
    """
    experts, columns = bias_EM.shape
    parts = max(_PROGRAMS // experts, 1)
    sum_PM = torch.empty(experts, parts, columns, dtype=torch.float32, device=grad_SM.device)
    factor_grad = None if factor_SM is None else torch.empty_like(grad_SM)
    _activate_backward[(triton.cdiv(columns, _COLUMNS), experts * parts)](
        *(grad_SM, saved_SM, bias_EM, factor_SM, end_E, factor_grad, sum_PM, columns, parts),
        *(activation, factor_SM is not None, _ROWS, _COLUMNS),
    )
    return grad_SM, sum_PM.sum(1).to(bias_EM.dtype), factor_grad


def sum_of_rows(row_SD: Tensor, end_E: Tensor) -> Tensor:
    """The sum of each expert's rows: float32, shape (E, D)."""
    experts, columns = end_E.shape[0], row_SD.shape[1]
    parts = max(_PROGRAMS // experts, 1)
    sum_PD = torch.empty(experts, parts, columns, dtype=torch.float32, device=row_SD.device)
    _sum_of_rows[(triton.cdiv(columns, _COLUMNS), experts * parts)](
        row_SD, end_E, sum_PD, columns, parts, _ROWS, _COLUMNS
    )
    return sum_PD.sum(1)


def few_pairs(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    weights: Tuple[Tensor, Tensor, Tensor, Tensor, Optional[Tensor]],
    activation: str,
) -> Tensor:
    """The weighted sum of the experts' outputs for a handful of pairs, as in generation, without gradients.

    Two launches, of which each reads the weights of each pair's expert once; nothing is sorted.

    Args:
        x_TD: tokens, shape (T, D).
        token_N: int64, token of each pair.
        expert_N: int64, its expert.
        weight_N: float32, its weight.
        weights: ``w1`` (E M, D), ``b1`` (E M,), ``w2`` (E M, D), ``b2`` (E, D) and ``w3`` or ``None``.
        activation: ``relu``, ``gelu`` or ``silu``.

    Returns:
        shape (T, D), dtype of ``x_TD``; sums are in float32.
    """
    w1, b1, w2, b2, w3 = weights
    (tokens, dim), pairs, width = x_TD.shape, token_N.shape[0], w1.shape[0] // b2.shape[0]
    hidden_NM = torch.empty(pairs, width, dtype=torch.float32, device=x_TD.device)
    y_TD = torch.empty_like(x_TD)
    _few_hidden[(pairs, triton.cdiv(width, 16))](
        x_TD, token_N, expert_N, w1, b1, w3, hidden_NM, dim, width, activation, w3 is not None, 16, 256
    )
    _few_outputs[(tokens, triton.cdiv(dim, 16))](
        hidden_NM, token_N, expert_N, weight_N, w2, b2, y_TD, pairs, dim, width, 256, 16
    )
    return y_TD


if triton is not None:

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

    @triton.jit
    def _add_up(
        rows, weight, bias, expert, row, listed, start, count, y, dim,
        WEIGHT: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, LIST: tl.constexpr,
    ):  # fmt: skip
        """A token's rows in the order of its pairs in the routing, whatever the order of its list."""
        t = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = d < dim
        begin, number = tl.load(start + t), tl.load(count + t)
        total = tl.zeros([COLUMNS], tl.float32)
        last = -1
        for _ in range(number):
            n = 2147483647
            for i in range(0, number, LIST):
                j = i + tl.arange(0, LIST)
                m = tl.load(listed + begin + j, mask=j < number, other=-1)
                n = tl.minimum(n, tl.min(tl.where(m > last, m, 2147483647), 0))
            last = n
            part = tl.load(rows + tl.load(row + n).to(tl.int64) * dim + d, mask=inside, other=0)
            part = part.to(tl.float32)
            if BIAS:
                part += tl.load(bias + tl.load(expert + n) * dim + d, mask=inside, other=0).to(tl.float32)
            if WEIGHT:
                part *= tl.load(weight + n)
            total += part
        tl.store(y + t * dim + d, total, mask=inside)

    @triton.jit
    def _spread(
        grad, rows, weight, bias, expert, pair, token, grad_rows, grad_weight, dim,
        OF_WEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """A row's gradient: that of its token times its weight; the weight's: both rows' product."""
        s = tl.program_id(0).to(tl.int64)
        n, t = tl.load(pair + s), tl.load(token + s).to(tl.int64)
        w = tl.load(weight + n)
        e = tl.load(expert + n)
        dot = tl.zeros([COLUMNS], tl.float32)
        for i in range(0, dim, COLUMNS):
            d = i + tl.arange(0, COLUMNS)
            inside = d < dim
            g = tl.load(grad + t * dim + d, mask=inside, other=0).to(tl.float32)
            if OF_WEIGHT:
                out = tl.load(rows + s * dim + d, mask=inside, other=0).to(tl.float32)
                out += tl.load(bias + e * dim + d, mask=inside, other=0).to(tl.float32)
                dot += g * out
            tl.store(grad_rows + s * dim + d, g * w, mask=inside)
        if OF_WEIGHT:
            tl.store(grad_weight + n, tl.sum(dot, 0))

    @triton.jit
    def _part(end, parts):
        """The part of an expert's rows that is this program's: expert, first row, end."""
        p = tl.program_id(1)
        e = p // parts
        low = tl.load(end + e - 1, mask=e > 0, other=0)
        high = tl.load(end + e)
        size = (high - low + parts - 1) // parts
        first = low + (p % parts) * size
        return e, first, tl.minimum(first + size, high)

    @triton.jit
    def _f(x, KIND: tl.constexpr):
        if KIND == "relu":
            y = tl.maximum(x, 0.0)
        elif KIND == "gelu":
            y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        else:
            y = x / (1.0 + tl.exp(-x))
        return y

    @triton.jit
    def _slope(x, KIND: tl.constexpr):
        if KIND == "relu":
            y = tl.where(x > 0, 1.0, 0.0)
        elif KIND == "gelu":
            y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        else:
            s = 1.0 / (1.0 + tl.exp(-x))
            y = s * (1.0 + x * (1.0 - s))
        return y

    @triton.jit
    def _activate(
        before, bias, factor, end, out, columns, parts,
        KIND: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        e, first, last = _part(end, parts)
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        b = tl.load(bias + e * columns + c, mask=c < columns, other=0).to(tl.float32)
        for i in range(first, last, ROWS):
            r = i + tl.arange(0, ROWS)
            inside = (r < last)[:, None] & (c < columns)[None, :]
            at = r.to(tl.int64)[:, None] * columns + c[None, :]
            y = _f(tl.load(before + at, mask=inside, other=0).to(tl.float32) + b[None, :], KIND)
            if FACTOR:
                y *= tl.load(factor + at, mask=inside, other=0).to(tl.float32)
            tl.store(out + at, y, mask=inside)

    @triton.jit
    def _activate_backward(
        grad, saved, bias, factor, end, grad_factor, sums, columns, parts,
        KIND: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        e, first, last = _part(end, parts)
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        b = tl.load(bias + e * columns + c, mask=c < columns, other=0).to(tl.float32)
        total = tl.zeros([COLUMNS], tl.float32)
        for i in range(first, last, ROWS):
            r = i + tl.arange(0, ROWS)
            inside = (r < last)[:, None] & (c < columns)[None, :]
            at = r.to(tl.int64)[:, None] * columns + c[None, :]
            g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
            x = tl.load(saved + at, mask=inside, other=0).to(tl.float32)
            if FACTOR:
                x += b[None, :]
                tl.store(grad_factor + at, g * _f(x, KIND), mask=inside)
                g *= tl.load(factor + at, mask=inside, other=0).to(tl.float32)
            elif KIND != "relu":  # whose output is as good as its input
                x += b[None, :]
            g *= _slope(x, KIND)
            tl.store(grad + at, g, mask=inside)
            total += tl.sum(g, 0)  # 0 where the gradient is masked out
        tl.store(sums + tl.program_id(1).to(tl.int64) * columns + c, total, mask=c < columns)

    @triton.jit
    def _sum_of_rows(rows, end, sums, columns, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        e, first, last = _part(end, parts)
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([COLUMNS], tl.float32)
        for i in range(first, last, ROWS):
            r = i + tl.arange(0, ROWS)
            inside = (r < last)[:, None] & (c < columns)[None, :]
            at = r.to(tl.int64)[:, None] * columns + c[None, :]
            total += tl.sum(tl.load(rows + at, mask=inside, other=0).to(tl.float32), 0)
        tl.store(sums + tl.program_id(1).to(tl.int64) * columns + c, total, mask=c < columns)

    @triton.jit
    def _few_hidden(
        x, token, expert, w1, b1, w3, hidden, dim, width,
        KIND: tl.constexpr, FACTOR: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0)
        t, e = tl.load(token + n), tl.load(expert + n)
        m = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        of_expert = m < width
        unit = e * width + m
        total = tl.zeros([UNITS, COLUMNS], tl.float32)
        factor = tl.zeros([UNITS, COLUMNS], tl.float32)
        for i in range(0, dim, COLUMNS):
            d = i + tl.arange(0, COLUMNS)
            inside = of_expert[:, None] & (d < dim)[None, :]
            at = unit[:, None] * dim + d[None, :]
            row = tl.load(x + t * dim + d, mask=d < dim, other=0).to(tl.float32)
            total += tl.load(w1 + at, mask=inside, other=0).to(tl.float32) * row[None, :]
            if FACTOR:
                factor += tl.load(w3 + at, mask=inside, other=0).to(tl.float32) * row[None, :]
        y = tl.sum(total, 1) + tl.load(b1 + unit, mask=of_expert, other=0).to(tl.float32)
        y = _f(y, KIND)
        if FACTOR:
            y *= tl.sum(factor, 1)
        tl.store(hidden + n * width + m, y, mask=of_expert)

    @triton.jit
    def _few_outputs(
        hidden, token, expert, weight, w2, b2, y, pairs, dim, width,
        UNITS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0)
        d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        of_token = d < dim
        result = tl.zeros([COLUMNS], tl.float32)
        for n in range(pairs):
            if tl.load(token + n) == t:
                e = tl.load(expert + n)
                total = tl.zeros([UNITS, COLUMNS], tl.float32)
                for i in range(0, width, UNITS):
                    m = i + tl.arange(0, UNITS)
                    inside = (m < width)[:, None] & of_token[None, :]
                    at = (e * width + m)[:, None] * dim + d[None, :]
                    unit = tl.load(hidden + n * width + m, mask=m < width, other=0)
                    total += tl.load(w2 + at, mask=inside, other=0).to(tl.float32) * unit[:, None]
                out = tl.sum(total, 0) + tl.load(b2 + e * dim + d, mask=of_token, other=0).to(tl.float32)
                result += tl.load(weight + n).to(tl.float32) * out
        tl.store(y + t * dim + d, result, mask=of_token)
