"""Switch routing (arXiv 2101.03961)."""

from dataclasses import dataclass

from torch import Tensor

from ..capacity import CAPACITY, EVAL_CAPACITY, drop_overflow
from ..losses import top1_balance_loss
from ..options import loss_weight, option
from ..routing import Routing, RoutingContext
from .balanced import BalancedRouter
from .registry import register_router
from .router import (
    BALANCE,
    RENORMALIZE,
    Renormalize,
    divisor,
    float32,
    top1_routing,
)


@register_router("switch")
class SwitchRouter(BalancedRouter):
    """Each token to the expert of the highest gate probability p, with weight p.

    With ``balance`` bias or quantile the expert is that of the highest p plus bias, see ``LoadBias``.

    Losses: ``balance``, ``E * sum_e f_e P_e``, with f the share of the tokens whose best expert is e, before
    any are dropped, and P the mean probability; ``entropy``, the mean entropy of the probabilities, and
    ``z``, ST-MoE's z-loss, both without weight as published.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``.  With a capacity factor c an expert takes at most ``floor(c ceil(T / E))``
            tokens in training, the first ones; for the others only the residual connection is left.  Unless
            ``renormalize`` is never, which is ours, the weight is 1, see ``router.divisor``.
    """

    @dataclass(frozen=True)
    class Options(BalancedRouter.Options):
        """Switch's noise, capacity and loss."""

        jitter: float = option(
            0.01,
            "While training, the gate's input is multiplied by random numbers from 1 - jitter to 1 + jitter.",
            at_least=0,
            below=1,
        )
        capacity_factor: float = option(0.0, CAPACITY, at_least=0)
        eval_capacity_factor: float = option(0.0, EVAL_CAPACITY, at_least=0)
        renormalize: Renormalize = option("never", RENORMALIZE)
        balance_weight: float = loss_weight(0.01, BALANCE)

    options: "SwitchRouter.Options"
    one_expert = True

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class."""
        if self.training and self.options.jitter > 0:
            x_TD = float32(x_TD)
            x_TD = x_TD * (1 + self.options.jitter * (2 * context.uniform(x_TD) - 1))
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        if self.balancing is None:
            weight_T, expert_T = probability_TE.max(-1)
        else:
            weight_T, expert_T = (best_T1.squeeze(1) for best_T1 in self.best(probability_TE, 1))
        if self.options.renormalize != Renormalize.never:
            weight_T = weight_T / divisor(weight_T, self.options.renormalize)
        routing = top1_routing(expert_T, weight_T, self.experts)
        drop_overflow(routing, self.options, self.training, context)
        if context.wants("balance"):
            routing.losses["balance"] = top1_balance_loss(probability_TE, context.ranks, self.balance_factor)
        return self.with_gate(routing, logits_TE, probability_TE, context)
