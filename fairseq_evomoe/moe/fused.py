"""Gather, experts and weighted sum as one differentiable function.

Autograd alone would keep four tensors of N rows that are not needed, copy each weight gradient into its
place, and touch fresh memory for each intermediate result, which on a CPU costs as much as a product.
Here every product writes to its place, one expert after another in buffers that stay in the cache.
"""

from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import memory

aten = torch.ops.aten


class _Relu:
    """In place: the output is enough for the backward pass."""

    in_place = True

    @staticmethod
    def forward(x: Tensor, out: Tensor) -> Tensor:
        return x.relu_()

    @staticmethod
    def backward(grad: Tensor, saved: Tensor) -> None:
        aten.threshold_backward.grad_input(grad, saved, 0, grad_input=grad)


class _Gelu:
    """The input is kept; the output is computed again in the backward pass."""

    in_place = False

    @staticmethod
    def forward(x: Tensor, out: Tensor) -> Tensor:
        return aten.gelu.out(x, out=out)

    @staticmethod
    def backward(grad: Tensor, saved: Tensor) -> None:
        aten.gelu_backward.grad_input(grad, saved, grad_input=grad)


ACTIVATIONS: Dict[Any, Any] = {torch.relu: _Relu, F.relu: _Relu, F.gelu: _Gelu}


def fused_experts(
    x_TD: Tensor,
    weight_N: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    token_N: Tensor,
    counts: List[int],
    widths: List[int],
    activation: Any,
) -> Tensor:
    """``y_t = sum over pairs n of t of weight_n * (W2_e f(W1_e x_t + b1_e) + b2_e)``.

    Args:
        x_TD: tokens, (T, D).
        weight_N: factor of each pair, sorted by expert, (N,), float32 or the dtype of ``x_TD``.
        w1: (H, D).
        b1: (H,).
        w2: (H, D).
        b2: (E, D).
        token_N: int64, token of each pair, sorted by expert.
        counts: pairs of each expert.
        widths: hidden units of each expert.
        activation: a key of ``ACTIVATIONS``.

    Returns:
        (T, D), float64 if ``x_TD`` is, else float32.
    """
    keep = torch.is_grad_enabled()  # always off inside of the function
    return _FusedExperts.apply(
        x_TD, weight_N, w1, b1, w2, b2, token_N, counts, widths, ACTIVATIONS[activation], keep
    )


class _Segment:
    """The rows of one expert that has any."""

    def __init__(self, expert: int, pairs: slice, units: slice, token: Optional[Tensor]) -> None:
        self.expert = expert
        self.pairs = pairs
        self.units = units
        self.token = token  # None: every token, in order

    def gather(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.token is None else x_TD.index_select(0, self.token)


def _segments(token_N: Tensor, counts: List[int], widths: List[int], tokens: int) -> Iterator[_Segment]:
    pair = unit = 0
    for expert, (count, width) in enumerate(zip(counts, widths)):
        if count:
            token = token_N[pair : pair + count]
            if count == tokens and torch.equal(token, torch.arange(tokens)):
                token = None
            yield _Segment(expert, slice(pair, pair + count), slice(unit, unit + width), token)
        pair += count
        unit += width


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, w1, b1, w2, b2, token, counts, widths, activation, keep):
        sums = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = torch.zeros(x.shape, dtype=sums, device=x.device)
        saved = memory.empty(sum(n * h for n, h in zip(counts, widths)), like=x) if keep else None
        scratch = _Scratch(x)
        start = 0
        for s in _segments(token, counts, widths, x.shape[0]):
            rows, width = s.pairs.stop - s.pairs.start, s.units.stop - s.units.start
            if keep:
                pre = saved[start : start + rows * width].view(rows, width)
                start += rows * width
            else:
                pre = scratch.get("pre", rows, width)
            torch.addmm(b1[s.units], s.gather(x), w1[s.units].t(), out=pre)
            hidden = pre if activation.in_place else scratch.get("hidden", rows, width)
            hidden = activation.forward(pre, hidden)
            out = torch.addmm(b2[s.expert], hidden, w2[s.units], out=scratch.get("out", rows, x.shape[1]))
            _add_rows(y, s.token, out.to(sums).mul_(weight[s.pairs].unsqueeze(1)))
        ctx.save_for_backward(x, weight, w1, b1, w2, b2, token, saved)
        ctx.counts, ctx.widths, ctx.activation = counts, widths, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, w1, b1, w2, b2, token, saved = ctx.saved_tensors
        counts, widths, activation = ctx.counts, ctx.widths, ctx.activation
        grad = grad.to(x.dtype)
        grad_x, grad_weight = (
            torch.zeros(x.shape, dtype=grad.dtype, device=x.device),
            torch.empty_like(weight),
        )
        grad_w1, grad_b1, grad_w2, grad_b2 = (memory.empty(*p.shape, like=p) for p in (w1, b1, w2, b2))
        _zero_unused((grad_w1, grad_b1, grad_w2), grad_b2, counts, widths)
        scratch = _Scratch(x)
        start = 0
        for s in _segments(token, counts, widths, x.shape[0]):
            rows, width = s.pairs.stop - s.pairs.start, s.units.stop - s.units.start
            kept = saved[start : start + rows * width].view(rows, width)
            start += rows * width
            hidden = (
                kept if activation.in_place else activation.forward(kept, scratch.get("hidden", rows, width))
            )
            g = s.gather(grad)
            # d loss / d hidden before the weight, from which the weight's own gradient follows
            g_hidden = torch.mm(g, w2[s.units].t(), out=scratch.get("g_hidden", rows, width))
            factor = weight[s.pairs].to(x.dtype).unsqueeze(1)
            grad_weight[s.pairs] = _row_dots(g_hidden, hidden).add_(g @ b2[s.expert]).to(weight.dtype)
            g = g * factor
            torch.mm(hidden.t(), g, out=grad_w2[s.units])
            torch.sum(g, 0, out=grad_b2[s.expert])
            g_hidden.mul_(factor)
            activation.backward(g_hidden, kept)
            torch.mm(g_hidden.t(), s.gather(x), out=grad_w1[s.units])
            torch.sum(g_hidden, 0, out=grad_b1[s.units])
            if s.token is None:
                grad_x.addmm_(g_hidden, w1[s.units])
            else:
                back = torch.mm(g_hidden, w1[s.units], out=scratch.get("back", rows, x.shape[1]))
                grad_x.index_add_(0, s.token, back)
        return grad_x, grad_weight, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None, None, None


class _Scratch:
    """Buffers that one expert after another uses, so that no fresh memory is touched for each."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: Dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int) -> Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self.buffers[name] = self.like.new_empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)


def _add_rows(y: Tensor, token: Optional[Tensor], rows: Tensor) -> None:
    if token is None:
        y.add_(rows)
    else:
        y.index_add_(0, token, rows)


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("nh,nh->n", a, b)


def _zero_unused(per_unit: Tuple[Tensor, ...], grad_b2: Tensor, counts: List[int], widths: List[int]) -> None:
    unit = 0
    for expert, (count, width) in enumerate(zip(counts, widths)):
        if not count:
            grad_b2[expert].zero_()
            for tensor in per_unit:
                tensor[unit : unit + width].zero_()
        unit += width
