"""What routers have in common: a linear gate computed in float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..routing import Routing, RoutingContext


class Router(nn.Module):
    """Base of the routers with a linear gate ``logits = x W^T`` (no bias).

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
    """

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts, dim))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill the gate as ``nn.Linear`` would, U(-1/sqrt(D), 1/sqrt(D)), from ``generator``."""
        bound = self.weight.shape[1] ** -0.5
        values = torch.rand(self.weight.shape, generator=generator)
        self.weight.copy_((2 * values - 1) * bound)

    def logits(self, x_TD: Tensor) -> Tensor:
        """The gate's logits, float32, shape (T, E), whatever the precision of the model is."""
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens.

        Args:
            x_TD: tokens without padding, shape (T, D).
            context: phase and temperature.
        """
        raise NotImplementedError
