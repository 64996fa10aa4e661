"""DTop-p: top-p routing whose p is steered to a mean number of experts (arXiv 2512.13996)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Iterator, Optional

import torch
from torch import Tensor, nn

from ..merge_rule import MergeRule
from ..options import OptionError, option
from ..routing import Routing, RoutingContext, Vocabulary
from ..statistics import MeanExperts
from .balanced import FREE_BALANCE
from .registry import register_router
from .router import MEAN_EXPERTS, at_most_all
from .top_p import TopPRouter


class ProportionalIntegral(MeanExperts):
    """A probability that is steered so that tokens have a mean number of experts.

    After each update, with ``e = (target - mean number of experts) / E``::

        I <- I + integral e
        p <- start + proportional e + I,    from LEAST to 1

    I stays where ``start + I`` is in that range, so that what cannot be reached does not pile up.

    Attributes:
        p: float32 scalar.
        correction: I, float32 scalar.

    Args:
        target: mean number of experts that is wanted.
        experts: E.
        start: p at first.
        proportional: gain of the last error.
        integral: gain of the sum of all errors.
    """

    LEAST = 0.01

    p: Tensor
    correction: Tensor

    def __init__(
        self, target: float, experts: int, start: float, proportional: float, integral: float
    ) -> None:
        super().__init__()
        self.target, self.experts, self.start = target, experts, start
        self.proportional, self.integral = proportional, integral
        self.register_buffer("p", torch.tensor(start, dtype=torch.float32))
        self.register_buffer("correction", torch.zeros(()))

    def adapt(self, mean: Tensor) -> None:
        """See ``MeanExperts``."""
        error = (self.target - mean) / self.experts
        self.correction += self.integral * error
        self.correction.clamp_(min(self.LEAST - self.start, 0.0), 1 - self.start)
        self.p.copy_((self.start + self.proportional * error + self.correction).clamp(self.LEAST, 1))


@register_router("dtop-p")
class SteeredTopPRouter(TopPRouter):
    """Top-p routing whose p keeps the tokens at ``mean_experts`` experts on average.

    As ``top-p``, with two differences.  The p is that of a ``ProportionalIntegral`` controller, one for all
    layers of a stack, which is told after each update how many experts the tokens of all layers and ranks
    had; ``top_p`` is where it starts.  The logits of a token are brought to mean 0 and variance 1 and
    multiplied by a factor that each layer learns, from 1 on: with one p for all layers, this is how a layer
    gets more experts than another.

    Only the paper's abstract was read: that there is a proportional-integral controller, one p, and a
    normalisation in each layer is its; the form of the latter, the gains and the start are ours.

    Attributes:
        scale: the layer's factor, shape (1,).
        controller: has the p.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        shared: where the routers of a stack of layers keep the controller; ``None``: one of its own.
        options: see ``Options``.
    """

    EPSILON = 1e-6

    @dataclass(frozen=True)
    class Options(TopPRouter.Options):
        """How many experts a token shall have on average, and how fast p follows."""

        mean_experts: float = option(2.0, MEAN_EXPERTS, above=0)
        proportional_gain: float = option(
            0.2,
            "What DTop-p adds to its probability for the last error of the mean number of experts, in units "
            "of all experts.",
            at_least=0,
        )
        integral_gain: float = option(
            0.05, "The same for each error since the start, which is what makes it reach the mean.", above=0
        )

        # what its controller counts costs what an expert costs
        zero_experts: ClassVar[int] = 0  # type: ignore[misc]
        copy_experts: ClassVar[int] = 0  # type: ignore[misc]
        constant_experts: ClassVar[int] = 0  # type: ignore[misc]
        free_balance: ClassVar[float] = FREE_BALANCE  # type: ignore[misc]

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from super().contradictions(experts)
            yield from at_most_all(self, "mean_experts", experts)
            if self.mean_experts < 1:
                yield OptionError(
                    "mean_experts",
                    f"`mean_experts` must be at least 1 with `router` dtop-p, which gives each token an "
                    f"expert, but is {self.mean_experts}.",
                )

    options: "SteeredTopPRouter.Options"
    merge_rules = {
        **TopPRouter.merge_rules,
        "scale": MergeRule.unchanged,
        "controller": MergeRule.unchanged,
    }

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
        if "dtop_p" not in shared:
            gains = given.proportional_gain, given.integral_gain
            shared["dtop_p"] = ProportionalIntegral(given.mean_experts, experts, given.top_p, *gains)
        self.controller: ProportionalIntegral = shared["dtop_p"]
        self.controller.experts = experts  # which may be more than when it was made
        self.scale = nn.Parameter(torch.empty(1))

    @property
    def top_p(self) -> Tensor:
        """The probability that a token's experts have together at least: a scalar."""
        return self.controller.p

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """The gate as in the parent; the factor is 1."""
        super().initialize(generator)
        self.scale.fill_(1)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """The gate's logits, float32, shape (T, E), of mean 0 and variance ``scale^2`` for each token."""
        logits_TE = super().logits(x_TD, context)
        logits_TE = nn.functional.layer_norm(logits_TE, (self.experts,), eps=self.EPSILON)
        return logits_TE * self.scale.to(logits_TE.dtype)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class."""
        routing = super().forward(x_TD, context)
        if self.training:
            self.controller.watch(routing.token_N.shape[0], routing.tokens)
        return routing
