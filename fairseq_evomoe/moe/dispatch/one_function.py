"""Experts of one width on a GPU as one function for autograd, with fewer launches than ``grouped.py`` needs.

It computes what `grouped.sum_of_experts` with `grouped.products` does, up to rounding.  Not measured on a GPU
yet, and so taken only where ``local.candidates`` has it.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .grouped import product
from .kernels import Pairs


def sum_of_experts(
    x_TD: Tensor,
    pairs: Pairs,
    weight_N: Tensor,
    weights: Tuple[Tensor, Optional[Tensor], Tensor, Optional[Tensor], Optional[Tensor]],
    experts: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """``y_t = sum over pairs n of t of weight_n * E_expert_n(x_t)``.

    Args:
        x_TD: tokens, shape (T, D).
        pairs: the routing, sorted.
        weight_N: float32, weight of each pair.
        weights: ``w1`` (E M, D), ``b1`` (E M,), ``w2`` (E M, D), ``b2`` (E, D) and ``w3`` (E M, D) or
            ``None``; the matrices in the dtype of ``x_TD``, the biases, which may be ``None``, in any.
        experts: E.
        activation: ``relu``, ``gelu`` or ``silu``.
        dtype: of the result.
    """
    return _Experts.apply(x_TD, weight_N, *weights, pairs, experts, activation, dtype)


class _Experts(torch.autograd.Function):
    """Nothing is kept but what the gradients need.

    These are the gathered tokens, the hidden units (ReLU without a third matrix: once; else also before f)
    and the rows of outputs, if the weights of the pairs have a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        w1: Tensor,
        b1: Optional[Tensor],
        w2: Tensor,
        b2: Optional[Tensor],
        w3: Optional[Tensor],
        pairs: Pairs,
        experts: int,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        shape, end_E = (experts, -1, x_TD.shape[1]), pairs.end_E
        bias_EM = None if b1 is None else b1.view(experts, -1)
        x_SD = x_TD.index_select(0, pairs.token_S)
        before_SM = product(x_SD, w1.view(shape).transpose(1, 2), end_E)
        factor_SM = None if w3 is None else product(x_SD, w3.view(shape).transpose(1, 2), end_E)
        hidden_SM = kernels.activate(before_SM, bias_EM, end_E, activation, factor_SM)
        out_SD = product(hidden_SM, w2.view(shape), end_E)
        ctx.pairs, ctx.shape, ctx.activation = pairs, shape, activation
        kept = out_SD if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(x_SD, weight_N, w1, b1, w2, b2, w3, before_SM, factor_SM, hidden_SM, kept)
        return kernels.add_up(out_SD, pairs, dtype, weight_N, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> Tuple[Optional[Tensor], ...]:
        x_SD, weight_N, w1, b1, w2, b2, w3, before_SM, factor_SM, hidden_SM, out_SD = ctx.saved_tensors
        of_x, of_weight, of_w1, of_b1, of_w2, of_b2, of_w3 = ctx.needs_input_grad[:7]
        pairs, end_E, shape = ctx.pairs, ctx.pairs.end_E, ctx.shape
        grads = dict.fromkeys(("x", "weight", "w1", "b1", "w2", "b2", "w3"))
        # without a gradient of the weights, of the outputs only the shape is used: that of the inputs
        grad_SD, grads["weight"] = kernels.spread(
            grad_TD.contiguous(), pairs, x_SD if out_SD is None else out_SD, weight_N, b2, of_weight
        )
        if of_b2:
            grads["b2"] = kernels.sum_of_parts(kernels.sums_of_rows(grad_SD, end_E), b2.dtype)
        if of_w2:
            grads["w2"] = product(hidden_SM.t(), grad_SD, end_E).view_as(w2)
        if not (of_x or of_w1 or of_b1 or of_w3):
            return *grads.values(), None, None, None, None
        grad_SM, sum_EPM, factor_grad = kernels.activate_backward(
            product(grad_SD, w2.view(shape).transpose(1, 2), end_E),
            *(before_SM, None if b1 is None else b1.view(shape[0], -1), end_E, ctx.activation, factor_SM),
        )
        if of_b1:
            assert b1 is not None and sum_EPM is not None
            grads["b1"] = kernels.sum_of_parts(sum_EPM, b1.dtype).view_as(b1)
        if of_w1:
            grads["w1"] = product(grad_SM.t(), x_SD, end_E).view_as(w1)
        if factor_grad is not None and of_w3:
            grads["w3"] = product(factor_grad.t(), x_SD, end_E).view_as(w3)
        if of_x:
            row_SD = product(grad_SM, w1.view(shape), end_E)
            if factor_grad is not None:
                row_SD += product(factor_grad, w3.view(shape), end_E)
            grads["x"] = kernels.add_up(row_SD, pairs, row_SD.dtype)
        return *grads.values(), None, None, None, None
