"""fairseq's Transformer layers with an MoE layer in place of their feed-forward network.

A model is built by fairseq itself and then every ``moe_freq``-th layer is given an MoE layer that takes
over ``fc1`` and ``fc2`` as its base expert.  ``fc1`` becomes the MoE layer and what follows it, up to and
including ``fc2``, the identity, so that fairseq's own ``forward`` runs unchanged around it.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import compat
from ..config.config import MoEConfig
from ..evolution.plateau import Plateau
from ..evolution.schedule import Schedule
from ..moe import MoELayer, RoutingContext
from ..moe.loading import WIDTHS_OF_SHARD, is_shard


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the options of the model that is to load it."""


class StackInput:
    """What the layers of one stack share while it works on a batch.

    It hooks on to the stack's embeddings, which every forward pass looks up first, in incremental decoding
    too; ``forward`` of the stack itself is called by fairseq past any hook.

    Attributes:
        tokens: int64, (batch, seq): the tokens that were looked up.
        embeddings: (batch, seq, C): what was found, without gradient.
        memory: what routers hand on to those of later layers.
    """

    def __init__(self) -> None:
        self.tokens: Optional[Tensor] = None
        self.embeddings: Optional[Tensor] = None
        self.memory: Dict[str, Any] = {}

    def __call__(self, embeddings: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        """A forward hook."""
        self.tokens, self.embeddings = inputs[0], output.detach()
        self.memory = {}

    def __getstate__(self):
        return dict(tokens=None, embeddings=None, memory={})  # parts of a graph cannot be copied


@dataclass
class _Pass:
    """What a layer's MoE layer is told of the batch that goes through."""

    padding_mask: Optional[Tensor] = None
    tokens: Optional[Tensor] = None
    embeddings: Optional[Tensor] = None
    memory: Dict[str, Any] = field(default_factory=dict)
    generating: bool = False
    first_row: int = 0


class MoEFeedForward:
    """Mixin for a fairseq layer whose feed-forward network is ``self.moe``, an ``MoELayer``.

    Attributes:
        moe: the MoE layer.
        schedule: phase and temperature at each update.
        make_schedule: makes it for experts that have spawned by themselves, from the update of the spawn.
        num_updates: the update that fairseq last told; ``None`` before the first.
        rows_routed: how many rows all ranks have routed in this layer in the update that is being made.
        idle: whether the batch is a stand-in (fairseq's dummy batch), which is not to be routed.
        loss_weights: weight of each of the auxiliary losses.
        stack: what the layers of the stack share.
        ffn_dim: hidden units of the base expert.
        widths: hidden units of each expert once they have spawned.
        checkpoint_activations: whether to recompute activations in the backward pass.
        offload_activations: whether to keep the layer's input on the CPU until then.
    """

    moe: MoELayer
    schedule: Schedule
    make_schedule: Callable[[Optional[int]], Schedule]
    loss_weights: Dict[str, float]
    num_updates: Optional[int] = None
    rows_routed = 0
    is_dummy_batch = False
    checkpoint_activations = False
    offload_activations = False
    stack: StackInput
    ffn_dim: int
    widths: List[int]
    _pass = _Pass()

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq calls this before each batch and when it loads a checkpoint."""
        if num_updates != self.num_updates:
            self.begin_update()
        self.num_updates = num_updates

    def begin_update(self) -> None:
        """Whoever drives the training calls this before the first batch of an update."""
        self.rows_routed = 0

    @property
    def context(self) -> RoutingContext:
        """What the router is told at this update."""
        phase = self.schedule.phase(self.num_updates, self.moe.spawned)
        return RoutingContext(
            temperature=self.schedule.temperature(self.num_updates),
            hard=phase == phase.HARD,
            losses=["balance"] + [name for name, weight in self.loss_weights.items() if weight > 0],
        )

    def fc1(self, x: Tensor) -> Tensor:
        """The whole feed-forward network; x: (seq, batch, dim)."""
        batch, moe = self._pass, self.moe
        context = self.context
        context.memory, context.statistics = batch.memory, not batch.generating
        # One sentence after another, without padding: an order that does not depend on what else is in the
        # batch, so that tokens have the same places, and noise, on any number of ranks.
        x = x.transpose(0, 1)
        tokens, embeddings = batch.tokens, batch.embeddings
        if tokens is not None and tokens.shape != x.shape[:2]:
            tokens = embeddings = None  # fairseq was given other embeddings than those of tokens
        padding_mask = batch.padding_mask
        if self.training:
            context.noise_key = ("gate", moe.spawner.seed, self.num_updates, moe.spawner.layer)
            context.first_row = batch.first_row
            if self.is_dummy_batch:
                padding_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        sequences = torch.arange(x.shape[0], device=x.device).unsqueeze(1).expand(x.shape[:2])
        return moe(x, context, padding_mask, tokens, sequences, embeddings).transpose(0, 1)

    def run(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor],
        layer: Callable[[Tensor], Any],
        generating: bool = False,
    ):
        """Run fairseq's layer on x, telling the MoE layer what it does not see in x.

        Args:
            x: (seq, batch, dim).
            padding_mask: bool, (batch, seq).
            layer: fairseq's ``forward`` as a function of x.
            generating: whether x is the next step of what is being generated.
        """
        stack, memory, first_row = self.stack, dict(self.stack.memory), self.rows_routed
        tokens, embeddings = stack.tokens, stack.embeddings

        def forward(x: Tensor):
            # a copy, so that a second pass for the sake of the gradients finds what the first one found
            self._pass = _Pass(padding_mask, tokens, embeddings, dict(memory), generating, first_row)
            try:
                return layer(x)
            finally:
                self.stack.memory = self._pass.memory
                if self.training:
                    self.rows_routed = first_row + self.stack.memory.get("rows_of_ranks", (0, 0, 0))[2]
                self._pass = _Pass()

        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return forward(x)
        # Not fairseq's checkpoint: that one runs the first pass without a graph, in which the
        # auxiliary losses, which are no output of the layer, would lose their gradient.
        if self.offload_activations:
            device, x = x.device, x.cpu()
            return checkpoint(lambda y: forward(y.to(device)), x, use_reentrant=False)
        return checkpoint(forward, x, use_reentrant=False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # here, and not in fairseq's upgrade_state_dict_named, because layers may be pruned in between
        self._take_dense(state_dict, prefix)
        self._check_checkpoint(state_dict, prefix[:-1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _take_dense(self, state_dict, prefix: str) -> None:
        """Let a dense checkpoint's feed-forward network be the base expert."""
        experts = prefix + "moe.experts."
        for old, new in (
            ("fc1.weight", "w1"),
            ("fc1.bias", "b1"),
            ("fc2.weight", "w2"),
            ("fc2.bias", "b2"),
        ):
            tensor = state_dict.pop(prefix + old, None)
            if tensor is not None:
                tensor = tensor.t().contiguous() if new == "w2" else tensor
                state_dict[experts + new] = tensor.unsqueeze(0) if new == "b2" else tensor
        for kind in ("weight", "bias"):
            norm = state_dict.pop(f"{prefix}ffn_layernorm.{kind}", None)
            if norm is not None:
                state_dict[f"{experts}hidden.norm.{kind}"] = norm

    def _check_checkpoint(self, state_dict, name: str) -> None:
        prefix, moe = name + ".moe.", self.moe
        w1, b2 = (state_dict.get(f"{prefix}experts.{key}") for key in ("w1", "b2"))
        if w1 is None or b2 is None:
            return  # fairseq names the missing keys
        if is_shard(moe, state_dict, prefix):
            return  # the layer's own state
        widths = state_dict.get(prefix + WIDTHS_OF_SHARD)
        found, units = (b2.shape[0], w1.shape[0]) if widths is None else (len(widths), int(widths.sum()))
        if found not in (1, moe.num_experts) and not moe.resizes:
            raise CheckpointMismatch(
                f"The checkpoint has {found} experts in {name}, but --moe-experts is {moe.num_experts}: give "
                f"--moe-experts {found}."
            )
        expected = sum(self.widths) if found > 1 else self.ffn_dim
        if units != expected and not moe.resizes:
            raise CheckpointMismatch(
                f"The checkpoint's experts in {name} have {units} hidden units in all, but the model's "
                f"{expected}: give the ffn-embed-dim, --moe-expert-sizes and --moe-total-ffn-dim that it was "
                "trained with."
            )
        router = {key[len(prefix) :] for key in state_dict if key.startswith(prefix + "router.")}
        expected = {"router." + key for key in (moe.router or moe.make_router()).state_dict()}
        if router and router != expected:
            raise CheckpointMismatch(
                f"The checkpoint's router in {name} has the parameters {sorted(router)}, but that of "
                f"--moe-router has {sorted(expected)}: give the --moe-router that it was trained with."
            )


class MoEEncoderLayer(MoEFeedForward, compat.EncoderLayer):
    """fairseq's encoder layer with an MoE layer."""

    def forward(self, x, encoder_padding_mask, attn_mask=None):
        """See fairseq's ``TransformerEncoderLayerBase``."""
        layer = partial(super().forward, encoder_padding_mask=encoder_padding_mask, attn_mask=attn_mask)
        return self.run(x, encoder_padding_mask, layer)


class MoEDecoderLayer(MoEFeedForward, TransformerDecoderLayerBase):
    """fairseq's decoder layer with an MoE layer."""

    def forward(
        self,
        x,
        encoder_out=None,
        encoder_padding_mask=None,
        incremental_state=None,
        *args,
        self_attn_padding_mask=None,
        **kwargs,
    ):
        """See fairseq's ``TransformerDecoderLayerBase``."""
        parent = super().forward

        def layer(x):
            return parent(
                x,
                encoder_out,
                encoder_padding_mask,
                incremental_state,
                *args,
                self_attn_padding_mask=self_attn_padding_mask,
                **kwargs,
            )

        return self.run(x, self_attn_padding_mask, layer, generating=incremental_state is not None)


class MoEModel:
    """Mixin for a fairseq model whose layers have MoE layers.

    Attributes:
        moe_config: what the options were resolved to.
        plateau: decides when the experts spawn, and is part of the model's state; ``None`` if the options
            say when.
    """

    moe_config: MoEConfig
    plateau: Optional[Plateau] = None

    def with_config(self, config: MoEConfig) -> "MoEModel":
        """The model, which knows what its options were resolved to."""
        self.moe_config = config
        self.plateau = config.make_plateau()
        return self

    def count_from_spawn(self) -> None:
        """Let the layers' schedules count from the spawn that ``plateau`` tells."""
        for _, layer in moe_layers(self):
            layer.schedule = layer.make_schedule(self.plateau.spawn_update)

    def upgrade_state_dict_named(self, state_dict, name: str) -> None:
        """See fairseq's ``BaseFairseqModel``."""
        compat.drop_fast_path_copies(state_dict)
        super().upgrade_state_dict_named(state_dict, name)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.plateau is not None:
            destination.update({prefix + key: x for key, x in self.plateau.state().items()})

    def _load_plateau(self, state_dict, prefix: str) -> None:
        """Take the plateau's state, which there is if the experts of its run spawned by themselves."""
        keys = [key for key in Plateau.KEYS if prefix + key in state_dict]
        state = {key: state_dict.pop(prefix + key) for key in keys}
        if state and self.plateau is not None:
            self.plateau.load(state)
            self.count_from_spawn()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Refuse MoE layers in other places than the model's."""
        self._load_plateau(state_dict, prefix)
        end = ".moe.experts.b2"
        found = {key[: -len(end)] for key in state_dict if key.endswith(end)}
        expected = {prefix + layer for layer, _ in moe_layers(self)}
        if found and found != expected:
            raise CheckpointMismatch(
                f"The checkpoint has MoE layers at {sorted(found)}, but the model has them at "
                f"{sorted(expected)}: give the --moe-freq that it was trained with."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def moe_layers(model: nn.Module) -> Iterator[Tuple[str, MoEFeedForward]]:
    """Name and layer of each fairseq layer with an MoE layer, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, MoEFeedForward):
            yield name, module
