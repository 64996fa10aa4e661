"""The Dense-To-Sparse gate of EvoMoE (arXiv 2112.14397)."""

from dataclasses import dataclass
from enum import Enum
from typing import Iterator

import torch
from torch import Tensor

from ..losses import active_balance_loss, balance_loss, top1_balance_loss
from ..options import OptionError, loss_weight, option
from ..routing import Routing, RoutingContext, at_pairs
from .balanced import BalancedRouter, chosen
from .registry import register_router
from .router import BALANCE, RENORMALIZE, Renormalize, at_most_all, divisor


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


@register_router("dts")
class DenseToSparseRouter(BalancedRouter):
    """Gumbel-softmax gate whose temperature falls, so that fewer and fewer experts pass a threshold.

    In training, with noise ``g ~ Gumbel(0, 1)``, temperature ``tau`` and threshold ``c``::

        y_te = softmax_e((logits_te + g_te) / tau)
        mask = y > c, and the k best experts of each token in any case   (soft stage)
        mask = the k best experts of each token by y, k = 1 as published (hard stage)
        weight = softmax(logits), or y with ``gate_weight="gumbel"``

    As published, weights are not renormalised after masking.  In evaluation there is no noise: ``top1``
    sends a token to the k best experts by ``softmax(logits)``, ``adaptive`` to every expert with
    ``softmax(logits / tau) > c`` (and to the k best in any case).  With ``threshold`` 0 every expert is over
    it, however small a number its probability is: a soft stage without an end, with the weights
    ``softmax(logits)``, is then the dense training of DS-MoE (arXiv 2404.05567), and ``top1`` its inference.

    With ``balance`` bias or quantile, which is ours, experts are chosen by y plus bias, see ``LoadBias``, in
    evaluation by ``softmax(logits / tau)`` plus bias.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``.
    """

    @dataclass(frozen=True)
    class Options(BalancedRouter.Options):
        """The Dense-To-Sparse gate's threshold, noise, weights and losses, as published unless given."""

        threshold: float = option(
            0.001,
            "An expert is active for a token when its gate probability is over this threshold; the best "
            "expert is always active.",
            at_least=0,
            below=1,
        )
        gate_weight: GateWeight = option(
            "softmax",
            "Probability that weighs an expert's output while training: softmax is that of the plain "
            "logits, gumbel that of the logits with noise and temperature.",
        )
        gate_noise: GateNoise = option(
            "always",
            "Stages of training in which the Dense-To-Sparse gate has noise: always, as published, or in "
            "the soft stage only, so that a token then goes where it goes in evaluation.",
        )
        renormalize: Renormalize = option("never", RENORMALIZE)
        balance_form: BalanceForm = option(
            "published",
            "Load-balance loss of the Dense-To-Sparse gate: published, of the experts' weights, which is E "
            "for a dense uniform gate; normalized, of the gate's probabilities, which is Switch's and 1 "
            "for an even load in all stages.",
        )
        eval_routing: EvalRouting = option(
            "top1",
            "Routing in evaluation, which has no noise: top1 sends a token to its best expert (to its "
            "moe-hard-experts best), adaptive to every expert over the threshold at the temperature reached.",
        )
        hard_experts: int = option(
            1,
            "Experts of each token from the hard update on, and in evaluation: for narrow experts, of "
            "which a token gets several for the cost of one.",
            at_least=1,
        )
        balance_weight: float = loss_weight(0.0, BALANCE)

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from super().contradictions(experts)
            yield from at_most_all(self, "hard_experts", experts)

    options: "DenseToSparseRouter.Options"
    stages = True
    anneals = True
    experts_per_token = "hard_experts"

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  Losses: ``balance``, and those of ``with_gate``."""
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        hard = context.hard if self.training else self.options.eval_routing == EvalRouting.top1
        softmax = self.options.gate_weight == GateWeight.softmax
        if self.training and (not hard or self.options.gate_noise == GateNoise.always):
            y_TE = ((logits_TE + gumbel(logits_TE, context)) / context.temperature).softmax(-1)
        elif hard and self.balancing is None and (softmax or not self.training):
            y_TE = probability_TE  # the k best are the same at any temperature, unless something is added
        else:
            y_TE = (logits_TE / context.temperature).softmax(-1)
        # the temperature weighs while training, and where it says which experts there are
        weight_TE = probability_TE if softmax or (hard and not self.training) else y_TE

        k = self.options.hard_experts
        choice_TE = y_TE if self.balancing is None else self.choice(y_TE)
        best_TK = choice_TE.topk(k).indices if k > 1 else choice_TE.argmax(-1, True)
        if hard:
            token_N = torch.arange(x_TD.shape[0], device=x_TD.device)
            token_N = token_N if k == 1 else token_N.repeat_interleave(k)
            expert_N = best_TK.flatten()
            weight_N = weight_TE.gather(1, best_TK).flatten()
            mask_TE = None if self.balancing is None else chosen(best_TK, self.experts)
        else:
            mask_TE = self._over_threshold(choice_TE).scatter(1, best_TK, True)
            token_N, expert_N = mask_TE.nonzero(as_tuple=True)
            weight_N = at_pairs(weight_TE, token_N, expert_N)
        if mask_TE is not None:
            self.watch(y_TE, choice_TE, mask_TE)
        if self.options.renormalize != Renormalize.never:
            total_T = weight_N.new_zeros(x_TD.shape[0]).index_add(0, token_N, weight_N)
            weight_N = weight_N / divisor(total_T, self.options.renormalize)[token_N]
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

    def _over_threshold(self, choice_TE: Tensor) -> Tensor:
        if self.options.threshold == 0 and self.balancing is None:
            return torch.ones_like(choice_TE, dtype=torch.bool)  # a probability may be rounded to 0
        return choice_TE > self.options.threshold

    def _balance(self, routing: Routing, probability_TE: Tensor, context: RoutingContext) -> Tensor:
        """The load-balance loss; the published one is of Switch's form in evaluation (authors' code)."""
        if self.options.balance_form == BalanceForm.normalized:
            return active_balance_loss(routing, context.ranks, self.balance_factor)
        if not self.training:
            return top1_balance_loss(probability_TE, context.ranks, self.balance_factor)
        return balance_loss(routing, context.ranks, self.balance_factor)


def gumbel(like: Tensor, context: RoutingContext) -> Tensor:
    """Independent samples of Gumbel(0, 1) in the shape of ``like``, (T, E), from ``context.uniform``."""
    uniform = context.uniform(like)
    # in [0, 1), where 0 has no logarithm and neither has that of 1, which rounding can make of it
    exponential = -uniform.clamp_(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps).log()
    return -exponential.log()
