"""Carry tokens to their experts and the experts' outputs back."""

from typing import List

import torch
from torch import Tensor

from .experts import Experts
from .fused import ACTIVATIONS, fused_experts
from .routing import Routing


def dispatch(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Apply to each token the experts that ``routing`` gives it and add up their weighted outputs.

    The cost is that of the N active pairs.  Sums are in float32 (float64 for float64 tokens); a token
    with no pair gets zeros.

    Args:
        x_TD: tokens, shape (T, D).
        routing: the active (token, expert) pairs.
        experts: the experts.

    Returns:
        shape (T, D), dtype of ``x_TD``.
    """
    expert_N, order_N = torch.sort(routing.expert_N, stable=True)
    token_N, weight_N = routing.token_N[order_N], routing.weight_N[order_N]
    counts = torch.bincount(expert_N, minlength=routing.experts).tolist()
    function = _fused if _can_fuse(x_TD, experts) else _by_autograd
    return function(x_TD, token_N, weight_N, counts, experts).to(x_TD.dtype)


def _can_fuse(x_TD: Tensor, experts: Experts) -> bool:
    hidden = experts.hidden
    return x_TD.device.type == "cpu" and hidden.only_activation and hidden.activation in ACTIVATIONS


def _fused(x_TD: Tensor, token_N: Tensor, weight_N: Tensor, counts: List[int], experts: Experts) -> Tensor:
    weights = (experts.w1, experts.b1, experts.w2, experts.b2)
    return fused_experts(x_TD, weight_N, *weights, token_N, counts, experts.widths, experts.hidden.activation)


def _by_autograd(
    x_TD: Tensor, token_N: Tensor, weight_N: Tensor, counts: List[int], experts: Experts
) -> Tensor:
    weighted_ND = experts(x_TD[token_N], counts) * weight_N.unsqueeze(1)
    return weighted_ND.new_zeros(x_TD.shape).index_add(0, token_N, weighted_ND)
