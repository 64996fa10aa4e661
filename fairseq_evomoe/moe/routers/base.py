"""BASE layers (arXiv 2103.16716)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..assignment import balanced_assignment
from ..device_assignment import nearly_best_assignment
from ..merge_rule import MergeRule
from ..ranks import Ranks
from ..routing import Routing, RoutingContext
from .registry import register_router
from .router import Router, entropy_sum, linear32, top1_routing

on_device = False
"""Whether tokens are assigned by ``device_assignment.py``: for tests and benchmarks, not measured yet."""


class CentroidRouter(Router):
    """Base of the routers that score a token by the centroid of each expert: ``s_te = x_t . c_e``.

    A score is no logit of a distribution over experts: the weight of an expert is ``sigmoid(s_te)``, whatever
    the scores of the others are.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
    """

    one_expert = True
    merge_rules = {"centroid_ED": MergeRule.mean}

    def __init__(self, dim: int, experts: int, **options: Any) -> None:
        super().__init__(dim, experts, **options)
        self.centroid_ED = nn.Parameter(torch.empty(experts, dim))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill the centroids with orthogonal vectors of length 0.1 from ``generator``."""
        fill_orthogonal(self.centroid_ED, 0.1, generator)

    def scores(self, x_TD: Tensor) -> Tensor:
        """Scores, float32 (float64 for float64 tokens), shape (T, E)."""
        return linear32(x_TD, self.centroid_ED)

    def route(self, score_TE: Tensor, expert_T: Tensor) -> Routing:
        """Each token to an expert, weighted by the sigmoid of its score there.

        ``gate_entropy`` is that of the softmax of the scores: nothing in the routing depends on it.
        """
        weight_T = score_TE.gather(1, expert_T.unsqueeze(1)).squeeze(1).sigmoid()
        routing = top1_routing(expert_T, weight_T, self.experts)
        routing.gate_entropy = entropy_sum(score_TE.softmax(-1))
        return routing


@register_router("base")
class BaseRouter(CentroidRouter):
    """In training an exactly balanced assignment of the highest total score, in evaluation the best expert.

    ``s_te = x_t . c_e`` with a centroid for each expert; the weight of token t's expert e is
    ``a = sigmoid(s_te)``.  In training every expert gets floor(T / E) or ceil(T / E) of the T tokens of all
    ranks, so there is no auxiliary loss; no gradient flows through the assignment, and the centroids learn by
    the weights alone.  So a token's expert depends on the later ones of the batch, in a decoder too, as
    published; in evaluation it does not.

    The paper mixes ``a Expert(x) + (1 - a) x`` with ``Expert(x) = x + FFN(x)``, which is ``x + a FFN(x)``:
    what weighing the feed-forward network by a gives, since the residual connection is around the layer.
    Other than there, the scores are of the layer's input, which has gone through the layer norm in a model
    with the norm before, and the second matrix of each expert starts as in any other MoE layer, not at 0.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
    """

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  There are no losses and no ``probability_TE``."""
        score_TE = self.scores(x_TD)
        expert_T = self._balanced(score_TE, context.ranks) if self.training else score_TE.argmax(-1)
        return self.route(score_TE, expert_T)

    @staticmethod
    def _balanced(score_TE: Tensor, ranks: Ranks) -> Tensor:
        """The part of this rank in the assignment of the tokens of all ranks, which each works out."""
        scores = ranks.gather_rows(score_TE.detach())
        assign = nearly_best_assignment if on_device else balanced_assignment
        expert_T = assign(torch.cat(scores))
        return expert_T.split([len(part) for part in scores])[ranks.rank]


def fill_orthogonal(tensor: Tensor, gain: float, generator: torch.Generator) -> None:
    """Fill a matrix so that its rows, or else its columns, are orthogonal and have length ``gain``."""
    rows, columns = tensor.shape
    normal = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    # with these signs all orthogonal matrices are equally likely
    q = gain * q * r.diagonal().sign()
    tensor.copy_(q if rows >= columns else q.t())
