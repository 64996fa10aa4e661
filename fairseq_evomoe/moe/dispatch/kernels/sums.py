"""Sums of rows in float32: over a token's experts, with weights and biases, and over an expert's rows."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .launch import cdiv, launch, power_of_2, triton
from .pairs import Pairs

_PROGRAMS = 128  # parts into which the rows of all experts are cut, about; each sums up its own
_CHUNK = 1024  # columns that one program takes at a time
_LIST = 16  # pairs of a token that are looked at together
ROWS, COLUMNS = 32, 128  # of a tile of rows


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
    block = min(power_of_2(dim), _CHUNK)
    tensors = row_SD, weight_N, bias_ED, pairs.expert_N, pairs.row_N, pairs.list_N
    launch(
        _add_up,
        (tokens, cdiv(dim, block)),
        (*tensors, pairs.start_T, pairs.count_T, y_TD),
        (dim,),
        (weight_N is not None, bias_ED is not None, block, _LIST),
    )
    return y_TD


def spread(
    grad_TD: Tensor,
    pairs: Pairs,
    row_SD: Tensor,
    weight_N: Tensor,
    bias_ED: Optional[Tensor],
    of_weight: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    """The gradients of `add_up`, but for that of the bias: of the rows, and of the weights if wanted."""
    rows, dim = row_SD.shape
    grad_SD = torch.empty_like(row_SD)
    grad_N = torch.empty_like(weight_N) if of_weight else None
    block = min(power_of_2(dim), _CHUNK)
    tensors = grad_TD, row_SD, weight_N, bias_ED, pairs.expert_N, pairs.pair_S, pairs.token_S
    launch(_spread, (rows, 1), (*tensors, grad_SD, grad_N), (dim,), (of_weight, bias_ED is not None, block))
    return grad_SD, grad_N


def parts_of(experts: int) -> int:
    """Into how many parts the rows of each expert are cut."""
    return max(_PROGRAMS // experts, 1)


def sums_of_rows(row_SD: Tensor, end_E: Tensor) -> Tensor:
    """The sums of the parts of each expert's rows, for `sum_of_parts`: float32, shape (E, P, D)."""
    experts, columns = end_E.shape[0], row_SD.shape[1]
    parts = parts_of(experts)
    sum_EPD = torch.empty(experts, parts, columns, dtype=torch.float32, device=row_SD.device)
    grid = cdiv(columns, COLUMNS), experts * parts
    launch(_sums_of_rows, grid, (row_SD, end_E, sum_EPD), (columns, parts), (ROWS, COLUMNS))
    return sum_EPD


def sum_of_parts(sum_EPD: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the parts of each expert, rounded once: shape (E, D)."""
    experts, parts, columns = sum_EPD.shape
    total_ED = torch.empty(experts, columns, dtype=dtype, device=sum_EPD.device)
    grid = cdiv(columns, COLUMNS), experts
    launch(_sum_of_parts, grid, (sum_EPD, total_ED), (columns, parts), (COLUMNS,))
    return total_ED


if triton is not None:
    from triton import language as tl

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
        OF_WEIGHT: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr,
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
                if BIAS:
                    out += tl.load(bias + e * dim + d, mask=inside, other=0).to(tl.float32)
                dot += g * out
            tl.store(grad_rows + s * dim + d, g * w, mask=inside)
        if OF_WEIGHT:
            tl.store(grad_weight + n, tl.sum(dot, 0))

    @triton.jit
    def part_of_rows(end, parts):
        """The part of an expert's rows that is this program's: expert, first row, end."""
        p = tl.program_id(1)
        e = p // parts
        low = tl.load(end + e - 1, mask=e > 0, other=0)
        high = tl.load(end + e)
        size = (high - low + parts - 1) // parts
        first = low + (p % parts) * size
        return e, first, tl.minimum(first + size, high)

    @triton.jit
    def _sums_of_rows(rows, end, sums, columns, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        e, first, last = part_of_rows(end, parts)
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([COLUMNS], tl.float32)
        for i in range(first, last, ROWS):
            r = i + tl.arange(0, ROWS)
            inside = (r < last)[:, None] & (c < columns)[None, :]
            at = r.to(tl.int64)[:, None] * columns + c[None, :]
            total += tl.sum(tl.load(rows + at, mask=inside, other=0).to(tl.float32), 0)
        tl.store(sums + tl.program_id(1).to(tl.int64) * columns + c, total, mask=c < columns)

    @triton.jit
    def _sum_of_parts(sums, out, columns, parts, COLUMNS: tl.constexpr):
        e = tl.program_id(1).to(tl.int64)
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([COLUMNS], tl.float32)
        for i in range(parts):
            total += tl.load(sums + (e * parts + i) * columns + c, mask=c < columns, other=0)
        tl.store(out + e * columns + c, total, mask=c < columns)
