"""The Laplace gate of FuseMoE (arXiv 2402.03226)."""

import torch
from torch import Tensor

from ..routing import RoutingContext
from .router import float32
from .topk import TopKRouter


class LaplaceRouter(TopKRouter):
    """Each token to the k experts whose vectors are nearest to it.

    The logit of an expert is ``-||W_e - x||_2``, and the weights are the softmax over the k largest.  Losses
    as those of ``topk``, from the softmax over all experts; their default weights are ours.  The noise that
    the authors' code can add to the logits is left out.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        top_k: k, from 1 to E.
    """

    def __init__(self, dim: int, experts: int, top_k: int = 2) -> None:
        super().__init__(dim, experts, top_k)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """The negative distances, float32, shape (T, E)."""
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            x_TD = float32(x_TD)
            # Not by way of a matrix product, which is inexact for a small distance.  The gradient of a
            # distance that is exactly 0 is 0.
            return -torch.cdist(x_TD, self.weight.to(x_TD.dtype), compute_mode="donot_use_mm_for_euclid_dist")
