"""Auxiliary losses of routers: pure functions of float32 tensors.  Suffixes: see ``routing.py``.

On several ranks each is the loss of all their tokens as one batch, the same number on every rank.
"""

from typing import Optional

from torch import Tensor

from .ranks import ALONE, Ranks
from .routing import Routing, count_experts


def balance_loss(routing: Routing, ranks: Ranks = ALONE, factor_E: Optional[Tensor] = None) -> Tensor:
    """Load-balance loss: ``E^2 * mean_e(mean_t(gate_te) * mean_t(mask_te))``.

    ``gate`` is the weight with which an expert's output is used and ``mask`` whether it is used at
    all (EvoMoE, arXiv 2112.14397, as in the authors' code; for top-1 the loss of Switch but for the
    probabilities of experts that are not chosen).  It is 1 for a balanced, confident top-1 routing and E
    for a uniform dense one.

    Args:
        routing: the active pairs.
        ranks: those over whose tokens the means are taken.
        factor_E: see ``product_of_means``.

    Returns:
        float32 scalar; the gradient flows through the weights.
    """
    gate_E = routing.weight_N.new_zeros(routing.experts).index_add(0, routing.expert_N, routing.weight_N)
    return product_of_means(routing.load_E(), gate_E, routing.tokens, ranks, factor_E)


def top1_balance_loss(
    probability_TE: Tensor, ranks: Ranks = ALONE, factor_E: Optional[Tensor] = None
) -> Tensor:
    """Load-balance loss of Switch (arXiv 2101.03961) and GShard: ``E * sum_e f_e P_e``.

    f is the share of the tokens whose best expert is e, P the mean of its probability; 1 if even.

    Args:
        probability_TE: probabilities of the gate, shape (T, E).
        ranks: those over whose tokens the means are taken.
        factor_E: see ``product_of_means``.

    Returns:
        float32 scalar; the gradient flows through P.
    """
    tokens, experts = probability_TE.shape
    best_E = count_experts(probability_TE.argmax(-1), experts)
    return product_of_means(best_E, probability_TE.sum(0), tokens, ranks, factor_E)


def choices_balance_loss(
    expert_TK: Tensor, probability_TE: Tensor, ranks: Ranks = ALONE, factor_E: Optional[Tensor] = None
) -> Tensor:
    """Load-balance loss of Mixtral (arXiv 2401.04088, as in its public code): ``E * sum_e f_e P_e``.

    f is how many of a token's k choices are expert e on average, P the mean of its probability; k if even.

    Args:
        expert_TK: int64, the choices of each token.
        probability_TE: probabilities of the gate, shape (T, E).
        ranks: those over whose tokens the means are taken.
        factor_E: see ``product_of_means``.

    Returns:
        float32 scalar; the gradient flows through P.
    """
    tokens, experts = probability_TE.shape
    load_E = count_experts(expert_TK.flatten(), experts)
    return product_of_means(load_E, probability_TE.sum(0), tokens, ranks, factor_E)


def active_balance_loss(routing: Routing, ranks: Ranks = ALONE, factor_E: Optional[Tensor] = None) -> Tensor:
    """Load-balance loss of a routing with several experts a token: ``E * sum_e f_e P_e``.

    f is the share of the active pairs that expert e has, P the mean of its probability; 1 if even.

    Returns:
        float32 scalar; the gradient flows through P.
    """
    probability_TE = routing.probability_TE
    assert probability_TE is not None
    load_E = routing.load_E().to(probability_TE.dtype)
    load_E, probability_E, tokens = ranks.total(load_E, probability_TE.sum(0), routing.tokens)
    share_E = load_E / load_E.sum().clamp(min=1)
    if factor_E is not None:
        share_E = share_E * factor_E.to(share_E)
    return routing.experts * (share_E * probability_E).sum() / tokens.clamp(min=1)


def penalty_loss(routing: Routing, width_E: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """P-Penalty of HMoE (arXiv 2408.10681): ``E * sum_e M_e P_e``.

    P is the mean of the probability of expert e, M the share of the tokens for which it is active times its
    width, in units of the mean width: with equal widths this is the classical balance loss.

    Args:
        routing: a routing with probabilities.
        width_E: hidden units of each expert.
        ranks: those over whose tokens the means are taken.

    Returns:
        float32 scalar; the gradient flows through P.
    """
    probability_TE = routing.probability_TE
    assert probability_TE is not None
    width_E = width_E.to(probability_TE)
    size_E = routing.load_E().to(probability_TE.dtype) * width_E / width_E.mean()
    return product_of_means(size_E, probability_TE.sum(0), routing.tokens, ranks)


def product_of_means(
    load_E: Tensor, gate_E: Tensor, tokens: int, ranks: Ranks, factor_E: Optional[Tensor] = None
) -> Tensor:
    """``E * sum_e (load_e / T) (gate_e / T)``, of sums over all ranks.

    Args:
        load_E: how many of this rank's tokens have each expert.
        gate_E: sum over them of what the gate gives each expert.
        tokens: T of this rank.
        ranks: those whose tokens count as one batch.
        factor_E: factor of each expert's product; ``None``: 1.
    """
    gate_E = gate_E if factor_E is None else gate_E * factor_E.to(gate_E)
    load_E, gate_E, total = ranks.total(load_E.to(gate_E.dtype), gate_E, tokens)
    return load_E.shape[0] * (load_E * gate_E).sum() / total.clamp(min=1).square()


def mean(value_T: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Mean of a value over the tokens of all ranks; 0 if there are none."""
    total, tokens = ranks.total(value_T.sum(), value_T.shape[0])
    return total / tokens.clamp(min=1)


def z_loss(logits_TE: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Router z-loss of ST-MoE (arXiv 2202.08906): mean over tokens of ``logsumexp(logits)^2``."""
    return mean(logits_TE.logsumexp(-1).square(), ranks)


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


def mean_entropy(probability_TE: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Mean over tokens of ``entropy``; to be minimised so that few experts suffice (HMoE's Top-P)."""
    return mean(entropy(probability_TE), ranks)


def mutual_information_loss(probability_TE: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """How little an expert tells of its tokens (arXiv 2404.05567): ``mean_t H(P_t) - H(mean_t P_t)``.

    That is minus the mutual information of tokens and experts: 0 if all tokens have one distribution, and
    ``-log E`` if each has one expert and the experts have as many tokens.

    Args:
        probability_TE: probabilities of the gate, shape (T, E), rows sum to 1.
        ranks: those over whose tokens the means are taken.

    Returns:
        float32 scalar; 0 if there are no tokens.
    """
    total_E, entropies, tokens = ranks.total(
        probability_TE.sum(0), entropy(probability_TE).sum(), probability_TE.shape[0]
    )
    tokens = tokens.clamp(min=1)
    return entropies / tokens - entropy(total_E / tokens)
