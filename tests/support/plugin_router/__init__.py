"""Somebody else's ``--user-dir`` with a router: class, options, loss, what merging must know."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fairseq_evomoe  # noqa: F401  (registers the models)
from fairseq_evomoe.moe.merge_rule import MergeRule
from fairseq_evomoe.moe.options import loss_weight, option
from fairseq_evomoe.moe.routers import Router, register_router
from fairseq_evomoe.moe.routers.router import fill_uniform, linear32, top1_routing
from fairseq_evomoe.moe.routing import Routing, RoutingContext


@register_router("nearest")
class NearestRouter(Router):
    """Each token to the expert whose vector is nearest to it in direction, with a weight of ``strength``."""

    @dataclass(frozen=True)
    class Options(Router.Options):
        """What can be chosen."""

        nearest_strength: float = option(1.0, "Weight of the nearest expert's output.", above=0)
        spread_weight: float = loss_weight(0.01, "Weight of the mean squared cosine of the experts' vectors.")

    options: "NearestRouter.Options"
    one_expert = True
    merge_rules = {"weight": MergeRule.mean}

    def __init__(self, dim: int, experts: int, **options: Any) -> None:
        super().__init__(dim, experts, **options)
        self.weight = nn.Parameter(torch.empty(experts, dim))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        fill_uniform(self.weight, 1.0, generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        direction_ED = nn.functional.normalize(self.weight.float(), dim=1)
        weight_T, expert_T = linear32(x_TD, direction_ED).sigmoid().max(-1)
        routing = top1_routing(expert_T, weight_T * self.options.nearest_strength, self.experts)
        if context.wants("spread"):
            routing.losses["spread"] = (direction_ED @ direction_ED.t()).triu(1).square().mean()
        return routing
