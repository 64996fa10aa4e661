"""The Mixture-of-Experts layer: router -> dispatch -> experts -> combine."""

from typing import Callable, Optional

import torch
from torch import Tensor, nn

from .dispatch import dispatch
from .experts import Experts
from .routers import Router
from .routing import Routing, RoutingContext


class MoELayer(nn.Module):
    """A feed-forward layer that owns one expert at first and, once grown, many and a router.

    Before it grows it computes what the dense feed-forward layer computes, at the same cost, and has
    the same parameters.  ``load_state_dict`` takes both forms: one expert loaded into a grown layer
    is spawned into all of them, and a layer with one expert grows if the state has grown.

    Attributes:
        experts: the experts; one before the growth.
        router: the router; ``None`` before the growth.
        routing: how the last batch was routed; ``None`` before the first and after ``forget``.
        spawned_on_load: whether the experts were spawned from a single one when a state was loaded.

    Args:
        experts: the base expert.
        num_experts: E, the number of experts after the growth.
        make_router: builds and initialises the router when the layer grows.
        spawn: ``spawn(name, tensor)`` makes the rows of all experts out of those of the base expert, for
            each of the tensors in ``experts``.
    """

    def __init__(
        self,
        experts: Experts,
        num_experts: int,
        make_router: Callable[[], Router],
        spawn: Callable[[str, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.experts = experts
        self.num_experts = num_experts
        self.make_router = make_router
        self.spawn = spawn
        # registered before it exists, so that parameters have one order in grown and loaded models
        self.register_module("router", None)
        self.routing: Optional[Routing] = None
        self.spawned_on_load = False

    @property
    def grown(self) -> bool:
        """Whether the layer has all its experts."""
        return self.router is not None or self.num_experts == 1

    @torch.no_grad()
    def grow(self) -> None:
        """Spawn the experts and make the router.  The parameters are new objects afterwards."""
        base = {name: p.detach() for name, p in self.experts.named_parameters(recurse=False)}
        like = self.experts.w1
        self.experts.resize(self.experts.widths * self.num_experts)
        for name, tensor in base.items():
            getattr(self.experts, name).copy_(self.spawn(name, tensor))
        self.router = self.make_router().to(device=like.device, dtype=like.dtype)
        self.router.train(self.training).requires_grad_(like.requires_grad)

    def forget(self) -> None:
        """Forget the last batch, so that a layer that is skipped next does not report it again."""
        self.routing = None

    def forward(self, x: Tensor, context: RoutingContext, padding_mask: Optional[Tensor] = None) -> Tensor:
        """Apply the layer.

        Args:
            x: tokens, shape (..., D).
            context: phase and temperature.
            padding_mask: bool, shape (...): positions that are padding.  They are neither routed nor
                counted, and the output there is zero once the layer is grown.

        Returns:
            shape and dtype of ``x``.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        keep_T = None if padding_mask is None else (~padding_mask.reshape(-1)).nonzero().squeeze(1)
        tokens = x_TD.shape[0] if keep_T is None else keep_T.shape[0]
        if self.router is None:
            self.routing = _single_expert(x_TD, tokens)
            return self.experts(x_TD, [x_TD.shape[0]]).view_as(x)

        token_TD = x_TD if keep_T is None else x_TD.index_select(0, keep_T)
        self.routing = self.router(token_TD, context)
        y_TD = dispatch(token_TD, self.routing, self.experts)
        if keep_T is not None:
            y_TD = torch.zeros_like(x_TD).index_copy(0, keep_T, y_TD)
        return y_TD.view_as(x)

    def __getstate__(self):
        # how the last batch was routed is part of a graph, which cannot be copied
        return dict(self.__dict__, routing=None)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        state = state_dict.get(prefix + "experts.b2")
        found = None if state is None else state.shape[0]
        if found == 1 < self.num_experts and self.grown:
            self.spawned_on_load = True
            for name, _ in self.experts.named_parameters(recurse=False):
                key = prefix + "experts." + name
                state_dict[key] = self.spawn(name, state_dict[key])
            for name, tensor in self.router.state_dict().items():
                state_dict[prefix + "router." + name] = tensor
        elif found == self.num_experts and not self.grown:
            self.grow()
        elif found not in (None, 1, self.num_experts):
            raise ValueError(
                "{}: the checkpoint has {} experts, the model {}".format(
                    prefix.rstrip("."), found, self.num_experts
                )
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """State of growth, for ``print(model)``."""
        return "num_experts={}, grown={}".format(self.num_experts, self.grown)


def _single_expert(x_TD: Tensor, tokens: int) -> Routing:
    """The routing of a layer with one expert: every token to it, with weight 1."""
    index_T = torch.zeros(tokens, dtype=torch.long, device=x_TD.device)
    weight_T = torch.ones(tokens, device=x_TD.device)
    return Routing(index_T, index_T, weight_T, tokens=tokens, experts=1)
