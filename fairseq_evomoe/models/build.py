"""Give the layers of a model that fairseq has built their MoE layers.

A model is built by fairseq itself and then every ``moe_freq``-th layer is given an MoE layer that takes
over ``fc1`` and ``fc2`` as its base expert.
"""

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from fairseq.modules import gelu
from fairseq.modules.checkpoint_activations import unwrap_checkpoint
from fairseq.modules.layer_drop import LayerDropModuleList
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import nn
from torch.nn import functional as F

from .. import compat
from ..config.config import ExpertBias, MoEConfig
from ..config.errors import ConfigError
from ..moe import Experts, Hidden, MoELayer, RoutingContext, Vocabulary
from ..moe.gate_warmup import GateWarmup
from ..moe.multiplying import try_routers
from ..moe.options import OptionError
from ..moe.plan import check_linear_gate
from .feed_forward import MoEDecoderLayer, MoEEncoderLayer, StackInput, identity
from .layer_drop import MoELayerDrop
from .low_rank import add_low_rank_experts

Layer = Any
"""A layer of fairseq's, or a stack of them, that is given other attributes than its class declares."""


def add_experts(
    cfg: Any,
    config: MoEConfig,
    stacks: Dict[str, Layer],
    init: Callable[[nn.Module], Any] = lambda linear: None,
) -> str:
    """Give every ``moe_freq``-th layer of each stack an MoE layer, as the options say.

    Args:
        cfg: fairseq's configuration of the model.
        config: of its MoE layers.
        stacks: the ``encoder``, the ``decoder``, or both, each with its ``layers``, ``embed_tokens`` and
            ``dictionary``.
        init: what the model does to the linear layers that fairseq's layers build.

    Returns:
        which layers have which experts, in words.

    Raises:
        ConfigError: options that contradict each other, or no layer to give an MoE layer to.
    """
    # not list(layers): LayerDrop leaves out some layers, at random, when its list is iterated over
    layers = {side: list(stack.layers.children()) for side, stack in stacks.items()}
    freq = config.layer.freq
    chosen = {
        side: [layer for i, layer in zip(_layer_numbers(cfg, side, stack), stack) if (i + 1) % freq == 0]
        for side, stack in layers.items()
    }
    with _config_errors():
        if not any(chosen.values()):
            most = max(map(len, layers.values()))
            raise OptionError(
                "freq",
                f"`freq` {freq} is greater than the number of layers ({most}), so that no layer would be an "
                "MoE layer: lower it.",
            )
        if config.low_rank.rank > 0:
            return add_low_rank_experts(cfg, config, chosen, layers)
        number = 0
        for side, stack in stacks.items():
            _check_side(config, side)
            builder = _StackBuilder(cfg, config, stack, init)
            for layer in chosen[side]:
                builder.add_experts(layer, number)
                number += 1
            compat.remove_encoder_fast_path(layers[side])
    experts = ", then ".join(str(stage.experts) for stage in config.stages)
    return "; ".join(
        f"{side}: {len(chosen[side])} of {len(layers[side])} layers with {experts} experts of "
        f"{_listed(chosen[side][0].widths)} hidden units"
        for side in stacks
        if chosen[side]
    )


@contextmanager
def _config_errors() -> Iterator[None]:
    """Let an error of a part of the layer name the flags that the part's options come from."""
    try:
        yield
    except OptionError as error:
        raise ConfigError([error]) from error


