"""A handful of pairs, as in generation: two launches, and nothing is sorted."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .launch import cdiv, launch, triton


def few_pairs(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    weights: Tuple[Tensor, Optional[Tensor], Tensor, Optional[Tensor], Optional[Tensor]],
    experts: int,
    activation: str,
) -> Tensor:
    """The weighted sum of the experts' outputs for a handful of pairs, as in generation, without gradients.

    Two launches, of which each reads the weights of each pair's expert once; nothing is sorted.

    Args:
        x_TD: tokens, shape (T, D).
        token_N: int64, token of each pair.
        expert_N: int64, its expert.
        weight_N: float32, its weight.
        weights: ``w1`` (E M, D), ``b1`` (E M,) or ``None``, ``w2`` (E M, D), ``b2`` (E, D) or ``None``, and
            ``w3`` or ``None``.
        experts: E.
        activation: ``relu``, ``gelu`` or ``silu``.

    Returns:
        shape (T, D), dtype of ``x_TD``; sums are in float32.
    """
    w1, b1, w2, b2, w3 = weights
    (tokens, dim), pairs, width = x_TD.shape, token_N.shape[0], w1.shape[0] // experts
    hidden_NM = torch.empty(pairs, width, dtype=torch.float32, device=x_TD.device)
    y_TD = torch.empty_like(x_TD)
    launch(
        _few_hidden,
        (pairs, cdiv(width, 16)),
        (x_TD, token_N, expert_N, w1, b1, w3, hidden_NM),
        (dim, width),
        (activation, b1 is not None, w3 is not None, 16, 256),
    )
    launch(
        _few_outputs,
        (tokens, cdiv(dim, 16)),
        (hidden_NM, token_N, expert_N, weight_N, w2, b2, y_TD),
        (pairs, dim, width),
        (b2 is not None, 256, 16),
    )
    return y_TD


if triton is not None:
    from triton import language as tl

    from .activation import f

    @triton.jit
    def _few_hidden(
        x, token, expert, w1, b1, w3, hidden, dim, width,
        KIND: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, UNITS: tl.constexpr,
        COLUMNS: tl.constexpr,
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
        y = tl.sum(total, 1)
        if BIAS:
            y += tl.load(b1 + unit, mask=of_expert, other=0).to(tl.float32)
        y = f(y, KIND)
        if FACTOR:
            y *= tl.sum(factor, 1)
        tl.store(hidden + n * width + m, y, mask=of_expert)

    @triton.jit
    def _few_outputs(
        hidden, token, expert, weight, w2, b2, y, pairs, dim, width,
        BIAS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr,
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
                out = tl.sum(total, 0)
                if BIAS:
                    out += tl.load(b2 + e * dim + d, mask=of_token, other=0).to(tl.float32)
                result += tl.load(weight + n).to(tl.float32) * out
        tl.store(y + t * dim + d, result, mask=of_token)
