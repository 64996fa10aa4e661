"""Soft MoE (arXiv 2308.00951), the mixing of which Omni-SMoLA (arXiv 2312.00968) uses too."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..merge_rule import MergeRule
from ..options import option
from ..routing import Routing, RoutingContext
from ..slots import Slots
from .registry import register_router
from .router import Router, entropy_sum, float32, linear32


@register_router("soft")
class SoftRouter(Router):
    """Experts work on slots, mixtures of the tokens of a sequence, and tokens get mixtures of their outputs.

    Each expert has ``slots`` slots for each sequence of the batch.  With x and the slots' vectors w
    normalised to length 1, as published, and a learned ``scale``, 1 at first::

        logits_ts = scale * x_t . w_s
        slot_s = sum over tokens t of the sequence of softmax_t(logits)_ts x_t
        y_t = sum over slots s of softmax_s(logits)_ts expert(slot_s)

    A slot has a vector of its own, so their number cannot follow the length of a sequence; the cost is that
    of one expert a token if it is the mean length divided by E.  A token's output depends on later tokens,
    hence for encoders only.  There is no auxiliary loss.

    The pairs of the ``Routing`` are (slot, expert), so pairs per token tell the cost; its probabilities are
    the shares of the experts in the tokens' outputs.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """How many mixtures an expert works on."""

        slots: int = option(
            1,
            "Slots of each expert for each sequence, with moe-router soft; about the mean length divided "
            "by moe-experts for the cost of one expert a token.",
            at_least=1,
        )

    options: "SoftRouter.Options"
    needs_whole_sequence = True
    merge_rules = {"weight": MergeRule.mean, "scale": MergeRule.unchanged}

    def __init__(self, dim: int, experts: int, **options: Any) -> None:
        super().__init__(dim, experts, **options)
        self.slots = self.options.slots
        self.weight = nn.Parameter(torch.empty(experts * self.slots, dim))
        self.scale = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Slots from N(0, 1/D), from ``generator``; the scale is 1."""
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * self.dim**-0.5)
        self.scale.fill_(1)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  Without ``context.sequence_T`` they are one sequence."""
        tokens, x_TD = x_TD.shape[0], float32(x_TD)
        logits_TS = linear32(_unit(x_TD), _unit(self.weight.to(x_TD.dtype))) * self.scale.to(x_TD.dtype)
        sequence_T = context.sequence_T
        if sequence_T is None:
            sequence_T = torch.zeros(tokens, dtype=torch.long, device=x_TD.device)
        slots = Slots.from_logits(logits_TS, sequence_T)

        expert_S = torch.arange(self.experts, device=x_TD.device).repeat_interleave(self.slots)
        expert_N = expert_S.repeat(slots.dispatch_BSL.shape[0])
        probability_TE = logits_TS.softmax(-1).view(tokens, self.experts, self.slots).sum(-1)
        return Routing(
            token_N=torch.arange(expert_N.shape[0], device=x_TD.device),
            expert_N=expert_N,
            weight_N=logits_TS.new_ones(expert_N.shape[0]),
            tokens=tokens,
            experts=self.experts,
            gate_entropy=entropy_sum(probability_TE),
            probability_TE=probability_TE,
            slots=slots,
        )


def _unit(x: Tensor) -> Tensor:
    """Rows with length 1; a row of zeros stays one, with a finite gradient."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
