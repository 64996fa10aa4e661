"""The cosine gate of X-MoE (arXiv 2204.09179)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..gate_activation import GateActivation
from ..merge_rule import MergeRule
from ..options import like, option
from ..routing import RoutingContext, Vocabulary
from .balanced import FREE_BALANCE
from .base import fill_orthogonal
from .registry import register_router
from .router import GateInput, Renormalize, fill_uniform, linear32
from .topk import TopKRouter


@register_router("xmoe")
class CosineRouter(TopKRouter):
    """Each token to the experts that it is most similar to in few dimensions.

    ``logit_te = cos(P x_t, w_e) / tau``, with a projection P to ``routing_dim`` numbers, a vector w of each
    expert there, and a learned temperature tau, which stays at least 0.01; then as ``topk``, with one expert
    and its probability as weight unless other options are given.  That tokens are compared on a sphere of
    few dimensions keeps them from gathering around their experts' vectors.

    As in the authors' code the vectors start orthogonal as far as the width allows, with length 0.32.  The
    temperature's start is as others report it, its least value that of Tutel's cosine gate.

    Attributes:
        weight: w, shape (E, R).
        projection: P, shape (R, D).
        log_scale: logarithm of 1 / tau, shape (1,).

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``; R is ``routing_dim``.
    """

    @dataclass(frozen=True)
    class Options(TopKRouter.Options):
        """The space in which tokens and experts are compared, and ``topk``'s options but for the gate."""

        routing_dim: int = option(
            16,
            "Dimensions in which X-MoE compares tokens and experts; published with half as many as experts.",
            at_least=1,
        )
        cosine_temperature: float = option(
            0.3, "Temperature of X-MoE's cosines at first; it is learned.", above=0
        )
        top_k: int = like(TopKRouter.Options, "top_k", 1)
        renormalize: Renormalize = like(TopKRouter.Options, "renormalize", "never")

        gate_input: ClassVar[GateInput] = GateInput.hidden  # type: ignore[misc]
        gate_lr_scale: ClassVar[float] = 1.0  # type: ignore[misc]
        table_std: ClassVar[float] = 0.0  # type: ignore[misc]
        gate_activation: ClassVar[GateActivation] = GateActivation.identity  # type: ignore[misc]
        gate_input_activation: ClassVar[GateActivation] = GateActivation.identity  # type: ignore[misc]
        random_second: ClassVar[bool] = False  # type: ignore[misc]
        zero_experts: ClassVar[int] = 0  # type: ignore[misc]
        copy_experts: ClassVar[int] = 0  # type: ignore[misc]
        constant_experts: ClassVar[int] = 0  # type: ignore[misc]
        free_balance: ClassVar[float] = FREE_BALANCE  # type: ignore[misc]

    MOST_SCALE = 100.0

    options: "CosineRouter.Options"
    linear_gate = False  # of the input: its vectors are in another space
    merge_rules = {
        "weight": MergeRule.mean,
        "projection": MergeRule.unchanged,
        "log_scale": MergeRule.unchanged,
        "balancing": MergeRule.mean,
    }

    def __init__(
        self,
        dim: int,
        experts: int,
        vocabulary: Optional[Vocabulary] = None,
        shared: Optional[Dict[str, Any]] = None,
        **options: Any,
    ) -> None:
        routing_dim = self.Options.given(options).routing_dim
        super().__init__(routing_dim, experts, **options)  # whose tokens are the projections
        self.dim = dim
        self.projection = nn.Parameter(torch.empty(routing_dim, dim))
        self.log_scale = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Orthogonal vectors, and a projection as ``nn.Linear`` would have it, from ``generator``."""
        assert self.weight is not None
        fill_orthogonal(self.weight, 0.32, generator)
        fill_uniform(self.projection, self.dim**-0.5, generator)
        self.log_scale.fill_(-math.log(self.options.cosine_temperature))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """The cosines over the temperature, float32, shape (T, E)."""
        assert self.weight is not None
        x_TR = linear32(x_TD, self.projection)
        cosine_TE = linear32(F.normalize(x_TR, dim=1), F.normalize(self.weight.to(x_TR.dtype), dim=1))
        scale = self.log_scale.to(cosine_TE.dtype).exp().clamp(max=self.MOST_SCALE)
        return cosine_TE * scale
