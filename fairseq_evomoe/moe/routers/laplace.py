"""The Laplace gate of FuseMoE (arXiv 2402.03226)."""

from dataclasses import dataclass
from typing import ClassVar, Iterator

import torch
from torch import Tensor

from ..balancing import Balance
from ..gate_activation import GateActivation
from ..options import OptionError, like
from ..routing import RoutingContext
from .registry import register_router
from .router import GateInput, Renormalize, Router, at_most_all, float32
from .topk import BalanceChoices, TopKRouter


@register_router("laplace")
class LaplaceRouter(TopKRouter):
    """Each token to the k experts whose vectors are nearest to it.

    The logit of an expert is ``-||W_e - x||_2``, and the weights are the softmax over the k largest.  Losses
    as those of ``topk``, from the softmax over all experts; their default weights are ours.  The noise that
    the authors' code can add to the logits is left out.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``; k is ``top_k``.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """How many experts a token has, and the losses; the rest of ``topk``'s options are fixed."""

        top_k: int = like(TopKRouter.Options, "top_k", 2)
        balance_weight: float = like(TopKRouter.Options, "balance_weight", 0.01)
        entropy_weight: float = like(TopKRouter.Options, "entropy_weight", 0.0)
        z_weight: float = like(TopKRouter.Options, "z_weight", 0.0)
        mutual_information_weight: float = like(TopKRouter.Options, "mutual_information_weight", 0.0)

        gate_input: ClassVar[GateInput] = GateInput.hidden
        gate_lr_scale: ClassVar[float] = 1.0
        gate_activation: ClassVar[GateActivation] = GateActivation.identity
        gate_input_activation: ClassVar[GateActivation] = GateActivation.identity
        renormalize: ClassVar[Renormalize] = Renormalize.always
        random_second: ClassVar[bool] = False
        capacity_factor: ClassVar[float] = 0.0
        eval_capacity_factor: ClassVar[float] = 0.0
        balance_choices: ClassVar[BalanceChoices] = BalanceChoices.all
        balance: ClassVar[Balance] = Balance.loss
        free_experts: ClassVar[int] = 0

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from at_most_all(self, "top_k", experts)

    options: "LaplaceRouter.Options"  # type: ignore[assignment]

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """The negative distances, float32, shape (T, E)."""
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            x_TD = float32(x_TD)
            # Not by way of a matrix product, which is inexact for a small distance.  The gradient of a
            # distance that is exactly 0 is 0.
            assert self.weight is not None
            return -torch.cdist(x_TD, self.weight.to(x_TD.dtype), compute_mode="donot_use_mm_for_euclid_dist")
