"""The Dense-To-Sparse gate of EvoMoE (arXiv 2112.14397)."""

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..losses import balance_loss
from ..routing import Routing, RoutingContext
from .router import LinearRouter, entropy_sum


class GateWeight(str, Enum):
    """Which probability weighs an expert's output."""

    softmax = "softmax"
    gumbel = "gumbel"


class EvalRouting(str, Enum):
    """How many experts a token has in evaluation."""

    top1 = "top1"
    adaptive = "adaptive"


class DenseToSparseRouter(LinearRouter):
    """Gumbel-softmax gate whose temperature falls, so that fewer and fewer experts pass a threshold.

    In training, with noise ``g ~ Gumbel(0, 1)``, temperature ``tau`` and threshold ``c``::

        y_te = softmax_e((logits_te + g_te) / tau)
        mask = y > c, and the best expert of each token in any case      (soft stage)
        mask = the best expert of each token by y                        (hard stage)
        weight = softmax(logits), or y with ``gate_weight="gumbel"``

    Weights are not renormalised after masking.  In evaluation there is no noise: ``top1`` sends a token
    to the argmax of ``softmax(logits)``, ``adaptive`` to every expert with ``softmax(logits / tau) > c``
    (and to the argmax in any case).

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        threshold: c, in [0, 1).
        gate_weight: see above.
        eval_routing: see above.
        options: those of ``LinearRouter``.
    """

    loss_weights = {"balance": 0.0}
    stages = True
    anneals = True

    def __init__(
        self,
        dim: int,
        experts: int,
        threshold: float = 0.001,
        gate_weight: GateWeight = GateWeight.softmax,
        eval_routing: EvalRouting = EvalRouting.top1,
        **options: Any,
    ) -> None:
        super().__init__(dim, experts, **options)
        if not 0 <= threshold < 1:
            raise ValueError("threshold must be in [0, 1), but is {}".format(threshold))
        self.threshold = threshold
        self.gate_weight = GateWeight(gate_weight)
        self.eval_routing = EvalRouting(eval_routing)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  Losses: ``balance``."""
        logits_TE = self.logits(x_TD, context)
        probability_TE = logits_TE.softmax(-1)
        if self.training:
            y_TE = ((logits_TE + gumbel(logits_TE, context)) / context.temperature).softmax(-1)
            top1 = context.hard
        else:
            top1 = self.eval_routing == EvalRouting.top1
            y_TE = probability_TE if top1 else (logits_TE / context.temperature).softmax(-1)

        best_T = y_TE.argmax(-1)
        if top1:
            token_N = torch.arange(x_TD.shape[0], device=x_TD.device)
            expert_N = best_T
        else:
            mask_TE = (y_TE > self.threshold).scatter(1, best_T.unsqueeze(1), True)
            token_N, expert_N = mask_TE.nonzero(as_tuple=True)

        weight_TE = y_TE if self.gate_weight == GateWeight.gumbel else probability_TE
        routing = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=weight_TE[token_N, expert_N],
            tokens=x_TD.shape[0],
            experts=self.experts,
            probability_TE=probability_TE,
        )
        if context.statistics:
            routing.gate_entropy = entropy_sum(probability_TE)
            if context.wants("balance"):
                routing.losses["balance"] = balance_loss(routing, context.ranks)
        return routing


def gumbel(like: Tensor, context: RoutingContext) -> Tensor:
    """Independent samples of Gumbel(0, 1) in the shape of ``like``, (T, E), from ``context.uniform``."""
    uniform = context.uniform(like)
    # in [0, 1), where 0 has no logarithm and neither has that of 1, which rounding can make of it
    exponential = -uniform.clamp_(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps).log()
    return -exponential.log()
