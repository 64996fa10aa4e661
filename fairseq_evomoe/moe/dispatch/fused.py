"""Gather, experts and weighted sum as one differentiable function.

Autograd alone would keep four tensors of N rows that are not needed, copy each weight gradient into its
place, and touch fresh memory for each intermediate result, which on a CPU costs as much as a product.
Here every product writes to its place, one group of experts after another in buffers that stay in the cache.
"""

from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import memory

aten = torch.ops.aten

ROWS = 1024
"""Small experts are taken together up to so many rows: each operation on a tensor makes the threads
meet, which with few rows takes longer than the work."""


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


class _Silu:
    """As ``_Gelu``."""

    in_place = False

    @staticmethod
    def forward(x: Tensor, out: Tensor) -> Tensor:
        return aten.silu.out(x, out=out)

    @staticmethod
    def backward(grad: Tensor, saved: Tensor) -> None:
        aten.silu_backward.grad_input(grad, saved, grad_input=grad)


ACTIVATIONS: Dict[Any, Any] = {torch.relu: _Relu, F.relu: _Relu, F.gelu: _Gelu, F.silu: _Silu}


def fused_experts(
    x_TD: Tensor,
    weight_N: Tensor,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    token_N: Tensor,
    counts: List[int],
    widths: List[int],
    activation: Any,
    w3: Optional[Tensor] = None,
) -> Tensor:
    """``y_t = sum over pairs n of t of weight_n * (W2_e f(W1_e x_t + b1_e) + b2_e)``.

    With a third matrix, ``f(W1_e x_t + b1_e)`` is multiplied by ``W3_e x_t``.

    Args:
        x_TD: tokens, (T, D).
        weight_N: factor of each pair, sorted by expert, (N,), float32 or the dtype of ``x_TD``.
        w1: (H, D).
        b1: (H,); ``None``: there is no bias.
        w2: (H, D).
        b2: (E, D); ``None``: there is no bias.
        token_N: int64, token of each pair, sorted by expert.
        counts: pairs of each expert.
        widths: hidden units of each expert.
        activation: a key of ``ACTIVATIONS``.
        w3: (H, D).

    Returns:
        (T, D), float64 if ``x_TD`` is, else float32.
    """
    keep = torch.is_grad_enabled()  # always off inside of the function
    return _FusedExperts.apply(
        x_TD, weight_N, w1, b1, w2, b2, w3, token_N, counts, widths, ACTIVATIONS[activation], keep
    )


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        w1: Tensor,
        b1: Optional[Tensor],
        w2: Tensor,
        b2: Optional[Tensor],
        w3: Optional[Tensor],
        token: Tensor,
        counts: List[int],
        widths: List[int],
        activation: Any,
        keep: bool,
    ) -> Tensor:
        sums = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = torch.zeros(x.shape, dtype=sums, device=x.device)
        size = sum(n * h for n, h in zip(counts, widths))
        saved = memory.empty(size, like=x) if keep else None
        saved3 = memory.empty(size, like=x) if keep and w3 is not None else None
        scratch = _Scratch(x)
        for group in _groups(token, counts, widths, x.shape[0]):
            rows, width = group.shape
            pre = scratch.get("pre", rows, width) if saved is None else group.part(saved)
            own_x = group.gather(x, scratch)
            group.rows_by_expert(b1, own_x, w1, pre)
            hidden = activation.forward(pre, pre if activation.in_place else scratch.get("act", rows, width))
            if w3 is not None:
                factor = scratch.get("factor", rows, width) if saved3 is None else group.part(saved3)
                group.rows_by_expert(None, own_x, w3, factor)
                hidden = torch.mul(hidden, factor, out=scratch.get("hidden", rows, width))
            out = group.rows_by_unit(b2, hidden, w2, scratch.get("out", rows, x.shape[1]))
            group.scatter(y, out.to(sums).mul_(weight[group.pairs].unsqueeze(1)))
        ctx.save_for_backward(x, weight, w1, b1, w2, b2, w3, token, saved, saved3)
        ctx.counts, ctx.widths, ctx.activation = counts, widths, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, w1, b1, w2, b2, w3, token, saved, saved3 = ctx.saved_tensors
        activation = ctx.activation
        grad = grad.to(x.dtype)
        grad_x = torch.zeros_like(x)
        grad_weight: Optional[Tensor] = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            expert = torch.arange(len(ctx.counts)).repeat_interleave(
                torch.tensor(ctx.counts, dtype=torch.long)
            )
        grad_w1, grad_w2 = (memory.empty(*p.shape, like=p, reuse=True) for p in (w1, w2))
        grad_b1, grad_b2, grad_w3 = (
            None if p is None else memory.empty(*p.shape, like=p, reuse=True) for p in (b1, b2, w3)
        )
        scratch = _Scratch(x)
        for group in _groups(token, ctx.counts, ctx.widths, x.shape[0]):
            rows, width = group.shape
            kept = group.part(saved)
            act = kept if activation.in_place else activation.forward(kept, scratch.get("act", rows, width))
            hidden = act
            if w3 is not None:
                factor = group.part(saved3)
                hidden = torch.mul(act, factor, out=scratch.get("hidden", rows, width))
            g = group.gather(grad, scratch)
            # d loss / d hidden before the weight, from which the weight's own gradient follows
            g_hidden = group.rows_by_expert(None, g, w2, scratch.get("g_hidden", rows, width))
            if grad_weight is not None:
                grad_weight[group.pairs] = _row_dots(g_hidden, hidden)
                if b2 is not None:
                    grad_weight[group.pairs] += group.dot_own(g, b2, expert)
            own_weight = weight[group.pairs].to(x.dtype).unsqueeze(1)
            g = torch.mul(g, own_weight, out=scratch.get("g", *g.shape))
            group.outer(hidden, g, grad_w2)
            if grad_b2 is not None:
                group.sum(g, grad_b2[group.experts])
            g_hidden.mul_(own_weight)
            own_x, g_x = group.gather(x, scratch), scratch.get("out", *g.shape)
            if grad_w3 is not None:
                g_factor = torch.mul(g_hidden, act, out=hidden)
                group.outer(g_factor, own_x, grad_w3)
                group.scatter(grad_x, group.rows_by_unit(None, g_factor, w3, g_x))
                g_hidden.mul_(factor)
            activation.backward(g_hidden, kept)
            group.outer(g_hidden, own_x, grad_w1)
            if grad_b1 is not None:
                group.sum(g_hidden, grad_b1[group.units].view(-1, width))
            group.scatter(grad_x, group.rows_by_unit(None, g_hidden, w1, g_x))
        grads = grad_x, grad_weight, grad_w1, grad_b1, grad_w2, grad_b2, grad_w3
        return (*grads, None, None, None, None, None)


