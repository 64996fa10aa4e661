"""Top-p routing (arXiv 2403.07652)."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..losses import active_balance_loss
from ..routing import Routing, RoutingContext
from .router import LinearRouter, Renormalize, divisor


class TopPRouter(LinearRouter):
    """Each token to the fewest experts that together have the gate probability ``top_p``.

    With ``p = softmax(x W^T)``, experts are taken from the largest p on, up to and including the one with
    which the sum of their p reaches ``top_p``; a token has at least one.  The weight of an expert is its p,
    divided by the sum over the chosen ones unless ``renormalize`` is ``never``.  Losses: ``balance``,
    ``E * sum_e f_e P_e`` with f the share of the active pairs; ``entropy``, the mean entropy of p, which
    keeps the number of experts low; ``z``, ST-MoE's z-loss.  HMoE (arXiv 2408.10681) uses ``top_p`` 0.6 and
    ``always``.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        top_p: the probability to reach, greater than 0, at most 1.
        renormalize: whether the weights of a token sum to 1; see ``router.divisor``.
        options: those of ``LinearRouter``.
    """

    loss_weights = {"balance": 0.01, "entropy": 1e-4, "z": 0.0}

    def __init__(
        self,
        dim: int,
        experts: int,
        top_p: float = 0.4,
        renormalize: Renormalize = Renormalize.never,
        **options: Any,
    ) -> None:
        super().__init__(dim, experts, **options)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, but is {top_p}")
        self.top_p = top_p
        self.renormalize = Renormalize(renormalize)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class."""
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        # column r: the expert of rank r; it is needed as long as those before it do not reach top_p
        sorted_TE, expert_TE = probability_TE.sort(dim=-1, descending=True)
        before_TE = F.pad(sorted_TE.detach().cumsum(-1)[:, :-1], (1, 0))
        chosen_TE = before_TE < self.top_p
        weight_TE = sorted_TE
        if self.renormalize != Renormalize.never:
            total_T1 = (weight_TE * chosen_TE).sum(-1, keepdim=True)
            weight_TE = weight_TE / divisor(total_T1, self.renormalize)

        token_N, rank_N = chosen_TE.nonzero(as_tuple=True)
        routing = Routing(
            token_N=token_N,
            expert_N=expert_TE[token_N, rank_N],
            weight_N=weight_TE[token_N, rank_N],
            tokens=x_TD.shape[0],
            experts=self.experts,
            probability_TE=probability_TE,
        )
        if context.wants("balance"):
            routing.losses["balance"] = active_balance_loss(routing, context.ranks)
        return self.with_gate(routing, logits_TE, probability_TE, context)
