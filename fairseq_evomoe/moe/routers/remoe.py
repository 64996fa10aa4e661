"""ReMoE: a ReLU gate that becomes sparse by itself (arXiv 2412.14711)."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Dict, Iterator, Optional

import torch
from torch import Tensor

from ..gate_activation import GateActivation
from ..losses import mean, product_of_means
from ..merge_rule import MergeRule
from ..options import OptionError, loss_weight, option
from ..ranks import Ranks
from ..routing import Routing, RoutingContext, Vocabulary, at_pairs
from ..statistics import MeanExperts
from .registry import register_router
from .router import MEAN_EXPERTS, LinearRouter, at_most_all


class PenaltyForm(str, Enum):
    """What ReMoE's penalty adds up."""

    balanced = "balanced"
    plain = "plain"


class AdaptivePenalty(MeanExperts):
    """The coefficient of a penalty that grows while tokens have too many experts, and falls else.

    After each update it is multiplied by ``factor`` if the mean number of experts was over ``target``, and
    divided by it if it was under that.  It stays within ``LEAST`` and ``MOST``, which is ours: a gate that
    cannot reach the target must not make numbers of it that are none.

    Attributes:
        coefficient: float32 scalar.

    Args:
        target: mean number of experts that is wanted.
        start: the coefficient at first.
        factor: see above.
    """

    LEAST, MOST = 1e-30, 1e10

    coefficient: Tensor

    def __init__(self, target: float, start: float, factor: float) -> None:
        super().__init__()
        self.target, self.factor = target, factor
        self.register_buffer("coefficient", torch.tensor(start, dtype=torch.float32))

    def adapt(self, mean: Tensor) -> None:
        """See ``MeanExperts``."""
        self.coefficient *= self.factor ** float(torch.sign(mean - self.target))
        self.coefficient.clamp_(self.LEAST, self.MOST)


@register_router("remoe")
class ReLURouter(LinearRouter):
    """Each token to the experts whose logit is over 0, with the logit as weight.

    ``R = relu(x W^T)``, which has a gradient wherever an expert is active and no step where one becomes so.
    At first about half of the experts are active; a token may have none.  Loss: ``l1``, the coefficient
    times::

        mean_t sum_e f_e R_te,   f_e = E / (K T) * (tokens for which expert e is active)     balanced
        mean_t sum_e R_te                                                                    plain

    with K = ``mean_experts``.  The balanced form, with which the paper reports its results, falls harder on
    the experts that many tokens have.  The coefficient begins at ``l1_start`` and is adapted after each
    update to how many experts the tokens of all layers and ranks have, see ``AdaptivePenalty``; as published
    it is one for all layers of a stack.  (The paper's penalty is a mean over layers, and the losses of layers
    here are added up, which the coefficient makes up for.)

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        shared: where the routers of a stack of layers keep the coefficient; ``None``: one of its own.
        options: see ``Options``.
    """

    @dataclass(frozen=True)
    class Options(LinearRouter.Options):
        """How many experts a token shall have on average, and the penalty that sees to it."""

        mean_experts: float = option(1.0, MEAN_EXPERTS, above=0)
        l1_form: PenaltyForm = option(
            "balanced",
            "ReMoE's penalty on the sum of a token's weights: balanced counts that of an expert by the share "
            "of the tokens that have it, plain counts all alike.",
        )
        l1_start: float = option(1e-8, "Coefficient of ReMoE's penalty at first.", above=0)
        l1_factor: float = option(
            1.2,
            "Factor by which the coefficient of ReMoE's penalty rises or falls after each update.",
            above=1,
        )
        l1_weight: float = loss_weight(
            1.0, "Weight of ReMoE's penalty, which has a coefficient of its own that adapts itself."
        )

        # a gate that is no distribution has none of these
        entropy_weight: ClassVar[float] = 0.0  # type: ignore[misc]
        z_weight: ClassVar[float] = 0.0  # type: ignore[misc]
        mutual_information_weight: ClassVar[float] = 0.0  # type: ignore[misc]
        # the ReLU is its activation
        gate_activation: ClassVar[GateActivation] = GateActivation.identity  # type: ignore[misc]

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from super().contradictions(experts)
            yield from at_most_all(self, "mean_experts", experts)

    options: "ReLURouter.Options"
    unit_weight = False
    merge_rules = {**LinearRouter.merge_rules, "penalty": MergeRule.unchanged}

    def __init__(
        self,
        dim: int,
        experts: int,
        vocabulary: Optional[Vocabulary] = None,
        shared: Optional[Dict[str, Any]] = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, experts, vocabulary, **options)
        given = self.options
        shared = {} if shared is None else shared
        if "remoe" not in shared:
            shared["remoe"] = AdaptivePenalty(given.mean_experts, given.l1_start, given.l1_factor)
        self.penalty: AdaptivePenalty = shared["remoe"]

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  There is no ``probability_TE``."""
        gate_TE = self.logits(x_TD, context).relu()
        token_N, expert_N = (gate_TE > 0).nonzero(as_tuple=True)
        routing = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=at_pairs(gate_TE, token_N, expert_N),
            tokens=gate_TE.shape[0],
            experts=self.experts,
        )
        if self.training:
            self.penalty.watch(token_N.shape[0], routing.tokens)
        if context.wants("l1"):
            l1 = self._l1(routing, gate_TE, context.ranks)
            # a copy, since somebody may adapt the coefficient and go back through the graph afterwards
            routing.losses["l1"] = self.penalty.coefficient.clone().to(l1.dtype) * l1
        return routing

    def _l1(self, routing: Routing, gate_TE: Tensor, ranks: Ranks) -> Tensor:
        """The penalty without its coefficient, of the tokens of all ranks."""
        if self.options.l1_form == PenaltyForm.plain:
            return mean(gate_TE.sum(1), ranks)
        balanced = product_of_means(routing.load_E(), gate_TE.sum(0), routing.tokens, ranks)
        return balanced / self.options.mean_experts
