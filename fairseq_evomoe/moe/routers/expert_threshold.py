"""Expert Threshold: a causal stand-in for Expert Choice (arXiv 2603.11535)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Iterator, Optional, Sequence

import torch
from torch import Tensor

from ..gate_activation import GateActivation
from ..merge_rule import MergeRule
from ..offspring import Offspring
from ..options import OptionError, option
from ..quantile import Histogram
from ..routing import Routing, RoutingContext, Vocabulary, at_pairs
from ..statistics import Collector
from .registry import register_router
from .router import MEAN_EXPERTS, LinearRouter, at_most_all


class Cutoffs(Collector):
    """For each expert the score over which a share of all tokens is: a running mean over the updates.

    The first updates count alike, so that the mean does not hang on to where it starts, 0.5.

    Attributes:
        cutoff_E: float32.
        updates: float32 scalar, how many updates it is of.

    Args:
        experts: E.
        share: of the tokens that are to be over it.
        decay: what is left of the mean at each update once there have been many.
    """

    HISTOGRAM = Histogram(low=0.0, high=1.0, bins=1024)

    cutoff_E: Tensor
    updates: Tensor

    def __init__(self, experts: int, share: float, decay: float) -> None:
        super().__init__()
        self.share, self.decay = share, decay
        self.register_buffer("cutoff_E", torch.full((experts,), 0.5))
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def watch(self, score_TE: Tensor) -> None:
        """Count scores from 0 to 1."""
        self.add(self.HISTOGRAM.counts(score_TE).flatten())

    def no_sums(self) -> Tensor:
        """See ``Collector``: the histograms of the E experts' scores."""
        return self.cutoff_E.new_zeros(len(self.cutoff_E) * self.HISTOGRAM.bins)

    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``; an update without tokens changes nothing."""
        counts_EB = sums_K.view(len(self.cutoff_E), -1)
        if not counts_EB.any():
            return
        self.updates += 1
        share = sums_K.new_tensor(self.share)
        step = torch.clamp(1 / self.updates, min=1 - self.decay)
        self.cutoff_E.lerp_(self.HISTOGRAM.exceeded_by(share, counts_EB), float(step))


@register_router("expert-threshold")
class ExpertThresholdRouter(LinearRouter):
    """Each token to the experts whose score of it is over a threshold that an even load has taught.

    ``s = sigmoid(x W^T)``; an expert is active where s is over its cutoff, with weight s.  The cutoff is a
    running mean, over the updates, of the score that ``mean_experts / E`` of an update's tokens (of all
    ranks) are over: what the worst token has that Expert Choice would have given the expert.  So loads are
    even on average, without a loss; a token may have any number of experts, or none; and whether it has one
    depends on no other token, in training neither.

    Scores by a sigmoid, the decay, and the quantile by a histogram are ours.  So is how it starts, as a mean
    of the first updates (and at 0.5 before the first); the authors route by Expert Choice until the cutoffs
    are known, which lets a token see later ones.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``.
    """

    @dataclass(frozen=True)
    class Options(LinearRouter.Options):
        """How many experts a token shall have on average, and how long the cutoffs remember."""

        mean_experts: float = option(1.0, MEAN_EXPERTS, above=0)
        cutoff_decay: float = option(
            0.99,
            "What is left of Expert Threshold's mean cutoffs at each update, once there have been many.",
            at_least=0,
            below=1,
        )

        # a gate that is no distribution has none of these
        entropy_weight: ClassVar[float] = 0.0  # type: ignore[misc]
        z_weight: ClassVar[float] = 0.0  # type: ignore[misc]
        mutual_information_weight: ClassVar[float] = 0.0  # type: ignore[misc]
        # the sigmoid is its activation
        gate_activation: ClassVar[GateActivation] = GateActivation.identity  # type: ignore[misc]

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from super().contradictions(experts)
            yield from at_most_all(self, "mean_experts", experts)

    options: "ExpertThresholdRouter.Options"
    unit_weight = False
    merge_rules = {
        **LinearRouter.merge_rules,
        "cutoffs.cutoff_E": MergeRule.mean,
        "cutoffs.updates": MergeRule.unchanged,
    }

    def __init__(
        self, dim: int, experts: int, vocabulary: Optional[Vocabulary] = None, **options: Any
    ) -> None:
        super().__init__(dim, experts, vocabulary, **options)
        share = self.options.mean_experts / experts
        self.cutoffs = Cutoffs(experts, share, self.options.cutoff_decay)

    def child_tensor(
        self, name: str, old: Tensor, shape: Sequence[int], offspring: Offspring, gate: bool = False
    ) -> Tensor:
        """See the parent; cutoffs, over which fewer tokens are to be than before, are learned anew."""
        new = super().child_tensor(name, old, shape, offspring, gate)
        return torch.zeros_like(new) if name == "cutoffs.updates" else new

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  There are no losses and no ``probability_TE``."""
        score_TE = self.logits(x_TD, context).sigmoid()
        token_N, expert_N = (score_TE > self.cutoffs.cutoff_E.to(score_TE.dtype)).nonzero(as_tuple=True)
        if self.training:
            self.cutoffs.watch(score_TE.detach())
        return Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=at_pairs(score_TE, token_N, expert_N),
            tokens=score_TE.shape[0],
            experts=self.experts,
        )
