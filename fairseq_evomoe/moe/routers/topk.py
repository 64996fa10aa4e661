"""Top-k routing as in GShard (arXiv 2006.16668) and Mixtral (arXiv 2401.04088)."""

from dataclasses import dataclass
from enum import Enum
from typing import Iterator

import torch
from torch import Tensor

from ..capacity import CAPACITY, EVAL_CAPACITY, drop_overflow, keep_pairs
from ..losses import choices_balance_loss, top1_balance_loss
from ..options import OptionError, loss_weight, option
from ..routing import Routing, RoutingContext
from .balanced import BalancedRouter
from .registry import register_router
from .router import (
    BALANCE,
    RENORMALIZE,
    TOP_K,
    Renormalize,
    at_most_all,
    divisor,
    topk_routing,
)


class BalanceChoices(str, Enum):
    """Which of a token's experts the load-balance loss counts."""

    all = "all"
    first = "first"


@register_router("topk")
class TopKRouter(BalancedRouter):
    """Each token to the k experts of the highest gate probability.

    With ``p = softmax(x W^T)``, the weight of a chosen expert is its p, divided by the sum over the chosen
    ones unless ``renormalize`` is ``never``.  While training, ``random_second`` keeps a second expert with
    probability ``min(1, 2 w)``, where w is its weight, as GShard does.  With ``balance`` bias or quantile the
    chosen ones are those of the highest p plus bias, see ``LoadBias``.

    Losses: ``balance``, ``E * sum_e f_e P_e`` with P the mean of p and f how many of a token's choices are e
    on average: all k of them, as in Mixtral, or with ``balance_choices`` first, as in GShard, the first one
    alone; k or 1 for an even load.  ``entropy``, the mean entropy of p; ``z``, ST-MoE's z-loss.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``; k is ``top_k``.
    """

    @dataclass(frozen=True)
    class Options(BalancedRouter.Options):
        """How many experts a token has, and their weights."""

        top_k: int = option(2, TOP_K, at_least=1)
        renormalize: Renormalize = option("always", RENORMALIZE)
        random_second: bool = option(
            False,
            "While training, use the second expert with a probability of twice its weight, as GShard does; "
            "needs moe-top-k 2.",
        )
        capacity_factor: float = option(0.0, CAPACITY, at_least=0)
        eval_capacity_factor: float = option(0.0, EVAL_CAPACITY, at_least=0)
        balance_weight: float = loss_weight(0.01, BALANCE)
        balance_choices: BalanceChoices = option(
            "all",
            "The experts of a token that the load-balance loss of a top-k gate counts: all, as in Mixtral, "
            "or the first, as in GShard.",
        )

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from super().contradictions(experts)
            yield from at_most_all(self, "top_k", experts)
            if self.random_second and (self.top_k != 2 or self.renormalize == Renormalize.never):
                yield OptionError(
                    "random_second",
                    "`random_second` draws one of two experts by its share of their weights: it needs "
                    "`top_k` 2 and `renormalize` always.",
                )

    options: "TopKRouter.Options"
    experts_per_token = "top_k"

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class."""
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        if self.balancing is None:
            weight_TK, expert_TK = probability_TE.topk(self.options.top_k, dim=-1)
        else:
            weight_TK, expert_TK = self.best(probability_TE, self.options.top_k)
        renormalize = self.options.renormalize
        if renormalize != Renormalize.never:
            weight_TK = weight_TK / divisor(weight_TK.sum(-1, keepdim=True), renormalize)
        routing = topk_routing(expert_TK, weight_TK, self.experts)
        if self.options.random_second and self.training:
            self._draw_second(routing, context)
        drop_overflow(routing, self.options, self.training, context, self.options.top_k)
        if context.wants("balance"):
            routing.losses["balance"] = self.balance(expert_TK, probability_TE, context)
        return self.with_gate(routing, logits_TE, probability_TE, context)

    def balance(self, expert_TK: Tensor, probability_TE: Tensor, context: RoutingContext) -> Tensor:
        """The load-balance loss, of the choices before any are dropped."""
        if self.options.balance_choices == BalanceChoices.first:
            return top1_balance_loss(probability_TE, context.ranks, self.balance_factor)
        return choices_balance_loss(expert_TK, probability_TE, context.ranks, self.balance_factor)

    def _draw_second(self, routing: Routing, context: RoutingContext) -> None:
        # of two weights the second is at most a half, so that the first expert is always kept
        weight_N = routing.weight_N.detach()
        draw_T1 = context.uniform(weight_N[: routing.tokens].unsqueeze(1))
        keep_pairs(routing, torch.cat([torch.zeros_like(draw_T1), draw_T1]).squeeze(1) < 2 * weight_N)
