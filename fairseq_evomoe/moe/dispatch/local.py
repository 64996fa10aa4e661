"""Carry tokens to their experts and the experts' outputs back.

Every way gives the same result up to rounding; which one is taken depends on device, dtype and experts:

- one token without gradients, as in generation: its experts one after another, nothing to sort;
- on the CPU, ReLU, GELU or SiLU experts, gated (SwiGLU) or not: a differentiable function, ``fused.py``;
- experts of one width, where PyTorch has ``grouped_mm`` (2.10 or newer) that takes their sizes: grouped
  products, and in bfloat16 nothing is copied from the device to the host (in float32, PyTorch 2.11 does that
  within them); on a GPU with Triton what is around them is in kernels, ``grouped.py``, and the result does
  not depend on the order in which threads run;
- otherwise: the experts' segments by autograd.
"""

from typing import List, Optional, Set

import torch
from torch import Tensor
from torch.nn import functional as F

from ..experts import Experts
from ..routing import Routing
from . import grouped, kernels, one_function
from .fused import ACTIVATIONS, fused_experts

without: Set[str] = set()
"""Ways not to take, of ``kernels`` and ``grouped``: for tests and benchmarks that compare them."""

candidates: Set[str] = set()
"""Ways to take that have not been measured on a GPU yet, of ``one_function``: for tests and benchmarks."""

_FEW = 16  # pairs for which sorting takes longer than the work
_ALIGNMENT = 16  # bytes that every row of a grouped product must be a multiple of


