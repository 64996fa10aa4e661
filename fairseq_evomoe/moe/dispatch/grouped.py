"""Experts of one width on a GPU: grouped products with `kernels` before, between and after them.

For N pairs, D and M the widths of a token and of an expert, a layer reads and writes beside the products: the
gathered tokens (2 N D numbers), the activation (2 N M, 3 N M backward), the weighted sum (N D + T D) and its
gradient (3 N D).  Between the first pass and the last no number is rounded to less than what the products
give; sums over a token's experts are in float32.
"""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import kernels
from .kernels import Pairs


def sum_of_experts(
    x_TD: Tensor,
    pairs: Pairs,
    weight_N: Tensor,
    bias_ED: Optional[Tensor],
    rows: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """``y_t = sum over pairs n of t of weight_n * (rows(x)_n + bias_expert_n)``.

    Args:
        x_TD: tokens, shape (T, D).
        pairs: the routing, sorted.
        weight_N: float32, weight of each pair.
        bias_ED: what is added to each expert's outputs; ``None``: nothing.
        rows: the experts without it, from and to rows sorted by expert.
        dtype: of the result.
    """
    return _AddUp.apply(rows(_Gather.apply(x_TD, pairs)), weight_N, bias_ED, pairs, dtype)


def products(
    x_SD: Tensor,
    w1_EMD: Tensor,
    b1_EM: Optional[Tensor],
    w2_EMD: Tensor,
    w3_EMD: Optional[Tensor],
    end_E: Tensor,
    activation: str,
) -> Tensor:
    """``W2_e f(W1_e x + b1_e)``, or ``W2_e (f(W1_e x + b1_e) * W3_e x)``, for rows sorted by expert.

    Args:
        x_SD: rows, shape (N, D).
        w1_EMD: weights, in the rows' dtype.
        b1_EM: bias, in any dtype; ``None``: there is none.
        w2_EMD: as ``w1_EMD``.
        w3_EMD: as ``w1_EMD``; ``None``: the experts are not gated.
        end_E: int32, where each expert's rows end.
        activation: ``relu``, ``gelu`` or ``silu``.

    Returns:
        shape (N, D), dtype of ``x_SD``.
    """
    return _Products.apply(x_SD, w1_EMD, b1_EM, w2_EMD, w3_EMD, end_E, activation)


class _Gather(torch.autograd.Function):
    """Each pair's token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return x_TD.index_select(0, pairs.token_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> Tuple[Optional[Tensor], ...]:
        return kernels.add_up(grad_SD.contiguous(), ctx.pairs, grad_SD.dtype), None


class _AddUp(torch.autograd.Function):
    """The weighted sum of each token's rows, biases included."""

    @staticmethod
    def forward(
        ctx: Any,
        row_SD: Tensor,
        weight_N: Tensor,
        bias_ED: Optional[Tensor],
        pairs: Pairs,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(row_SD if ctx.needs_input_grad[1] else row_SD[:0], weight_N, bias_ED)
        ctx.like = row_SD.shape, row_SD.dtype
        return kernels.add_up(row_SD, pairs, dtype, weight_N, bias_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> Tuple[Optional[Tensor], ...]:
        row_SD, weight_N, bias_ED = ctx.saved_tensors
        _, of_weight, of_bias, _, _ = ctx.needs_input_grad
        if not of_weight:  # only their shape is needed, and the empty tensor has not kept it
            row_SD = grad_TD.new_empty(ctx.like[0], dtype=ctx.like[1])
        grad_SD, grad_N = kernels.spread(
            grad_TD.contiguous(), ctx.pairs, row_SD, weight_N, bias_ED, of_weight
        )
        grad_ED = kernels.sums_of_rows(grad_SD, ctx.pairs.end_E).sum(1).to(bias_ED.dtype) if of_bias else None
        return grad_SD, grad_N, grad_ED, None, None


class _Products(torch.autograd.Function):
    """See `products`.  With ReLU and no third matrix the hidden units are kept once, else also before f."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        w1_EMD: Tensor,
        b1_EM: Optional[Tensor],
        w2_EMD: Tensor,
        w3_EMD: Optional[Tensor],
        end_E: Tensor,
        activation: str,
    ) -> Tensor:
        before_SM = product(x_SD, w1_EMD.transpose(1, 2), end_E)
        factor_SM = None if w3_EMD is None else product(x_SD, w3_EMD.transpose(1, 2), end_E)
        hidden_SM = kernels.activate(before_SM, b1_EM, end_E, activation, factor_SM)
        ctx.activation = activation
        ctx.save_for_backward(x_SD, w1_EMD, b1_EM, w2_EMD, w3_EMD, end_E, before_SM, factor_SM, hidden_SM)
        return product(hidden_SM, w2_EMD, end_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> Tuple[Optional[Tensor], ...]:
        x_SD, w1_EMD, b1_EM, w2_EMD, w3_EMD, end_E, before_SM, factor_SM, hidden_SM = ctx.saved_tensors
        of_x, of_w1, _, of_w2, of_w3, _, _ = ctx.needs_input_grad
        grad_SD = grad_SD.contiguous()
        grad_w2 = product(hidden_SM.t(), grad_SD, end_E) if of_w2 else None
        grad_SM = product(grad_SD, w2_EMD.transpose(1, 2), end_E)
        grad_SM, sum_EPM, factor_grad = kernels.activate_backward(
            grad_SM, before_SM, b1_EM, end_E, ctx.activation, factor_SM
        )
        grad_b1 = None if sum_EPM is None else sum_EPM.sum(1).to(b1_EM.dtype)
        grad_w1 = product(grad_SM.t(), x_SD, end_E) if of_w1 else None
        grad_x = product(grad_SM, w1_EMD, end_E) if of_x else None
        grad_w3 = None
        if factor_grad is not None:
            grad_w3 = product(factor_grad.t(), x_SD, end_E) if of_w3 else None
            if grad_x is not None:
                grad_x += product(factor_grad, w3_EMD, end_E)
        return grad_x, grad_w1, grad_b1, grad_w2, grad_w3, None, None


def product(a: Tensor, b: Tensor, end_E: Tensor) -> Tensor:
    """Each expert's product: of its rows with its matrix, or of its columns with its rows."""
    return F.grouped_mm(a, b, offs=end_E)
