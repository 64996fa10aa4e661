"""Auxiliary losses of routers: pure functions of float32 tensors.  Suffixes: see ``routing.py``."""

import torch
from torch import Tensor

from .routing import Routing


def balance_loss(routing: Routing) -> Tensor:
    """Load-balance loss: ``E^2 * mean_e(mean_t(gate_te) * mean_t(mask_te))``.

    ``gate`` is the weight with which an expert's output is used and ``mask`` whether it is used at
    all (EvoMoE, arXiv 2112.14397, as in the authors' code; for top-1 the loss of Switch).  It is 1 for
    a balanced, confident top-1 routing and E for a uniform dense one.

    Returns:
        float32 scalar; the gradient flows through the weights.
    """
    tokens = max(routing.tokens, 1)
    gate_E = routing.weight_N.new_zeros(routing.experts)
    gate_E = gate_E.index_add(0, routing.expert_N, routing.weight_N) / tokens
    mask_E = routing.load_E().to(gate_E.dtype) / tokens
    return routing.experts * (gate_E * mask_E).sum()


def entropy(probability_TE: Tensor) -> Tensor:
    """Entropy in nats of each row's distribution; 0 log 0 = 0.

    Args:
        probability_TE: probabilities, shape (T, E), rows sum to 1.

    Returns:
        shape (T,).
    """
    return -torch.xlogy(probability_TE, probability_TE).sum(-1)
