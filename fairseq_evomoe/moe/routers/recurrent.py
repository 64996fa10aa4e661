"""The layerwise recurrent router of RMoE (arXiv 2408.06793)."""

from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..routing import Routing, RoutingContext
from .router import Renormalize, fill_uniform, linear32
from .topk import TopKRouter


class RecurrentRouter(TopKRouter):
    """Top-k routing by the state of a GRU that passes through the layers of a stack.

    ``x' = x P^T``, ``h = GRU(x', h of the MoE layer before)``, ``logits = h W^T``; then as ``topk``.  P and W
    are the layer's own, the GRU is shared by the layers of a stack.  Before the first MoE layer h is 0.

    The state of a token lives in ``RoutingContext.memory`` for the length of one forward pass, so a batch
    never sees that of another, and a layer that LayerDrop skips leaves it as it is.  A state is never changed
    in place, so that a copy of the memory is enough to run a layer again, as activation checkpointing does.

    Every layer's part of a checkpoint has the GRU.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        top_k: k, from 1 to E.
        renormalize: whether the weights of a token sum to 1; see ``router.divisor``.
        recurrent_dim: width of x' and h.
        shared: where the routers of a stack of layers keep the GRU, as ``gru``; ``None``: a GRU of its own.
    """

    linear_gate = False  # its logits are those of a state

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int = 2,
        renormalize: Renormalize = Renormalize.always,
        recurrent_dim: int = 128,
        shared: Optional[Dict[str, Any]] = None,
    ) -> None:
        if recurrent_dim < 1:
            raise ValueError(f"recurrent_dim must be at least 1, but is {recurrent_dim}")
        super().__init__(recurrent_dim, experts, top_k, renormalize)  # whose tokens are the states
        self.dim = dim
        self.recurrent_dim = recurrent_dim
        self.projection = nn.Parameter(torch.empty(recurrent_dim, dim))
        shared = {} if shared is None else shared
        self._made_gru = "gru" not in shared
        if self._made_gru:  # without random numbers of the default generator
            shared["gru"] = skip_init(nn.GRUCell, recurrent_dim, recurrent_dim)
        self.gru: nn.GRUCell = shared["gru"]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill as ``nn.Linear`` and ``nn.GRUCell`` would; the GRU is filled by the router that made it."""
        fill_uniform(self.weight, self.recurrent_dim**-0.5, generator)
        fill_uniform(self.projection, self.dim**-0.5, generator)
        if self._made_gru:
            for parameter in self.gru.parameters():
                fill_uniform(parameter, self.recurrent_dim**-0.5, generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.

        Raises:
            ValueError: the layer before has routed another number of tokens.
        """
        x_TP = linear32(x_TD, self.projection)
        state_TP = self._state(x_TP, context.memory)
        gru = self.gru
        parameters = (gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh)
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            state_TP = torch.gru_cell(x_TP, state_TP, *(p.to(x_TP.dtype) for p in parameters))
        context.memory["recurrent"] = state_TP
        return super().forward(state_TP, context)

    def _state(self, x_TP: Tensor, memory: Dict[str, Tensor]) -> Tensor:
        """The state that the layer before has left; zeros if there was none."""
        state_TP = memory.get("recurrent")
        if state_TP is None:
            state_TP = torch.zeros_like(x_TP)
        if state_TP.shape != x_TP.shape:
            raise ValueError(
                f"the recurrent router has a state of {state_TP.shape[0]} tokens from the layer before, but "
                f"routes {x_TP.shape[0]} here: all MoE layers of a stack must see the same tokens, and each "
                "forward pass needs a new RoutingContext.memory"
            )
        return state_TP.to(x_TP.dtype)