def dispatch(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Apply to each token the experts that ``routing`` gives it and add up their weighted outputs.

    The cost is that of the N active pairs.  Sums are in float32 (float64 for float64 tokens); a token
    with no pair gets zeros.  If ``routing`` has slots, they take the tokens' place: the tokens are mixed into
    them before and the experts' outputs are mixed into those of the tokens after.

    Args:
        x_TD: tokens, shape (T, D).
        routing: the active (token, expert) pairs.
        experts: the experts.

    Returns:
        shape (T, D), dtype of ``x_TD``.
    """
    slots = routing.slots
    pairs = routing.token_N, routing.expert_N, routing.weight_N
    if slots is None:
        return sum_of_outputs(x_TD, *pairs, experts, x_TD.dtype).to(x_TD.dtype)
    return slots.spread(sum_of_outputs(slots.mix(x_TD), *pairs, experts)).to(x_TD.dtype)


def sum_of_outputs(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    experts: Experts,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``y_t = sum over pairs n of t of weight_n * E_expert_n(x_t)``.

    Args:
        x_TD: tokens, shape (T, D).
        token_N: int64, token of each pair.
        expert_N: int64, expert of each pair, a number among those that are here.
        weight_N: float32, factor of its output.
        experts: the experts.
        dtype: what the caller rounds the sums to, so that a way that can do so at once may.

    Returns:
        shape (T, D), float32 or ``dtype`` (float64 for float64 tokens).
    """
    if x_TD.shape[0] == 1 and x_TD.device.type == "cpu" and not torch.is_grad_enabled():
        return _one_token(x_TD, expert_N, weight_N, experts)
    if _can_use_kernels(x_TD, token_N, experts):
        return _by_kernels(x_TD, token_N, expert_N, weight_N, experts, dtype)
    expert_N, order_N = torch.sort(expert_N, stable=True)
    token_N, weight_N = token_N[order_N], weight_N[order_N]
    if _can_fuse(x_TD, experts):
        counts = _counts(expert_N, experts)
        b1, b2 = experts.biases
        weights = (experts.w1, b1, experts.w2, b2)
        activation = experts.hidden.activation
        widths, w3 = experts.local_widths, experts.w3
        return fused_experts(x_TD, weight_N, *weights, token_N, counts, widths, activation, w3)
    # not x_TD[token_N], whose gradient sorts
    weighted_ND = outputs(x_TD.index_select(0, token_N), expert_N, experts) * weight_N.unsqueeze(1)
    return weighted_ND.new_zeros(x_TD.shape).index_add(0, token_N, weighted_ND)


def outputs(x_ND: Tensor, expert_N: Tensor, experts: Experts) -> Tensor:
    """The output of its expert for each row.

    Args:
        x_ND: rows sorted by expert, shape (N, D).
        expert_N: int64, expert of each row, a number among those that are here.
        experts: the experts.

    Returns:
        shape (N, D), dtype of ``x_ND`` or that of autocast.
    """
    if _can_group(x_ND, experts):
        return grouped_experts(x_ND, expert_N, experts)
    return experts(x_ND, _counts(expert_N, experts))


def _counts(expert_N: Tensor, experts: Experts) -> List[int]:
    return torch.bincount(expert_N, minlength=len(experts.local)).tolist()


def _one_token(x_TD: Tensor, expert_N: Tensor, weight_N: Tensor, experts: Experts) -> Tensor:
    y_TD, (b1, b2) = None, experts.biases
    for expert, weight in zip(expert_N.tolist(), weight_N.tolist()):
        units = experts.rows_of(expert)
        factor = None if experts.w3 is None else F.linear(x_TD, experts.w3[units])
        hidden = experts.hidden(F.linear(x_TD, experts.w1[units], None if b1 is None else b1[units]), factor)
        w2 = experts.w2[units]
        out_TD = hidden @ w2 if b2 is None else torch.addmm(b2[expert], hidden, w2)
        # a product with a number, unlike one with a tensor, keeps the dtype; sums are in float32
        out_TD = (out_TD if out_TD.dtype == torch.float64 else out_TD.float()) * weight
        y_TD = out_TD if y_TD is None else y_TD + out_TD
    return torch.zeros_like(x_TD) if y_TD is None else y_TD


def way(device: torch.device) -> str:
    """How a layer of experts of one width, with a common activation, computes on a device, in words."""
    experts = Experts(64, [64, 64]).to(device)
    x_TD, token_N = torch.zeros(2, 64, device=device), torch.arange(2, device=device)
    if _can_use_kernels(x_TD, token_N, experts):
        return "grouped products with Triton's kernels around them"
    if _can_fuse(x_TD, experts):
        return "one function for gather, products and sum on CPUs"
    return "grouped products" if _can_group(x_TD, experts) else "a product for each expert"


def _can_fuse(x_TD: Tensor, experts: Experts) -> bool:
    """Whether ``fused.fused_experts`` computes these experts."""
    hidden = experts.hidden
    if x_TD.device.type != "cpu" or x_TD.dtype != experts.w1.dtype:  # which autocast may have changed
        return False
    return hidden.only_activation and hidden.activation in ACTIVATIONS


def _can_group(x_TD: Tensor, experts: Experts) -> bool:
    """Whether ``grouped_experts`` computes these experts: one width, and rows of whole 16 bytes."""
    dtype = _autocast_dtype(x_TD) or x_TD.dtype
    if not experts.local or "grouped" in without:  # the others' experts were chosen
        return False
    width = experts.local_widths[0]
    return (
        hasattr(F, "grouped_mm")
        and dtype in (torch.float32, torch.float16, torch.bfloat16)
        # torch.compile knows them in bfloat16 only, as of PyTorch 2.13
        and (dtype == torch.bfloat16 or not torch.compiler.is_compiling())
        and experts.local_widths.count(width) == len(experts.local)
        and width * dtype.itemsize % _ALIGNMENT == 0
        and experts.dim * dtype.itemsize % _ALIGNMENT == 0
    )


def _can_use_kernels(x_TD: Tensor, token_N: Tensor, experts: Experts) -> bool:
    """Whether ``_by_kernels`` computes these experts for these pairs."""
    if token_N.shape[0] == 0 or "kernels" in without or _can_fuse(x_TD, experts):
        return False
    return kernels.usable(x_TD) and _can_group(x_TD, experts)


def _by_kernels(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor,
    experts: Experts,
    dtype: torch.dtype,
) -> Tensor:
    """``sum_of_outputs``, in ``dtype``, where ``_can_use_kernels`` holds."""
    count, like = len(experts.local), _autocast_dtype(x_TD) or x_TD.dtype
    name, (b1, b2) = _name_of_activation(experts), experts.biases
    x_TD, token_N, expert_N, weight_N = x_TD.to(like), *map(Tensor.contiguous, (token_N, expert_N, weight_N))
    few = token_N.shape[0] <= _FEW and not torch.is_grad_enabled() and like == experts.w1.dtype
    if few and name is not None:
        weights = experts.w1, b1, experts.w2, b2, experts.w3
        return kernels.few_pairs(x_TD.contiguous(), token_N, expert_N, weight_N, weights, count, name).to(
            dtype
        )
    pairs = kernels.sort_pairs(token_N, expert_N, x_TD.shape[0], count)
    if "one_function" in candidates and name is not None:
        w1, w2, w3 = experts.w1.to(like), experts.w2.to(like), experts.w3
        cast = w1, b1, w2, b2, None if w3 is None else w3.to(like)
        return one_function.sum_of_experts(x_TD, pairs, weight_N, cast, count, name, dtype)

    def rows(x_SD: Tensor) -> Tensor:
        if name is None:  # dropout, a normalisation or another function is between the products
            expert_S = expert_N[pairs.pair_S]
            return grouped_experts(x_SD, expert_S, experts, with_b2=False)
        w1, w2 = (w.view(count, -1, experts.dim).to(like) for w in (experts.w1, experts.w2))
        w3 = None if experts.w3 is None else experts.w3.view(count, -1, experts.dim).to(like)
        bias_EM = None if b1 is None else b1.view(count, -1)
        return grouped.products(x_SD, w1, bias_EM, w2, w3, pairs.end_E, name)

    return grouped.sum_of_experts(x_TD, pairs, weight_N, b2, rows, dtype)


def _name_of_activation(experts: Experts) -> Optional[str]:
    """What the kernels call all that happens between the products; ``None`` if they do not know it."""
    hidden = experts.hidden
    return kernels.ACTIVATIONS.get(hidden.activation) if hidden.only_activation else None


def grouped_experts(x_ND: Tensor, expert_N: Tensor, experts: Experts, with_b2: bool = True) -> Tensor:
    """``Experts.forward`` for experts of one width by grouped products, which need no size on the host.

    Args:
        x_ND: rows sorted by expert, shape (N, D).
        expert_N: int64, expert of each row.
        experts: E experts for which ``_can_group`` holds.
        with_b2: whether to add the bias of their outputs.

    Returns:
        shape (N, D), dtype of ``x_ND`` or that of autocast.
    """
    dtype = _autocast_dtype(x_ND) or x_ND.dtype
    count = len(experts.local)
    end_E = torch.searchsorted(
        expert_N, torch.arange(count, device=expert_N.device), right=True, out_int32=True
    )

    def product(rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        weight = weight.view(count, -1, experts.dim).to(dtype)
        return F.grouped_mm(rows.to(dtype), weight.transpose(1, 2) if transposed else weight, offs=end_E)

    # a bias is added as a product with a row of zeros and a one: the gradient of one that is looked up is
    # many additions to a few places, which on a GPU wait for each other
    one_NE = (expert_N.unsqueeze(1) == torch.arange(count, device=expert_N.device)).to(dtype)

    def add(rows: Tensor, bias: Optional[Tensor]) -> Tensor:
        return rows if bias is None else torch.addmm(rows, one_NE, bias.view(count, -1).to(dtype))

    b1, b2 = experts.biases
    factor = None if experts.w3 is None else product(x_ND, experts.w3, True)
    hidden = experts.hidden(add(product(x_ND, experts.w1, True), b1), factor)
    return add(product(hidden, experts.w2, False), b2 if with_b2 else None)


def _autocast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """What autocast would compute products in; ``None`` without it or on a PyTorch that has no grouped_mm."""
    if not hasattr(F, "grouped_mm") or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)
