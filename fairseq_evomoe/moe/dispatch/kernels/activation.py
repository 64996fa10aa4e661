"""What is between an expert's products: the bias, the activation and the factor of a gated expert."""

from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import cdiv, launch, triton
from .sums import COLUMNS, ROWS, parts_of

ACTIVATIONS: Dict[Any, str] = {torch.relu: "relu", F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
"""The activation functions that the kernels know; GELU is the exact one."""


def activate(
    before_SM: Tensor,
    bias_EM: Optional[Tensor],
    end_E: Tensor,
    activation: str,
    factor_SM: Optional[Tensor] = None,
) -> Tensor:
    """``f(before + bias)``, times ``factor``, where there are any; with ReLU in place of ``before``."""
    out_SM = before_SM if activation == "relu" and factor_SM is None else torch.empty_like(before_SM)
    experts, columns = end_E.shape[0], before_SM.shape[1]
    parts = parts_of(experts)
    launch(
        _activate,
        (cdiv(columns, COLUMNS), experts * parts),
        (before_SM, bias_EM, factor_SM, end_E, out_SM),
        (columns, parts),
        (activation, bias_EM is not None, factor_SM is not None, ROWS, COLUMNS),
    )
    return out_SM


def activate_backward(
    grad_SM: Tensor,
    saved_SM: Tensor,
    bias_EM: Optional[Tensor],
    end_E: Tensor,
    activation: str,
    factor_SM: Optional[Tensor] = None,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """The gradients of `activate`.

    Args:
        grad_SM: gradient of its output; that of ``before`` is written in its place.
        saved_SM: ``before``; with ReLU in place, the output.
        bias_EM: as there.
        end_E: as there.
        activation: as there.
        factor_SM: as there.

    Returns:
        of ``before``, of the bias (its parts, for `sum_of_parts`) and of the factor, if there are any.
    """
    experts, columns = end_E.shape[0], grad_SM.shape[1]
    parts = parts_of(experts)
    sum_EPM = None
    if bias_EM is not None:
        sum_EPM = torch.empty(experts, parts, columns, dtype=torch.float32, device=grad_SM.device)
    factor_grad = None if factor_SM is None else torch.empty_like(grad_SM)
    launch(
        _activate_backward,
        (cdiv(columns, COLUMNS), experts * parts),
        (grad_SM, saved_SM, bias_EM, factor_SM, end_E, factor_grad, sum_EPM),
        (columns, parts),
        (activation, bias_EM is not None, factor_SM is not None, ROWS, COLUMNS),
    )
    return grad_SM, sum_EPM, factor_grad


if triton is not None:
    from triton import language as tl

    from .sums import part_of_rows

    @triton.jit
    def f(x, KIND: tl.constexpr):
        """The activation."""
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
        KIND: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        e, first, last = part_of_rows(end, parts)
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        b = tl.zeros([COLUMNS], tl.float32)
        if BIAS:
            b = tl.load(bias + e * columns + c, mask=c < columns, other=0).to(tl.float32)
        for i in range(first, last, ROWS):
            r = i + tl.arange(0, ROWS)
            inside = (r < last)[:, None] & (c < columns)[None, :]
            at = r.to(tl.int64)[:, None] * columns + c[None, :]
            y = f(tl.load(before + at, mask=inside, other=0).to(tl.float32) + b[None, :], KIND)
            if FACTOR:
                y *= tl.load(factor + at, mask=inside, other=0).to(tl.float32)
            tl.store(out + at, y, mask=inside)

    @triton.jit
    def _activate_backward(
        grad, saved, bias, factor, end, grad_factor, sums, columns, parts,
        KIND: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        e, first, last = part_of_rows(end, parts)
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        b = tl.zeros([COLUMNS], tl.float32)
        if BIAS:
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
                tl.store(grad_factor + at, g * f(x, KIND), mask=inside)
                g *= tl.load(factor + at, mask=inside, other=0).to(tl.float32)
            elif KIND != "relu":  # whose output is as good as its input
                x += b[None, :]
            g *= _slope(x, KIND)
            tl.store(grad + at, g, mask=inside)
            total += tl.sum(g, 0)  # 0 where the gradient is masked out
        if BIAS:
            tl.store(sums + tl.program_id(1).to(tl.int64) * columns + c, total, mask=c < columns)
