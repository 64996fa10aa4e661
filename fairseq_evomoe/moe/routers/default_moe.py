"""Default MoE: top-k routing whose gate learns from all experts (arXiv 2504.12463)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from ..default_outputs import DefaultOutputs
from ..merge_rule import MergeRule
from ..options import option
from ..routing import Vocabulary
from .registry import register_router
from .router import Renormalize
from .topk import TopKRouter


@register_router("default-moe")
class DefaultMoERouter(TopKRouter):
    """Each token to the k experts of the highest gate probability; the mean output of the others stands in.

    As ``topk`` with weights that are not divided by their sum: what they leave weighs the default outputs of
    the other experts, see ``DefaultOutputs``, so that the gate gets a gradient for each expert and token.
    They are part of the output in training and evaluation.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``; k is ``top_k``.
    """

    @dataclass(frozen=True)
    class Options(TopKRouter.Options):
        """How long default outputs remember, and ``topk``'s options but for the weights."""

        default_decay: float = option(
            0.9,
            "What is left of Default MoE's mean outputs at each update, once there have been many.",
            at_least=0,
            below=1,
        )

        renormalize: ClassVar[Renormalize] = Renormalize.never  # type: ignore[misc]
        random_second: ClassVar[bool] = False  # type: ignore[misc]

    options: "DefaultMoERouter.Options"
    merge_rules = {**TopKRouter.merge_rules, "defaults": MergeRule.mean}

    def __init__(
        self, dim: int, experts: int, vocabulary: Optional[Vocabulary] = None, **options: Any
    ) -> None:
        super().__init__(dim, experts, vocabulary, **options)
        self.defaults = DefaultOutputs(experts, dim, self.options.default_decay)
