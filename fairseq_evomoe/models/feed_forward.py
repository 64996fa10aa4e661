"""fairseq's Transformer layers with an MoE layer in place of their feed-forward network.

A model is built by fairseq itself and then every ``moe_freq``-th layer is given an MoE layer that takes
over ``fc1`` and ``fc2`` as its base expert.  ``fc1`` becomes the MoE layer and what follows it, up to and
including ``fc2``, the identity, so that fairseq's own ``forward`` runs unchanged around it.
"""

from functools import partial
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import torch
from fairseq.modules import gelu
from fairseq.modules.checkpoint_activations import unwrap_checkpoint
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import compat
from ..evolution.schedule import Schedule
from ..moe import Experts, Hidden, MoELayer, RoutingContext
from . import options


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the options of the model that is to load it."""


def _identity(x: Tensor) -> Tensor:
    return x


class MoEFeedForward:
    """Mixin for a fairseq layer whose feed-forward network is ``self.moe``, an ``MoELayer``.

    Attributes:
        moe: the MoE layer.
        schedule: phase and temperature at each update.
        num_updates: the update that fairseq last told; ``None`` before the first.
        loss_weights: weight of each of the router's auxiliary losses.
        checkpoint_activations: whether to recompute activations in the backward pass.
        offload_activations: whether to keep the layer's input on the CPU until then.
    """

    moe: MoELayer
    schedule: Schedule
    loss_weights: Dict[str, float]
    num_updates: Optional[int] = None
    checkpoint_activations = False
    offload_activations = False
    _padding_mask: Optional[Tensor] = None

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq calls this before each update and when it loads a checkpoint."""
        self.num_updates = num_updates

    @property
    def context(self) -> RoutingContext:
        """What the router is told at this update."""
        phase = self.schedule.phase(self.num_updates, self.moe.grown)
        return RoutingContext(
            temperature=self.schedule.temperature(self.num_updates), hard=phase == phase.HARD
        )

    def fc1(self, x: Tensor) -> Tensor:
        """The whole feed-forward network; x: (seq, batch, dim)."""
        mask = self._padding_mask
        return self.moe(x, self.context, None if mask is None else mask.t())

    def run(self, x: Tensor, padding_mask: Optional[Tensor], layer: Callable[[Tensor], Any]):
        """Run fairseq's layer on x, telling the MoE layer which positions are padding.

        Args:
            x: (seq, batch, dim).
            padding_mask: bool, (batch, seq).
            layer: fairseq's ``forward`` as a function of x.
        """

        def forward(x: Tensor):
            self._padding_mask = padding_mask
            try:
                return layer(x)
            finally:
                self._padding_mask = None

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
            norm = state_dict.pop("{}ffn_layernorm.{}".format(prefix, kind), None)
            if norm is not None:
                state_dict["{}hidden.norm.{}".format(experts, kind)] = norm

    def _check_checkpoint(self, state_dict, name: str) -> None:
        prefix, moe = name + ".moe.", self.moe
        width = moe.experts.widths[0]
        w1, b2 = (state_dict.get("{}experts.{}".format(prefix, key)) for key in ("w1", "b2"))
        if w1 is None or b2 is None:
            return  # fairseq names the missing keys
        found = b2.shape[0]
        if found not in (1, moe.num_experts):
            raise CheckpointMismatch(
                "The checkpoint has {0} experts in {1}, but --moe-experts is {2}: give --moe-experts "
                "{0}.".format(found, name, moe.num_experts)
            )
        if w1.shape[0] != found * width:
            raise CheckpointMismatch(
                "The checkpoint's experts in {} have {} hidden units each, but the model's {}: give the "
                "ffn-embed-dim that it was trained with.".format(name, w1.shape[0] // found, width)
            )
        router = {key[len(prefix) :] for key in state_dict if key.startswith(prefix + "router.")}
        expected = {"router." + key for key in (moe.router or moe.make_router()).state_dict()}
        if router and router != expected:
            raise CheckpointMismatch(
                "The checkpoint's router in {} has the parameters {}, but that of --moe-router has {}: "
                "give the --moe-router that it was trained with.".format(
                    name, sorted(router), sorted(expected)
                )
            )


class MoEEncoderLayer(MoEFeedForward, compat.EncoderLayer):
    """fairseq's encoder layer with an MoE layer."""

    def forward(self, x, encoder_padding_mask, attn_mask=None):
        """See fairseq's ``TransformerEncoderLayerBase``."""
        layer = partial(super().forward, encoder_padding_mask=encoder_padding_mask, attn_mask=attn_mask)
        return self.run(x, encoder_padding_mask, layer)


class MoEDecoderLayer(MoEFeedForward, TransformerDecoderLayerBase):
    """fairseq's decoder layer with an MoE layer."""

    def forward(self, x, *args, self_attn_padding_mask=None, **kwargs):
        """See fairseq's ``TransformerDecoderLayerBase``."""
        parent = super().forward

        def layer(x):
            return parent(x, *args, self_attn_padding_mask=self_attn_padding_mask, **kwargs)

        return self.run(x, self_attn_padding_mask, layer)


class MoEModel:
    """Mixin for a fairseq model whose layers have MoE layers."""

    def upgrade_state_dict_named(self, state_dict, name: str) -> None:
        """See fairseq's ``BaseFairseqModel``."""
        compat.drop_fast_path_copies(state_dict)
        super().upgrade_state_dict_named(state_dict, name)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Refuse MoE layers in other places than the model's."""
        end = ".moe.experts.b2"
        found = {key[: -len(end)] for key in state_dict if key.endswith(end)}
        expected = {prefix + layer for layer, _ in moe_layers(self)}
        if found and found != expected:
            raise CheckpointMismatch(
                "The checkpoint has MoE layers at {}, but the model has them at {}: give the --moe-freq "
                "that it was trained with.".format(sorted(found), sorted(expected))
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def add_experts(
    cfg: Any,
    stacks: Dict[str, nn.ModuleList],
    init: Callable[[nn.Module], Any] = _identity,
) -> None:
    """Give every ``moe_freq``-th layer of each stack an MoE layer, as the options say.

    Args:
        cfg: the model's configuration with ``MoEOptions``.
        stacks: the layers of the ``encoder``, of the ``decoder``, or of both.
        init: what the model does to the linear layers that fairseq's layers build.

    Raises:
        ValueError: options that contradict each other, or no layer to give an MoE layer to.
    """
    # not list(layers): LayerDrop leaves out some layers, at random, when its list is iterated over
    stacks = {side: list(layers.children()) for side, layers in stacks.items()}
    chosen = [
        layer
        for side, stack in stacks.items()
        for i, layer in zip(_layer_numbers(cfg, side, stack), stack)
        if (i + 1) % cfg.moe_freq == 0
    ]
    if not chosen:
        raise ValueError(
            "--moe-freq {} is greater than the number of layers ({}), so that no layer would be an MoE "
            "layer: lower it.".format(cfg.moe_freq, max(map(len, stacks.values())))
        )
    for number, layer in enumerate(chosen):
        _add_experts(cfg, layer, number, init)
    for stack in stacks.values():
        compat.remove_encoder_fast_path(stack)


def _layer_numbers(cfg: Any, side: str, stack: Sequence[nn.Module]) -> Sequence[int]:
    """The numbers that layers have, or had before ``--encoder-layers-to-keep`` left some out."""
    keep = getattr(cfg, side + "_layers_to_keep", None)
    return sorted(map(int, keep.split(","))) if keep else range(len(stack))


def _add_experts(cfg: Any, layer: nn.Module, number: int, init: Callable) -> None:
    fc1, fc2 = layer._modules.pop("fc1"), layer._modules.pop("fc2")
    unwrap_checkpoint(layer)
    vars(layer).pop("forward", None)  # unwrapping leaves fairseq's own there, which would hide the class's
    layer.__class__ = {
        TransformerEncoderLayerBase: MoEEncoderLayer,
        TransformerDecoderLayerBase: MoEDecoderLayer,
    }[type(layer)]

    norm = layer._modules.pop("ffn_layernorm", None)
    layer.ffn_layernorm = None
    # fairseq's gelu computes in float32 and rounds, which is what torch's does
    activation = F.gelu if layer.activation_fn is gelu else layer.activation_fn
    hidden = Hidden(activation, layer.activation_dropout_module, norm)
    layer.activation_fn = _identity
    layer.activation_dropout_module = layer.fc2 = nn.Identity()

    experts = Experts(fc1.in_features, [fc1.out_features], hidden)
    experts.set_expert(0, fc1, fc2)
    spawn = options.make_spawn(cfg, number, cfg.seed)
    make_router = partial(options.make_router, cfg, fc1.in_features, spawn)
    layer.moe = MoELayer(experts, cfg.moe_experts, make_router, spawn)
    layer.schedule = options.make_schedule(cfg)
    layer.loss_weights = {"balance": cfg.moe_balance_weight}
    layer.checkpoint_activations = bool(getattr(cfg, "checkpoint_activations", False))
    layer.offload_activations = bool(getattr(cfg, "offload_activations", False))
    if layer.schedule.spawn_update == 0 and cfg.moe_experts > 1:
        layer.moe.grow()
        layer.moe.experts.set_expert(0, fc1, fc2)
        for expert in range(1, cfg.moe_experts):
            fresh = [
                layer.build_fc1(fc1.in_features, fc1.out_features, 0, 8),
                layer.build_fc2(fc2.in_features, fc2.out_features, 0, 8),
            ]
            for linear in fresh:
                init(linear)
            layer.moe.experts.set_expert(expert, *fresh)


def moe_layers(model: nn.Module) -> Iterator[Tuple[str, MoEFeedForward]]:
    """Name and layer of each fairseq layer with an MoE layer, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, MoEFeedForward):
            yield name, module
