"""Carry tokens to their experts and the experts' outputs back."""

import torch
from torch import Tensor

from .experts import Experts
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
    token_N = routing.token_N[order_N]
    counts = torch.bincount(expert_N, minlength=routing.experts).tolist()
    out_ND = experts(x_TD[token_N], counts)
    weighted_ND = out_ND * routing.weight_N[order_N].unsqueeze(1)
    y_TD = weighted_ND.new_zeros(x_TD.shape).index_add(0, token_N, weighted_ND)
    return y_TD.to(x_TD.dtype)
