"""Expert Choice: each expert takes the tokens that it scores best (arXiv 2202.09368)."""

from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor

from ..options import OptionError, option
from ..routing import Routing, RoutingContext, at_pairs
from .registry import register_router
from .router import MEAN_EXPERTS, LinearRouter, at_most_all


@register_router("expert-choice")
class ExpertChoiceRouter(LinearRouter):
    """Each expert takes as many tokens as any other, the best ones by the gate's probability.

    With ``p = softmax(x W^T)`` over the experts, an expert takes of each sequence of L tokens the
    ``ceil(c L / E)`` with the highest p for it, and p is the weight; c is ``mean_experts``.  So loads are
    even without a loss, and a token may have any number of experts, or none.  Losses: those of
    ``with_gate``, which have no weight as published.

    Whether a token is taken depends on those after it: for encoders only.  As published, an expert takes the
    best tokens of the whole batch; that it takes them of each sequence is ours, so that what becomes of a
    sequence depends neither on the others in the batch nor on the number of ranks.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``.
    """

    @dataclass(frozen=True)
    class Options(LinearRouter.Options):
        """How many tokens the experts take."""

        mean_experts: float = option(2.0, MEAN_EXPERTS, above=0)

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from super().contradictions(experts)
            yield from at_most_all(self, "mean_experts", experts)

    options: "ExpertChoiceRouter.Options"
    needs_whole_sequence = True

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  Without ``context.sequence_T`` they are one sequence."""
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        sequence_T = context.sequence_T
        if sequence_T is None:
            sequence_T = torch.zeros(x_TD.shape[0], dtype=torch.long, device=x_TD.device)
        share = self.options.mean_experts / self.experts
        taken_TE = best_of_sequences(probability_TE.detach(), sequence_T, share)
        token_N, expert_N = taken_TE.nonzero(as_tuple=True)
        routing = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=at_pairs(probability_TE, token_N, expert_N),
            tokens=x_TD.shape[0],
            experts=self.experts,
        )
        return self.with_gate(routing, logits_TE, probability_TE, context)


def best_of_sequences(score_TE: Tensor, sequence_T: Tensor, share: float) -> Tensor:
    """Whether a token is among the best ``ceil(share L)`` of its sequence, in each column.

    Of equal scores those of earlier tokens are better.

    Args:
        score_TE: scores.
        sequence_T: int64, number of the sequence of each token.
        share: from 0 to 1.

    Returns:
        bool, (T, E).
    """
    # by sequence, and within one by score
    by_score_TE = score_TE.sort(dim=0, descending=True, stable=True).indices
    by_sequence_TE = sequence_T[by_score_TE].sort(dim=0, stable=True).indices
    order_TE = by_score_TE.gather(0, by_sequence_TE)
    length_S = torch.bincount(sequence_T)
    first_S = length_S.cumsum(0) - length_S
    sorted_T = sequence_T.sort().values
    place_T = torch.arange(len(sequence_T), device=sequence_T.device) - first_S[sorted_T]
    taken_T = place_T < torch.ceil(share * length_S.double())[sorted_T]
    none_TE = torch.zeros_like(order_TE, dtype=torch.bool)
    return none_TE.scatter(0, order_TE, taken_T.unsqueeze(1).expand_as(order_TE))
