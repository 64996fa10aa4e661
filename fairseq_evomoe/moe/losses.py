"""Auxiliary losses of routers: pure functions of float32 tensors.  Suffixes: see ``routing.py``."""

import torch
from torch import Tensor

from .routing import Routing


def balance_loss(routing: Routing) -> Tensor:
    """Load-balance loss: ``E^2 * mean_e(mean_t(gate_te) * mean_t(mask_te))``.

    ``gate`` is the weight with which an expert's output is used and ``mask`` whether it is used at
    all (EvoMoE, arXiv 2112.14397, as in the authors' code; for top-1 the loss of Switch but for the
    probabilities of experts that are not chosen).  It is 1 for a balanced, confident top-1 routing and E
    for a uniform dense one.

    Returns:
        float32 scalar; the gradient flows through the weights.
    """
    # the sum over experts of gate times load, taken over the pairs
    load_N = routing.load_E().to(routing.weight_N.dtype)[routing.expert_N]
    return (routing.weight_N * load_N).sum() * (routing.experts / max(routing.tokens, 1) ** 2)


def top1_balance_loss(probability_TE: Tensor) -> Tensor:
    """Load-balance loss of Switch (arXiv 2101.03961) and GShard: ``E * sum_e f_e P_e``.

    f is the share of the tokens whose best expert is e, P the mean of its probability; 1 if even.

    Args:
        probability_TE: probabilities of the gate, shape (T, E).

    Returns:
        float32 scalar; the gradient flows through P.
    """
    tokens, experts = probability_TE.shape
    best_T = probability_TE.argmax(-1)
    share_E = torch.bincount(best_T, minlength=experts).to(probability_TE.dtype) / max(tokens, 1)
    return experts * (share_E * probability_TE.sum(0)).sum() / max(tokens, 1)


def active_balance_loss(routing: Routing) -> Tensor:
    """Load-balance loss of a routing with several experts a token: ``E * sum_e f_e P_e``.

    f is the share of the active pairs that expert e has, P the mean of its probability; 1 if even.

    Returns:
        float32 scalar; the gradient flows through P.
    """
    probability_TE = routing.probability_TE
    assert probability_TE is not None
    load_E = routing.load_E().to(probability_TE.dtype)
    share_E = load_E / load_E.sum().clamp(min=1)
    return routing.experts * (share_E * probability_TE.sum(0)).sum() / max(routing.tokens, 1)


def penalty_loss(routing: Routing, width_E: Tensor) -> Tensor:
    """P-Penalty of HMoE (arXiv 2408.10681): ``E * sum_e M_e P_e``.

    P is the mean of the probability of expert e, M the share of the tokens for which it is active times its
    width, in units of the mean width: with equal widths this is the classical balance loss.

    Args:
        routing: a routing with probabilities.
        width_E: hidden units of each expert.

    Returns:
        float32 scalar; the gradient flows through P.
    """
    probability_TE = routing.probability_TE
    assert probability_TE is not None
    tokens = max(routing.tokens, 1)
    width_E = width_E.to(probability_TE)
    active_E = routing.load_E().to(probability_TE.dtype) / tokens
    size_E = active_E * width_E / width_E.mean()
    return routing.experts * (size_E * probability_TE.sum(0)).sum() / tokens


def z_loss(logits_TE: Tensor) -> Tensor:
    """Router z-loss of ST-MoE (arXiv 2202.08906): mean over tokens of ``logsumexp(logits)^2``."""
    return logits_TE.logsumexp(-1).square().sum() / max(logits_TE.shape[0], 1)


def entropy(probability_TE: Tensor) -> Tensor:
    """Entropy in nats of each row's distribution; 0 log 0 = 0.

    Args:
        probability_TE: probabilities, shape (T, E), rows sum to 1.

    Returns:
        shape (T,).
    """
    # not xlogy, the gradient of which is NaN at 0
    log_TE = probability_TE.masked_fill(probability_TE <= 0, 1).log()
    return -(probability_TE * log_TE).sum(-1)


def mean_entropy(probability_TE: Tensor) -> Tensor:
    """Mean over tokens of ``entropy``; to be minimised so that few experts suffice (HMoE's Top-P)."""
    return entropy(probability_TE).sum() / max(probability_TE.shape[0], 1)
