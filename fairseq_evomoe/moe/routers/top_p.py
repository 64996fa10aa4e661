"""Top-p routing (arXiv 2403.07652)."""

from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses import active_balance_loss
from ..options import like, loss_weight, option
from ..routing import Routing, RoutingContext, at_pairs
from ..running_sums import running_sums
from .balanced import BalancedRouter
from .registry import register_router
from .router import BALANCE, RENORMALIZE, LinearRouter, Renormalize, divisor


@register_router("top-p")
class TopPRouter(BalancedRouter):
    """Each token to the fewest experts that together have the gate probability ``top_p``.

    With ``p = softmax(x W^T)``, experts are taken from the largest p on, up to and including the one with
    which the sum of their p reaches ``top_p``; a token has at least one.  The weight of an expert is its p,
    divided by the sum over the chosen ones unless ``renormalize`` is ``never``.  Losses: ``balance``,
    ``E * sum_e f_e P_e`` with f the share of the active pairs; ``entropy``, the mean entropy of p, which
    keeps the number of experts low; ``z``, ST-MoE's z-loss.  HMoE (arXiv 2408.10681) uses ``top_p`` 0.6 and
    ``always``.  With ``balance`` bias or quantile they are taken from the largest p plus bias on, see
    ``LoadBias``, until their p without it reach ``top_p``; how many that are depends on the order, so that
    a quantile, which takes their number as given, leaves loads less even than with other routers.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``.
    """

    @dataclass(frozen=True)
    class Options(BalancedRouter.Options):
        """How much of the gate's probability a token's experts have, and the losses."""

        top_p: float = option(
            0.4,
            "Each token goes to the fewest experts whose probabilities sum to at least this.",
            above=0,
            at_most=1,
        )
        renormalize: Renormalize = option("never", RENORMALIZE)
        balance_weight: float = loss_weight(0.01, BALANCE)
        entropy_weight: float = like(LinearRouter.Options, "entropy_weight", 1e-4)

    options: "TopPRouter.Options"

    @property
    def top_p(self) -> Union[float, Tensor]:
        """The probability that a token's experts have together at least."""
        return self.options.top_p

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class."""
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        # column r: the expert of rank r; it is needed as long as those before it do not reach top_p
        choice_TE = probability_TE if self.balancing is None else self.choice(probability_TE)
        sorted_TE, expert_TE = choice_TE.sort(dim=-1, descending=True)
        if self.balancing is not None:
            sorted_TE = probability_TE.gather(1, expert_TE)
        before_TE = F.pad(running_sums(sorted_TE)[:, :-1], (1, 0))
        chosen_TE = before_TE < self.top_p
        if self.balancing is not None:
            mask_TE = torch.zeros_like(chosen_TE).scatter(1, expert_TE, chosen_TE)
            self.watch(probability_TE, choice_TE, mask_TE)
        weight_TE = sorted_TE
        if self.options.renormalize != Renormalize.never:
            total_T1 = (weight_TE * chosen_TE).sum(-1, keepdim=True)
            weight_TE = weight_TE / divisor(total_T1, self.options.renormalize)

        token_N, rank_N = chosen_TE.nonzero(as_tuple=True)
        routing = Routing(
            token_N=token_N,
            expert_N=at_pairs(expert_TE, token_N, rank_N),
            weight_N=at_pairs(weight_TE, token_N, rank_N),
            tokens=x_TD.shape[0],
            experts=self.experts,
            probability_TE=probability_TE,
        )
        if context.wants("balance"):
            routing.losses["balance"] = active_balance_loss(routing, context.ranks, self.balance_factor)
        return self.with_gate(routing, logits_TE, probability_TE, context)
