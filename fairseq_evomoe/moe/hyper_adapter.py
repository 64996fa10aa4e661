"""What the unselected experts contribute: HyperMoE (arXiv 2402.12656)."""

from typing import Any, Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .routing import Routing

EXPERT_EMBEDDING = 128
LAYER_EMBEDDING = 10
ADAPTER = 64


class HyperNetwork(nn.Module):
    """Generates the weights of an adapter from an embedding; one for all layers of a stack.

    Its own weights are undefined until ``initialize`` or a checkpoint fills them.

    Args:
        dim: D, width of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        inputs = EXPERT_EMBEDDING + LAYER_EMBEDDING
        self.inner = skip_init(nn.Linear, inputs, inputs)
        self.down = skip_init(nn.Linear, inputs, ADAPTER * dim)
        self.up = skip_init(nn.Linear, inputs, ADAPTER * dim)

    def forward(self, embedding_SI: Tensor) -> Tuple[Tensor, Tensor]:
        """Both matrices of S adapters, each of shape (S, 64, D), from S embeddings."""
        inner = torch.relu(self.inner(embedding_SI))
        shape = (-1, ADAPTER, self.dim)
        return self.down(inner).view(shape), self.up(inner).view(shape)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill the parameters; the adapters give zero until the network has learned."""
        for linear in (self.inner, self.down):
            bound = linear.in_features**-0.5
            linear.weight.copy_((2 * torch.rand(linear.weight.shape, generator=generator) - 1) * bound)
            linear.bias.zero_()
        self.down.weight.mul_(self.dim**-0.5)
        self.up.weight.zero_()
        self.up.bias.zero_()


class HyperAdapter(nn.Module):
    """``adapter(x)``, whose weights come from the sum of the embeddings of the experts that x did not get.

    Tokens with the same experts share an adapter, so weights are generated once for each set of experts
    that occurs, not for each token.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        shared: where the layers of a stack keep the one hypernetwork.
    """

    def __init__(self, dim: int, experts: int, shared: Dict[str, Any]) -> None:
        super().__init__()
        self.first = "hyper_network" not in shared
        if self.first:
            shared["hyper_network"] = HyperNetwork(dim)
        self.network: HyperNetwork = shared["hyper_network"]
        self.expert_embedding = nn.Parameter(torch.empty(experts, EXPERT_EMBEDDING))
        self.layer_embedding = nn.Parameter(torch.empty(LAYER_EMBEDDING))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill the parameters from ``generator``; the hypernetwork's by the first layer that has it."""
        for embedding in (self.expert_embedding, self.layer_embedding):
            embedding.copy_(torch.randn(embedding.shape, generator=generator))
        if self.first:
            self.network.initialize(generator)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Shape and dtype of ``x_TD``."""
        unselected_TE = x_TD.new_ones(routing.tokens, routing.experts)
        unselected_TE[routing.token_N, routing.expert_N] = 0
        unselected_SE, set_T = torch.unique(unselected_TE, dim=0, return_inverse=True)
        down_SAD, up_SAD = self.network(self._embed(unselected_SE))

        set_T, order_T = torch.sort(set_T, stable=True)
        counts = torch.bincount(set_T, minlength=unselected_SE.shape[0]).tolist()
        parts = zip(x_TD[order_T].split(counts), down_SAD, up_SAD)
        output = [torch.relu(x @ down.t()) @ up for x, down, up in parts]
        # for a batch without tokens; sums over nothing, so that all parameters still have a gradient
        nothing = x_TD[:0] + down_SAD[:0].sum() + up_SAD[:0].sum()
        output_TD = torch.cat([nothing] + output)
        return torch.zeros_like(x_TD).index_copy(0, order_T, output_TD.to(x_TD.dtype))

    def _embed(self, unselected_SE: Tensor) -> Tensor:
        experts = unselected_SE @ self.expert_embedding
        layer = self.layer_embedding.expand(experts.shape[0], -1)
        return torch.cat([experts, layer], 1)