def _listed(widths: List[int]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else ", ".join(map(str, widths))


def _layer_numbers(cfg: Any, side: str, stack: Sequence[nn.Module]) -> Sequence[int]:
    """The numbers that layers have, or had before ``--encoder-layers-to-keep`` left some out."""
    keep = getattr(cfg, side + "_layers_to_keep", None)
    return sorted(map(int, keep.split(","))) if keep else range(len(stack))


def _check_side(config: MoEConfig, side: str) -> None:
    if side == "decoder" and config.router_class.needs_whole_sequence:
        raise OptionError(
            "router",
            f"With `router` {config.router} a token's output depends on later ones, which a decoder must not "
            f"see: choose another router, or use {config.router} in evomoe_roberta.",
        )
    factor = getattr(config.router_options, "eval_capacity_factor", 0)
    if side == "decoder" and factor > 0:
        raise OptionError(
            "eval_capacity_factor",
            f"`eval_capacity_factor` {factor:g} would let what a decoder drops depend on how many tokens "
            "there are, of which it must not know the later ones: leave it out, or use it in evomoe_roberta.",
        )


class _StackBuilder:
    """Gives layers of one stack their MoE layers."""

    def __init__(self, cfg: Any, config: MoEConfig, stack: Layer, init: Callable[[nn.Module], Any]) -> None:
        self.cfg = cfg
        self.config = config
        self.init = init
        self.input = StackInput()
        self.shared: Dict[str, nn.Module] = {}
        self.vocabulary = make_vocabulary(stack.dictionary, stack.embed_tokens)
        stack.embed_tokens.register_forward_hook(self.input)
        if type(stack.layers) is LayerDropModuleList:
            stack.layers.__class__ = MoELayerDrop

    def add_experts(self, layer: Layer, number: int) -> None:
        """Replace a layer's feed-forward network.

        Args:
            layer: fairseq's layer.
            number: of the MoE layer in the model.
        """
        cfg, config, fc1, fc2 = self.cfg, self.config, layer.fc1, layer.fc2
        layer.ffn_dim = fc1.out_features
        layer.widths = config.first_widths(layer.ffn_dim)
        hidden, gated = _take_apart(config, layer)
        layer.stack = self.input
        layer.make_schedule = config.make_schedule
        layer.schedule = layer.make_schedule()
        layer.checkpoint_activations = bool(getattr(cfg, "checkpoint_activations", False))
        layer.offload_activations = bool(getattr(cfg, "offload_activations", False))

        def initialize(experts: Experts, expert: int) -> None:
            """The dense model's own initial weights for the base, and for one expert out of many like it."""
            base = len(experts.widths) == 1
            dense = not experts.gated and config.layer.heads == 1 and expert == 0
            if dense and experts.widths[0] == fc1.out_features and (base or not config.layer.shared_expert):
                experts.set_expert(0, fc1, fc2)
            else:
                self._fill(layer, experts, expert)

        layer.moe = MoELayer(
            fc1.in_features,
            layer.ffn_dim,
            [stage.experts for stage in config.stages],
            config.router_class,
            spawned=layer.schedule.spawn_update == 0,
            widths=layer.widths,
            between=hidden,
            gated=gated,
            bias=config.layer.expert_bias != ExpertBias.none,
            heads=config.layer.heads,
            shared_expert=config.layer.shared_expert,
            hyper_adapter=config.layer.hyper_adapter,
            loss_weights=config.loss_weights(),
            scaling_factor=config.layer.scaling_factor,
            output_masking=config.layer.output_masking,
            spawner=config.make_spawn(number, layer.widths),
            initialize=initialize,
            vocabulary=self.vocabulary,
            shared=self.shared,
            **config.router_arguments(),
        )
        if config.schedule.gate_warmup and config.experts > 1 and not layer.moe.spawned:
            layer.moe.warmup = GateWarmup(layer.moe)
        layer.moe.transport = config.make_transport(number)
        self._try_out(layer)

    def _try_out(self, layer: Layer) -> None:
        """Find now what would else go wrong when the experts spawn, long into the run."""
        config, moe = self.config, layer.moe
        router = moe.make_router({}).eval()
        if config.experts == 1:
            return
        if layer.schedule.spawn_update > 0:
            moe.spawner.widths_from(layer.ffn_dim)
        try_routers(moe)
        if moe.spawner.makes_gate:
            check_linear_gate(router, moe.spawner.method_name)
        if config.layer.penalty_weight > 0:
            zero_T = torch.zeros(1, dtype=torch.long)
            embedding_TC = torch.zeros(1, self.vocabulary.dim)
            context = RoutingContext(token_T=zero_T, embedding_TC=embedding_TC, sequence_T=zero_T)
            if router(torch.zeros(1, moe.experts.dim), context).probability_TE is None:
                raise OptionError(
                    "penalty_weight",
                    f"`penalty_weight` penalises the gate's probabilities, and `router` {config.router} has "
                    "none: choose another router or leave it out.",
                )

    def _fill(self, layer: Layer, experts: Experts, expert: int) -> None:
        """Give an expert the initial weights that the model gives to a feed-forward network."""
        dim, width = experts.dim, experts.widths[expert]
        fc1, fc2 = layer.build_fc1(dim, width, 0, 8), layer.build_fc2(width, dim, 0, 8)
        fc3 = layer.build_fc1(dim, width, 0, 8) if experts.gated else None
        for linear in (fc1, fc2, fc3):
            if linear is not None:
                self.init(linear)
        experts.set_expert(expert, fc1, fc2, fc3)


def _take_apart(config: MoEConfig, layer: Layer) -> Tuple[Hidden, bool]:
    """Make room in fairseq's layer for an MoE layer.

    Returns:
        what was between its two linear layers, with the experts' activation; whether that is a gated one.
    """
    del layer._modules["fc1"], layer._modules["fc2"]
    unwrap_checkpoint(layer)
    layer.__dict__.pop("forward", None)  # unwrapping leaves fairseq's own there, which would hide the class's
    layer.__class__ = {
        TransformerEncoderLayerBase: MoEEncoderLayer,
        TransformerDecoderLayerBase: MoEDecoderLayer,
    }[type(layer)]

    norm = layer._modules.pop("ffn_layernorm", None)
    layer.ffn_layernorm = None
    if norm is not None and set(layer.widths) != set(norm.normalized_shape):
        raise OptionError(
            "expert_sizes",
            "--scale-fc normalises hidden units, so that experts must be as wide as the model's other "
            "feed-forward networks: leave it out, or `expert_sizes`, `total_ffn_dim` and `spawn_method` "
            "split.",
        )
    # fairseq's gelu computes in float32 and rounds, which is what torch's does
    of_model = F.gelu if layer.activation_fn is gelu else layer.activation_fn
    activation, gated = config.activation(of_model)
    hidden = Hidden(activation, layer.activation_dropout_module, norm)
    layer.activation_fn = identity
    layer.activation_dropout_module = layer.fc2 = nn.Identity()
    return hidden, gated


def make_vocabulary(dictionary: Any, embeddings: Any) -> Vocabulary:
    """How often fairseq's dictionary says that each token occurs.

    Args:
        dictionary: fairseq's dictionary.
        embeddings: the embeddings that are looked up, which may have more rows.
    """
    counts = list(dictionary.count)
    size = max(len(counts), getattr(embeddings, "num_embeddings", 0))
    count_V = torch.tensor(counts + [0] * (size - len(counts)), dtype=torch.float32)
    return Vocabulary(size, count_V, _width(embeddings))


@torch.no_grad()
def _width(embeddings: Any) -> int:
    """Width of what is looked up."""
    width = getattr(embeddings, "embedding_dim", None)
    if width is None:  # adaptive input, or characters
        width = embeddings(torch.full((1, 1), embeddings.padding_idx, dtype=torch.long)).shape[-1]
    return width
