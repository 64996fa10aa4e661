"""Experts of one width on a GPU: grouped products with `kernels.py` before, between and after them.

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
    weights: Tuple[Tensor, Tensor, Tensor, Tensor, Optional[Tensor]],
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """``y_t = sum over pairs n of t of weight_n * E_expert_n(x_t)``, as one function.

    Args:
        x_TD: tokens, shape (T, D).
        pairs: the routing, sorted.
        weight_N: float32, weight of each pair.
        weights: ``w1`` (E M, D), ``b1`` (E M,), ``w2`` (E M, D), ``b2`` (E, D) and ``w3`` (E M, D) or
            ``None``; the matrices in the dtype of ``x_TD``, the biases in any.
        activation: ``relu``, ``gelu`` or ``silu``.
        dtype: of the result.
    """
    return _Experts.apply(x_TD, weight_N, *weights, pairs, activation, dtype)


def sum_of_outputs(
    x_TD: Tensor,
    pairs: Pairs,
    weight_N: Tensor,
    bias_ED: Tensor,
    rows: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """``y_t = sum over pairs n of t of weight_n * (rows(x)_n + bias_expert_n)``.

    Args:
        x_TD: tokens, shape (T, D).
        pairs: the routing, sorted.
        weight_N: float32, weight of each pair.
        bias_ED: what is added to each expert's outputs.
        rows: the experts without it, from and to rows sorted by expert.
        dtype: of the result.
    """
    return _AddUp.apply(rows(_Gather.apply(x_TD, pairs)), weight_N, bias_ED, pairs, dtype)


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
        ctx: Any, row_SD: Tensor, weight_N: Tensor, bias_ED: Tensor, pairs: Pairs, dtype: torch.dtype
    ) -> Tensor:
        row_SD = row_SD.contiguous()
        ctx.pairs = pairs
        ctx.save_for_backward(row_SD, weight_N, bias_ED)
        return kernels.add_up(row_SD, pairs, dtype, weight_N, bias_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> Tuple[Optional[Tensor], ...]:
        row_SD, weight_N, bias_ED = ctx.saved_tensors
        _, of_weight, of_bias, _, _ = ctx.needs_input_grad
        grad_SD, grad_N = kernels.spread(
            grad_TD.contiguous(), ctx.pairs, row_SD, weight_N, bias_ED, of_weight
        )
        return grad_SD, grad_N, _of_bias(grad_SD, bias_ED, ctx.pairs) if of_bias else None, None, None


class _Experts(torch.autograd.Function):
    """All of it: one node for autograd, and nothing kept but what the gradients need.

    These are the gathered tokens, the hidden units (ReLU without a third matrix: once; else also before f)
    and the rows of outputs, if the weights of the pairs have a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Optional[Tensor],
        pairs: Pairs,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        shape, end_E = (b2.shape[0], -1, b2.shape[1]), pairs.end_E
        x_SD = x_TD.index_select(0, pairs.token_S)
        before_SM = _product(x_SD, w1.view(shape).transpose(1, 2), end_E)
        factor_SM = None if w3 is None else _product(x_SD, w3.view(shape).transpose(1, 2), end_E)
        hidden_SM = kernels.activate(before_SM, b1.view(shape[0], -1), end_E, activation, factor_SM)
        out_SD = _product(hidden_SM, w2.view(shape), end_E)
        ctx.pairs, ctx.activation = pairs, activation
        kept = out_SD if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(x_SD, weight_N, w1, b1, w2, b2, w3, before_SM, factor_SM, hidden_SM, kept)
        return kernels.add_up(out_SD, pairs, dtype, weight_N, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> Tuple[Optional[Tensor], ...]:
        x_SD, weight_N, w1, b1, w2, b2, w3, before_SM, factor_SM, hidden_SM, out_SD = ctx.saved_tensors
        of_x, of_weight, of_w1, of_b1, of_w2, of_b2, of_w3 = ctx.needs_input_grad[:7]
        pairs, end_E, shape = ctx.pairs, ctx.pairs.end_E, (b2.shape[0], -1, b2.shape[1])
        # without a gradient of the weights, of the outputs only the shape is used: that of the inputs
        grad_SD, grad_N = kernels.spread(
            grad_TD.contiguous(), pairs, x_SD if out_SD is None else out_SD, weight_N, b2, of_weight
        )
        grad_w1 = grad_b1 = grad_w2 = grad_w3 = grad_x = None
        grad_b2 = _of_bias(grad_SD, b2, pairs) if of_b2 else None
        if of_w2:
            grad_w2 = _product(hidden_SM.t(), grad_SD, end_E).view_as(w2)
        if not (of_x or of_w1 or of_b1 or of_w3):
            return None, grad_N, None, None, grad_w2, grad_b2, None, None, None, None
        grad_SM, sum_PM, factor_grad = kernels.activate_backward(
            _product(grad_SD, w2.view(shape).transpose(1, 2), end_E),
            *(before_SM, b1.view(shape[0], -1), end_E, ctx.activation, factor_SM),
        )
        if of_b1:
            grad_b1 = kernels.sums_of_parts(sum_PM, shape[0], b1.dtype).view_as(b1)
        if of_w1:
            grad_w1 = _product(grad_SM.t(), x_SD, end_E).view_as(w1)
        if of_w3:
            grad_w3 = _product(factor_grad.t(), x_SD, end_E).view_as(w3)
        if of_x:
            row_SD = _product(grad_SM, w1.view(shape), end_E)
            if w3 is not None:
                row_SD += _product(factor_grad, w3.view(shape), end_E)
            grad_x = kernels.add_up(row_SD, pairs, row_SD.dtype)
        return grad_x, grad_N, grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, None, None, None


def _of_bias(grad_SD: Tensor, bias_ED: Tensor, pairs: Pairs) -> Tensor:
    """The gradient of the bias of each expert's outputs."""
    return kernels.sums_of_parts(kernels.sums_of_rows(grad_SD, pairs.end_E), bias_ED.shape[0], bias_ED.dtype)


def _product(a: Tensor, b: Tensor, end_E: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=end_E)
