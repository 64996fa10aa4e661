"""Give the layers of a model that fairseq has built their MoE layers.

A model is built by fairseq itself and then every ``moe_freq``-th layer is given an MoE layer that takes
over ``fc1`` and ``fc2`` as its base expert.
"""

import logging
import re
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from fairseq.modules import gelu
from fairseq.modules.checkpoint_activations import unwrap_checkpoint
from fairseq.modules.layer_drop import LayerDropModuleList
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn
from torch.nn import functional as F

from .. import compat
from ..config.options import flag
from ..moe import Experts, Hidden, MoELayer, RoutingContext
from ..moe.plan import check_linear_gate
from . import make
from .feed_forward import MoEDecoderLayer, MoEEncoderLayer, StackInput
from .layer_drop import MoELayerDrop

logger = logging.getLogger(__name__)


def add_experts(
    cfg: Any,
    stacks: Dict[str, nn.Module],
    init: Callable[[nn.Module], Any] = lambda linear: None,
) -> None:
    """Give every ``moe_freq``-th layer of each stack an MoE layer, as the options say.

    Args:
        cfg: the model's configuration with ``MoEOptions``.
        stacks: the ``encoder``, the ``decoder``, or both, each with its ``layers``, ``embed_tokens`` and
            ``dictionary``.
        init: what the model does to the linear layers that fairseq's layers build.

    Raises:
        ValueError: options that contradict each other, or no layer to give an MoE layer to.
    """
    # not list(layers): LayerDrop leaves out some layers, at random, when its list is iterated over
    layers = {side: list(stack.layers.children()) for side, stack in stacks.items()}
    chosen = {
        side: [
            layer for i, layer in zip(_layer_numbers(cfg, side, stack), stack) if (i + 1) % cfg.moe_freq == 0
        ]
        for side, stack in layers.items()
    }
    if not any(chosen.values()):
        raise ValueError(
            f"--moe-freq {cfg.moe_freq} is greater than the number of layers "
            f"({max(map(len, layers.values()))}), so that no layer would be an MoE layer: lower it."
        )
    number = 0
    for side, stack in stacks.items():
        _check_side(cfg, side)
        builder = _StackBuilder(cfg, stack, init)
        for layer in chosen[side]:
            builder.add_experts(layer, number)
            number += 1
        if chosen[side]:
            logger.info(
                f"{side}: {len(chosen[side])} of {len(layers[side])} layers with {cfg.moe_experts} experts "
                f"of {_listed(chosen[side][0].widths)} hidden units"
            )
        compat.remove_encoder_fast_path(layers[side])


