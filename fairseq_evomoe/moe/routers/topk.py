"""Top-k routing as in GShard (arXiv 2006.16668) and Mixtral (arXiv 2401.04088)."""

from typing import Any

import torch
from torch import Tensor

from ..capacity import keep_pairs, limit_load
from ..losses import top1_balance_loss
from ..routing import Routing, RoutingContext
from .router import LinearRouter, Renormalize, check_top_k, divisor, topk_routing


class TopKRouter(LinearRouter):
    """Each token to the k experts of the highest gate probability.

    With ``p = softmax(x W^T)``, the weight of a chosen expert is its p, divided by the sum over the chosen
    ones unless ``renormalize`` is ``never``.  Losses: ``balance``, the one of Switch and GShard; ``entropy``,
    the mean entropy of p; ``z``, ST-MoE's z-loss.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        top_k: k, from 1 to E.
        renormalize: whether the weights of a token sum to 1, as in GShard and Mixtral; see
            ``router.divisor``.
        random_second: while training, keep a second expert with probability ``min(1, 2 w)``, where w is its
            weight, as GShard does; needs k = 2 and ``renormalize``.
        capacity_factor: c: an expert takes at most ``ceil(c k T / E)`` tokens, best experts first, then
            second ones, in the order of the tokens.  0: no limit.
        options: those of ``LinearRouter``.
    """

    loss_weights = {"balance": 0.01, "entropy": 0.0, "z": 0.0}

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int = 2,
        renormalize: Renormalize = Renormalize.always,
        random_second: bool = False,
        capacity_factor: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, experts, **options)
        check_top_k(top_k, experts)
        self.renormalize = Renormalize(renormalize)
        if random_second and not (top_k == 2 and self.renormalize != Renormalize.never):
            raise ValueError("random_second needs top_k 2 and renormalize")
        self.top_k = top_k
        self.random_second = random_second
        self.capacity_factor = capacity_factor

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class."""
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        weight_TK, expert_TK = probability_TE.topk(self.top_k, dim=-1)
        if self.renormalize != Renormalize.never:
            weight_TK = weight_TK / divisor(weight_TK.sum(-1, keepdim=True), self.renormalize)
        routing = topk_routing(expert_TK, weight_TK, self.experts)
        if self.random_second and self.training:
            self._draw_second(routing, context)
        limit_load(routing, self.capacity_factor, self.top_k, context.ranks)
        if context.wants("balance"):
            routing.losses["balance"] = top1_balance_loss(probability_TE, context.ranks)
        return self.with_gate(routing, logits_TE, probability_TE, context)

    def _draw_second(self, routing: Routing, context: RoutingContext) -> None:
        # of two weights the second is at most a half, so that the first expert is always kept
        weight_N = routing.weight_N.detach()
        draw_T1 = context.uniform(weight_N[: routing.tokens].unsqueeze(1))
        keep_pairs(routing, torch.cat([torch.zeros_like(draw_T1), draw_T1]).squeeze(1) < 2 * weight_N)