class _Group:
    """Consecutive experts of one width, the rows that they have, and the products with their weights.

    Where all have as many rows, the products of a group are one batched product.

    Attributes:
        counts: rows of each expert.
        shape: rows and hidden units of an expert.
        experts, units, pairs: where the group's experts, hidden units and rows are.
        kept: where its rows of hidden units are in the flat tensor of all that are kept.
        token: token of each row; ``None``: every token, in order.
    """

    def __init__(self, counts: List[int], width: int, expert: int, unit: int, pair: int, kept: int) -> None:
        rows = sum(counts)
        self.counts = counts
        self.shape = rows, width
        self.even = counts.count(counts[0]) == len(counts)
        self.experts = slice(expert, expert + len(counts))
        self.units = slice(unit, unit + len(counts) * width)
        self.pairs = slice(pair, pair + rows)
        self.kept = slice(kept, kept + rows * width)
        self.token: Optional[Tensor] = None

    def part(self, hidden: Tensor) -> Tensor:
        """The group's rows of hidden units in the flat tensor of all that are kept."""
        return hidden[self.kept].view(self.shape)

    def gather(self, x: Tensor, scratch: "_Scratch") -> Tensor:
        """The group's rows of x, in a buffer that the next call overwrites."""
        if self.token is None:
            return x
        out = scratch.get("rows", self.shape[0], x.shape[1])
        return torch.index_select(x, 0, self.token, out=out)

    def scatter(self, y: Tensor, rows: Tensor) -> None:
        """Add the group's rows to y."""
        if self.token is None:
            y.add_(rows)
        else:
            y.index_add_(0, self.token, rows)

    def rows_by_expert(self, bias: Optional[Tensor], x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        """``x W_e^T + bias_e`` for the rows of each expert; w: (H, D), bias: (H,)."""
        width = self.shape[1]
        w = w[self.units].view(len(self.counts), width, -1).transpose(1, 2)
        return self._product(None if bias is None else bias[self.units].view(-1, width), x, w, out)

    def rows_by_unit(self, bias: Optional[Tensor], x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        """``x W_e + bias_e`` for the rows of each expert; w: (H, D), bias: (E, D)."""
        w = w[self.units].view(len(self.counts), self.shape[1], -1)
        return self._product(None if bias is None else bias[self.experts], x, w, out)

    def _product(self, bias: Optional[Tensor], x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        if self.even and len(self.counts) > 1:
            x, y = self._batched(x), self._batched(out)
            if bias is None:
                torch.bmm(x, w, out=y)
            else:
                torch.baddbmm(bias.unsqueeze(1), x, w, out=y)
            return out
        for e, (x_, w_, y) in enumerate(zip(self._parts(x), w.unbind(), self._parts(out))):
            if not x_.shape[0]:
                continue
            if bias is None:
                torch.mm(x_, w_, out=y)
            else:
                torch.addmm(bias[e], x_, w_, out=y)
        return out

    def outer(self, hidden: Tensor, rows: Tensor, grad_w: Tensor) -> None:
        """The gradient of each expert's weights, ``hidden^T rows``, into its place in (H, D)."""
        experts = len(self.counts)
        grad_w = grad_w[self.units].view(experts, self.shape[1], -1)
        if self.even and experts > 1:
            torch.bmm(self._batched(hidden).transpose(1, 2), self._batched(rows), out=grad_w)
            return
        for a, b, out in zip(self._parts(hidden), self._parts(rows), grad_w.unbind()):
            if a.shape[0]:
                torch.mm(a.t(), b, out=out)
            else:
                out.zero_()

    def sum(self, rows: Tensor, out: Tensor) -> None:
        """The sum of each expert's rows; out: (experts, columns)."""
        if self.even:
            torch.sum(self._batched(rows), 1, out=out)
            return
        for part, total in zip(self._parts(rows), out):
            torch.sum(part, 0, out=total)

    def _parts(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of each expert; ``Tensor.split`` takes as long again before it calls this."""
        return rows.split_with_sizes(self.counts)

    def _batched(self, rows: Tensor) -> Tensor:
        return rows.view(len(self.counts), self.counts[0], rows.shape[1])

    def dot_own(self, rows: Tensor, b: Tensor, expert: Tensor) -> Tensor:
        """The product of each row with its expert's row of b, (E, D); expert: that of each pair."""
        if len(self.counts) == 1:
            return torch.mv(rows, b[self.experts.start])
        own = expert[self.pairs].sub(self.experts.start).unsqueeze(1)
        return torch.mm(rows, b[self.experts].t()).gather(1, own).squeeze(1)


def _groups(token_N: Tensor, counts: List[int], widths: List[int], tokens: int) -> Iterator[_Group]:
    first = unit = pair = kept = 0
    while first < len(counts):
        end, rows = first + 1, counts[first]
        while end < len(counts) and widths[end] == widths[first] and rows + counts[end] <= ROWS:
            rows += counts[end]
            end += 1
        group = _Group(counts[first:end], widths[first], first, unit, pair, kept)
        everyone = end == first + 1 and rows == tokens
        if not (everyone and torch.equal(token_N[group.pairs], torch.arange(tokens))):
            group.token = token_N[group.pairs]
        yield group
        first, unit, pair, kept = end, group.units.stop, group.pairs.stop, group.kept.stop


class _Scratch:
    """Buffers that one group after another uses, so that no fresh memory is touched for each."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: Dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int) -> Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self.buffers[name] = self.like.new_empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("nh,nh->n", a, b)