def _listed(widths: List[int]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else ", ".join(map(str, widths))


def _layer_numbers(cfg: Any, side: str, stack: Sequence[nn.Module]) -> Sequence[int]:
    """The numbers that layers have, or had before ``--encoder-layers-to-keep`` left some out."""
    keep = getattr(cfg, side + "_layers_to_keep", None)
    return sorted(map(int, keep.split(","))) if keep else range(len(stack))


def _check_side(cfg: Any, side: str) -> None:
    if side == "decoder" and make.router_class(cfg).needs_whole_sequence:
        raise ValueError(
            f"--moe-router {cfg.moe_router} mixes each token with later ones, which a decoder must not see: "
            f"choose another router, or use {cfg.moe_router} in evomoe_roberta."
        )


class _StackBuilder:
    """Gives layers of one stack their MoE layers."""

    def __init__(self, cfg: Any, stack: nn.Module, init: Callable[[nn.Module], Any]) -> None:
        self.cfg = cfg
        self.init = init
        self.input = StackInput()
        self.shared: Dict[str, nn.Module] = {}
        self.vocabulary = make.make_vocabulary(stack.dictionary, stack.embed_tokens)
        stack.embed_tokens.register_forward_hook(self.input)
        if type(stack.layers) is LayerDropModuleList:
            stack.layers.__class__ = MoELayerDrop

    def add_experts(self, layer: nn.Module, number: int) -> None:
        """Replace a layer's feed-forward network.

        Args:
            layer: fairseq's layer.
            number: of the MoE layer in the model.
        """
        cfg, fc1, fc2 = self.cfg, layer.fc1, layer.fc2
        with _named_as_flags(cfg):
            make.widths(cfg, fc1.out_features)
        hidden, gated = _take_apart(cfg, layer)
        layer.ffn_dim = fc1.out_features
        layer.widths = make.widths(cfg, layer.ffn_dim)
        layer.stack = self.input
        layer.make_schedule = partial(make.make_schedule, cfg)
        layer.schedule = layer.make_schedule()
        layer.checkpoint_activations = bool(getattr(cfg, "checkpoint_activations", False))
        layer.offload_activations = bool(getattr(cfg, "offload_activations", False))

        def initialize(experts: Experts, expert: int) -> None:
            """The dense model's own initial weights for the base, and for one expert out of many like it."""
            base = len(experts.widths) == 1
            dense = not experts.gated and cfg.moe_heads == 1 and expert == 0
            if dense and experts.widths[0] == fc1.out_features and (base or not cfg.moe_shared_expert):
                experts.set_expert(0, fc1, fc2)
            else:
                self._fill(layer, experts, expert)

        layer.moe = self._moe_layer(layer, fc1.in_features, number, hidden, gated, initialize)
        self._try_out(layer)

    def _moe_layer(
        self,
        layer: nn.Module,
        dim: int,
        number: int,
        hidden: Hidden,
        gated: bool,
        initialize: Callable[[Experts, int], None],
    ) -> MoELayer:
        cfg = self.cfg
        spawn = make.make_spawn(cfg, number, layer.widths)
        with _named_as_flags(cfg):
            moe = MoELayer(
                dim,
                layer.ffn_dim,
                cfg.moe_experts,
                make.router_class(cfg),
                spawned=layer.schedule.spawn_update == 0,
                widths=layer.widths,
                between=hidden,
                gated=gated,
                heads=cfg.moe_heads,
                shared_expert=cfg.moe_shared_expert,
                hyper_adapter=cfg.moe_hyper_adapter,
                loss_weights=make.loss_weights(cfg),
                scaling_factor=cfg.moe_scaling_factor,
                spawner=spawn,
                initialize=initialize,
                vocabulary=self.vocabulary,
                shared=self.shared,
                **make.router_arguments(cfg),
            )
        moe.transport = make.make_transport(cfg, spawn)
        return moe

    def _try_out(self, layer: nn.Module) -> None:
        """Find now what would else go wrong when the experts spawn, long into the run."""
        cfg, moe = self.cfg, layer.moe
        with _named_as_flags(cfg):
            router = moe.make_router({}).eval()
        if cfg.moe_experts == 1:
            return
        if layer.schedule.spawn_update > 0:
            moe.spawner.widths_from(layer.ffn_dim)
        if moe.spawner.makes_gate:
            with _named_as_flags(cfg):
                check_linear_gate(router)
        if cfg.moe_penalty_weight > 0:
            zero_T = torch.zeros(1, dtype=torch.long)
            embedding_TC = torch.zeros(1, self.vocabulary.dim)
            context = RoutingContext(token_T=zero_T, embedding_TC=embedding_TC, sequence_T=zero_T)
            if router(torch.zeros(1, moe.experts.dim), context).probability_TE is None:
                raise ValueError(
                    "--moe-penalty-weight penalises the gate's probabilities, and --moe-router "
                    f"{cfg.moe_router} has none: choose another router or leave it out."
                )

    def _fill(self, layer: nn.Module, experts: Experts, expert: int) -> None:
        """Give an expert the initial weights that the model gives to a feed-forward network."""
        dim, width = experts.dim, experts.widths[expert]
        fc1, fc2 = layer.build_fc1(dim, width, 0, 8), layer.build_fc2(width, dim, 0, 8)
        fc3 = layer.build_fc1(dim, width, 0, 8) if experts.gated else None
        for linear in (fc1, fc2, fc3):
            if linear is not None:
                self.init(linear)
        experts.set_expert(expert, fc1, fc2, fc3)


@contextmanager
def _named_as_flags(cfg: Any) -> Iterator[None]:
    """Let an error of a part of the layer name the flags that the part's arguments come from."""
    names = make.router_options(make.router_class(cfg)) + ["expert_sizes", "total_ffn_dim", "heads"]
    try:
        yield
    except ValueError as error:
        # names of options are in backticks, or those of the parts' arguments
        pattern = r"`(\w+)`|\b({})\b".format("|".join(names))
        message = re.sub(pattern, lambda name: flag("moe_" + (name[1] or name[2])), str(error))
        raise ValueError(message.rstrip(".") + ".") from error


def _take_apart(cfg: Any, layer: nn.Module) -> Tuple[Hidden, bool]:
    """Make room in fairseq's layer for an MoE layer.

    Returns:
        what was between its two linear layers, with the experts' activation; whether that is a gated one.
    """
    del layer._modules["fc1"], layer._modules["fc2"]
    unwrap_checkpoint(layer)
    vars(layer).pop("forward", None)  # unwrapping leaves fairseq's own there, which would hide the class's
    layer.__class__ = {
        TransformerEncoderLayerBase: MoEEncoderLayer,
        TransformerDecoderLayerBase: MoEDecoderLayer,
    }[type(layer)]

    norm = layer._modules.pop("ffn_layernorm", None)
    layer.ffn_layernorm = None
    if norm is not None and set(make.widths(cfg, norm.normalized_shape[0])) != set(norm.normalized_shape):
        raise ValueError(
            "--scale-fc normalises hidden units, so that experts must be as wide as the model's other "
            "feed-forward networks: leave it out, or --moe-expert-sizes, --moe-total-ffn-dim and "
            "--moe-spawn-method split."
        )
    # fairseq's gelu computes in float32 and rounds, which is what torch's does
    of_model = F.gelu if layer.activation_fn is gelu else layer.activation_fn
    activation, gated = make.activation(cfg, of_model)
    hidden = Hidden(activation, layer.activation_dropout_module, norm)
    layer.activation_fn = _identity
    layer.activation_dropout_module = layer.fc2 = nn.Identity()
    return hidden, gated


def _identity(x: Tensor) -> Tensor:
    return x
