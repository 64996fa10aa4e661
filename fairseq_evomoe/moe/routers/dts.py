"""The Dense-To-Sparse gate of EvoMoE (arXiv 2112.14397)."""

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..losses import active_balance_loss, balance_loss, top1_balance_loss
from ..routing import Routing, RoutingContext
from .router import LinearRouter, Renormalize, divisor


class GateWeight(str, Enum):
    """Which probability weighs an expert's output."""

    softmax = "softmax"
    gumbel = "gumbel"


class GateNoise(str, Enum):
    """In which stages of training the gate has noise."""

    always = "always"
    soft = "soft"


class BalanceForm(str, Enum):
    """Which load-balance loss the gate has."""

    published = "published"
    normalized = "normalized"


class EvalRouting(str, Enum):
    """How many experts a token has in evaluation: as in the hard stage, or as in the soft one."""

    top1 = "top1"
    adaptive = "adaptive"


class DenseToSparseRouter(LinearRouter):
    """Gumbel-softmax gate whose temperature falls, so that fewer and fewer experts pass a threshold.

    In training, with noise ``g ~ Gumbel(0, 1)``, temperature ``tau`` and threshold ``c``::

        y_te = softmax_e((logits_te + g_te) / tau)
        mask = y > c, and the k best experts of each token in any case   (soft stage)
        mask = the k best experts of each token by y, k = 1 as published (hard stage)
        weight = softmax(logits), or y with ``gate_weight="gumbel"``

    As published, weights are not renormalised after masking.  In evaluation there is no noise: ``top1``
    sends a token to the k best experts by ``softmax(logits)``, ``adaptive`` to every expert with
    ``softmax(logits / tau) > c`` (and to the k best in any case).

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        threshold: c, in [0, 1).
        gate_weight: see above.
        gate_noise: ``soft``, ours, leaves the noise out in the hard stage, so that a token goes where it
            goes in evaluation; ``always`` is as published.
        renormalize: divide the weights of a token's experts by their sum, see ``router.divisor``; ours.
        balance_form: ``published`` is ``losses.balance_loss`` of the weights, E for a dense uniform gate and
            1 for an even and confident top-1, and in evaluation ``losses.top1_balance_loss``;
            ``normalized``, ours, is ``losses.active_balance_loss`` of the probabilities, that of Switch: 1
            for an even load in all stages, and then without gradient.
        eval_routing: see above.
        hard_experts: k, from 1 to E: more than the published 1 are for narrow experts, of which a token
            gets as many for the same cost (arXiv 2401.06066); ours.
        options: those of ``LinearRouter``.
    """

    loss_weights = {"balance": 0.0, "entropy": 0.0, "z": 0.0}
    stages = True
    anneals = True

    def __init__(
        self,
        dim: int,
        experts: int,
        threshold: float = 0.001,
        gate_weight: GateWeight = GateWeight.softmax,
        gate_noise: GateNoise = GateNoise.soft,
        renormalize: Renormalize = Renormalize.never,
        balance_form: BalanceForm = BalanceForm.published,
        eval_routing: EvalRouting = EvalRouting.top1,
        hard_experts: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(dim, experts, **options)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), but is {threshold}")
        self.threshold = threshold
        self.gate_weight = GateWeight(gate_weight)
        self.gate_noise = GateNoise(gate_noise)
        self.renormalize = Renormalize(renormalize)
        self.balance_form = BalanceForm(balance_form)
        self.eval_routing = EvalRouting(eval_routing)
        if not 1 <= hard_experts <= experts:
            raise ValueError(f"hard_experts must be from 1 to the {experts} experts, but is {hard_experts}")
        self.hard_experts = hard_experts

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  Losses: ``balance``, ``entropy``, ``z``."""
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        hard = context.hard if self.training else self.eval_routing == EvalRouting.top1
        if self.training and (not hard or self.gate_noise == GateNoise.always):
            y_TE = ((logits_TE + gumbel(logits_TE, context)) / context.temperature).softmax(-1)
        elif hard and (self.gate_weight == GateWeight.softmax or not self.training):
            y_TE = probability_TE  # the k best are the same at any temperature
        else:
            y_TE = (logits_TE / context.temperature).softmax(-1)
        weight_TE = y_TE if self.gate_weight == GateWeight.gumbel else probability_TE

        k = self.hard_experts
        best_TK = y_TE.topk(k).indices if k > 1 else y_TE.argmax(-1, True)
        if hard:
            token_N = torch.arange(x_TD.shape[0], device=x_TD.device).repeat_interleave(k)
            expert_N = best_TK.flatten()
            weight_N = weight_TE.gather(1, best_TK).flatten()
        else:
            mask_TE = (y_TE > self.threshold).scatter(1, best_TK, True)
            token_N, expert_N = mask_TE.nonzero(as_tuple=True)
            weight_N = weight_TE[token_N, expert_N]
        if self.renormalize != Renormalize.never:
            total_T = weight_N.new_zeros(x_TD.shape[0]).index_add(0, token_N, weight_N)
            weight_N = weight_N / divisor(total_T, self.renormalize)[token_N]
        routing = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=weight_N,
            tokens=x_TD.shape[0],
            experts=self.experts,
            probability_TE=probability_TE,
        )
        if context.wants("balance"):
            routing.losses["balance"] = self._balance(routing, probability_TE, context)
        return self.with_gate(routing, logits_TE, probability_TE, context)

    def _balance(self, routing: Routing, probability_TE: Tensor, context: RoutingContext) -> Tensor:
        """The load-balance loss; of Switch's form in evaluation, as in the authors' code."""
        if self.balance_form == BalanceForm.normalized:
            return active_balance_loss(routing, context.ranks)
        if not self.training:
            return top1_balance_loss(probability_TE, context.ranks)
        return balance_loss(routing, context.ranks)


def gumbel(like: Tensor, context: RoutingContext) -> Tensor:
    """Independent samples of Gumbel(0, 1) in the shape of ``like``, (T, E), from ``context.uniform``."""
    uniform = context.uniform(like)
    # in [0, 1), where 0 has no logarithm and neither has that of 1, which rounding can make of it
    exponential = -uniform.clamp_(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps).log()
    return -exponential.log()
