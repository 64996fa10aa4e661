"""The layerwise recurrent router of RMoE (arXiv 2408.06793)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Iterator, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..balancing import Balance
from ..gate_activation import GateActivation
from ..losses import product_of_means
from ..merge_rule import MergeRule
from ..options import OptionError, like, option
from ..ranks import Ranks
from ..routing import Routing, RoutingContext, Vocabulary, count_experts
from .registry import register_router
from .router import GateInput, Renormalize, Router, at_most_all, fill_uniform, linear32
from .topk import BalanceChoices, TopKRouter


@register_router("recurrent")
class RecurrentRouter(TopKRouter):
    """Top-k routing by the state of a GRU that passes through the layers of a stack.

    ``x' = x P^T``, ``h = GRU(x', h of the MoE layer before)``, ``logits = h W^T``; then as ``topk``.  P and W
    are the layer's own, the GRU is shared by the layers of a stack.  Before the first MoE layer h is 0.

    The state of a token lives in ``RoutingContext.memory`` for the length of one forward pass, so a batch
    never sees that of another, and a layer that LayerDrop skips leaves it as it is.  A state is never changed
    in place, so that a copy of the memory is enough to run a layer again, as activation checkpointing does.

    Every layer's part of a checkpoint has the GRU.

    The ``balance`` loss pools the layers of a stack, as published: each layer adds what the loss of all
    layers so far exceeds that of those before, so that the layers' losses sum to that of all.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        shared: where the routers of a stack of layers keep the GRU, as ``gru``; ``None``: a GRU of its own.
        options: see ``Options``; k is ``top_k``.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """How many experts a token has, and how wide the state is."""

        top_k: int = like(TopKRouter.Options, "top_k", 2)
        renormalize: Renormalize = like(TopKRouter.Options, "renormalize", "always")
        recurrent_dim: int = option(
            128, "Width of the state that the recurrent router hands from layer to layer.", at_least=1
        )
        balance_weight: float = like(TopKRouter.Options, "balance_weight", 0.01)
        entropy_weight: float = like(TopKRouter.Options, "entropy_weight", 0.0)
        z_weight: float = like(TopKRouter.Options, "z_weight", 0.0)
        mutual_information_weight: float = like(TopKRouter.Options, "mutual_information_weight", 0.0)

        gate_input: ClassVar[GateInput] = GateInput.hidden
        gate_lr_scale: ClassVar[float] = 1.0
        gate_activation: ClassVar[GateActivation] = GateActivation.identity
        gate_input_activation: ClassVar[GateActivation] = GateActivation.identity
        random_second: ClassVar[bool] = False
        capacity_factor: ClassVar[float] = 0.0
        eval_capacity_factor: ClassVar[float] = 0.0
        balance_choices: ClassVar[BalanceChoices] = BalanceChoices.all
        balance: ClassVar[Balance] = Balance.loss
        free_experts: ClassVar[int] = 0

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from at_most_all(self, "top_k", experts)

    options: "RecurrentRouter.Options"  # type: ignore[assignment]
    linear_gate = False  # its logits are those of a state
    merge_rules = {
        "weight": MergeRule.mean,
        "projection": MergeRule.unchanged,
        "gru": MergeRule.unchanged,
    }

    def __init__(
        self,
        dim: int,
        experts: int,
        vocabulary: Optional[Vocabulary] = None,
        shared: Optional[Dict[str, Any]] = None,
        **options: Any,
    ) -> None:
        recurrent_dim = self.Options.given(options).recurrent_dim
        super().__init__(recurrent_dim, experts, **options)  # whose tokens are the states
        self.dim = dim
        self.recurrent_dim = recurrent_dim
        self.projection = nn.Parameter(torch.empty(self.recurrent_dim, dim))
        shared = {} if shared is None else shared
        self._made_gru = "gru" not in shared
        if self._made_gru:  # without random numbers of the default generator
            shared["gru"] = skip_init(nn.GRUCell, self.recurrent_dim, self.recurrent_dim)
        self.gru: nn.GRUCell = shared["gru"]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill as ``nn.Linear`` and ``nn.GRUCell`` would; the GRU is filled by the router that made it."""
        assert self.weight is not None
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
        routing = super().forward(state_TP, context)
        if "balance" in routing.losses:  # which are differences, and what is reported is not
            routing.balance = context.memory["recurrent_balance_so_far"]
        return routing

    def balance(self, expert_TK: Tensor, probability_TE: Tensor, context: RoutingContext) -> Tensor:
        """What this layer adds to the load-balance loss of all layers so far."""
        load_E = count_experts(expert_TK.flatten(), self.experts).to(probability_TE.dtype)
        sums = (load_E, probability_TE.sum(0), probability_TE.shape[0])
        before = context.memory.get("recurrent_balance")
        after = sums if before is None else (before[0] + sums[0], before[1] + sums[1], before[2] + sums[2])
        context.memory["recurrent_balance"] = after
        loss = _balance(after, context.ranks)
        context.memory["recurrent_balance_so_far"] = loss.detach()
        return loss if before is None else loss - _balance(before, context.ranks)

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


def _balance(sums: Tuple[Tensor, Tensor, int], ranks: Ranks) -> Tensor:
    """The load-balance loss of sums over tokens: loads, probabilities and the number of tokens."""
    load_E, probability_E, tokens = sums
    return product_of_means(load_E, probability_E, tokens, ranks)
