"""Switch routing (arXiv 2101.03961)."""

from typing import Any

from torch import Tensor

from ..capacity import limit_load
from ..losses import top1_balance_loss
from ..routing import Routing, RoutingContext
from .router import LinearRouter, Renormalize, divisor, float32, top1_routing


class SwitchRouter(LinearRouter):
    """Each token to the expert of the highest gate probability p, with weight p.

    Losses: ``balance``, ``E * sum_e f_e P_e``, with f the share of the tokens whose best expert is e, before
    any are dropped, and P the mean probability; ``entropy``, the mean entropy of the probabilities, and
    ``z``, ST-MoE's z-loss, both without weight as published.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        jitter: while training, the gate's input is multiplied by U(1 - jitter, 1 + jitter).
        capacity_factor: c: an expert takes at most ``ceil(c T / E)`` tokens, the first ones; for the others
            only the residual connection is left.  0: no limit.
        renormalize: with ``always`` or ``straight-through`` the weight is 1, see ``router.divisor``; ours.
        options: those of ``LinearRouter``.
    """

    loss_weights = {"balance": 0.01, "entropy": 0.0, "z": 0.0}
    one_expert = True

    def __init__(
        self,
        dim: int,
        experts: int,
        jitter: float = 0.01,
        capacity_factor: float = 0.0,
        renormalize: Renormalize = Renormalize.never,
        **options: Any,
    ) -> None:
        super().__init__(dim, experts, **options)
        self.jitter = jitter
        self.renormalize = Renormalize(renormalize)
        self.capacity_factor = capacity_factor

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class."""
        if self.training and self.jitter > 0:
            x_TD = float32(x_TD)
            x_TD = x_TD * (1 + self.jitter * (2 * context.uniform(x_TD) - 1))
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        weight_T, expert_T = probability_TE.max(-1)
        if self.renormalize != Renormalize.never:
            weight_T = weight_T / divisor(weight_T, self.renormalize)
        routing = top1_routing(expert_T, weight_T, self.experts)
        limit_load(routing, self.capacity_factor, ranks=context.ranks)
        if context.wants("balance"):
            routing.losses["balance"] = top1_balance_loss(probability_TE, context.ranks)
        return self.with_gate(routing, logits_TE, probability_TE, context)
