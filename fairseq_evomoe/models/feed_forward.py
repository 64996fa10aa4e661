"""fairseq's Transformer layers with an MoE layer in place of their feed-forward network.

A model is built by fairseq itself and then every ``moe_freq``-th layer is given an MoE layer that takes
over ``fc1`` and ``fc2`` as its base expert.  ``fc1`` becomes the MoE layer and what follows it, up to and
including ``fc2``, the identity, so that fairseq's own ``forward`` runs unchanged around it.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, cast
from weakref import WeakKeyDictionary

import torch
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from .. import compat
from ..config.config import MoEConfig
from ..config.errors import as_flags
from ..evolution.plateau import Plateau
from ..evolution.schedule import Schedule
from ..moe import MoELayer, RoutingContext
from ..moe.experts import from_dense
from ..moe.loading import StateMismatch
from ..moe.recorder import open_records
from . import low_rank, module_distillation
from .recompute import recomputed

_Mixin: Any = object  # for mypy: what a mixin is mixed into has the rest


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the options of the model that is to load it."""


@dataclass
class Lookup:
    """What the layers of one stack share while it works on a batch.

    Attributes:
        tokens: int64, (batch, seq): the tokens that were looked up.
        embeddings: (batch, seq, C): what was found, without gradient.
        memory: what routers hand on to those of later layers; each layer leaves another dictionary.
    """

    tokens: Optional[Tensor] = None
    embeddings: Optional[Tensor] = None
    memory: Dict[str, Any] = field(default_factory=dict)


class StackInput:
    """Knows what the layers of one stack share while this thread works on a batch.

    It hooks on to the stack's embeddings, which every forward pass looks up first, in incremental decoding
    too; ``forward`` of the stack itself is called by fairseq past any hook.  Each thread finds what it has
    looked up itself.
    """

    def __call__(self, embeddings: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        """A forward hook."""
        # another dictionary, since a copy of the context has the same one; keys are weak, so that a model
        # that is gone takes its batch along
        lookups = WeakKeyDictionary(_lookups.get({}))
        lookups[self] = Lookup(inputs[0], output.detach())
        _lookups.set(lookups)

    @property
    def lookup(self) -> Lookup:
        """What the batch has looked up that this thread works on."""
        return _lookups.get({}).get(self) or Lookup()


_lookups: ContextVar[Mapping[StackInput, Lookup]] = ContextVar("lookups")


@dataclass
class _Batch:
    """What a layer's MoE layer is told of the batch that goes through."""

    padding_mask: Optional[Tensor] = None
    tokens: Optional[Tensor] = None
    embeddings: Optional[Tensor] = None
    memory: Dict[str, Any] = field(default_factory=dict)
    statistics: bool = True
    first_row: int = 0
    residual: Optional[Tensor] = None
    passed: bool = False


_batch: ContextVar[Optional[_Batch]] = ContextVar("batch", default=None)
"""The batch that goes through a layer in this thread, from the layer's ``forward`` to its ``fc1``."""


class MoEFeedForward(_Mixin):
    """Mixin for a fairseq layer whose feed-forward network is ``self.moe``, an ``MoELayer``.

    Attributes:
        moe: the MoE layer.
        schedule: phase and temperature at each update.
        make_schedule: makes it for experts that have spawned by themselves, from the updates of their spawns.
        num_updates: the update that fairseq last told; ``None`` before the first.
        rows_routed: how many rows all ranks have routed in this layer in the update that is being made; only
            training counts them.
        is_dummy_batch: whether the batch is a stand-in of fairseq's, which is not to be routed.
        stack: knows what the layers of the stack share.
        causal: whether the layer must not see later tokens.
        normalize_before: fairseq's; whether its norms come before attention and ``fc1``, or after them.
        ffn_dim: hidden units of the base expert.
        widths: hidden units of each expert once they have spawned, with several stages for the first time.
        checkpoint_activations: whether to recompute activations in the backward pass.
        offload_activations: whether to keep the layer's input on the CPU until then.
    """

    moe: MoELayer
    schedule: Schedule
    make_schedule: Callable[[Sequence[float]], Schedule]
    num_updates: Optional[int] = None
    rows_routed = 0
    is_dummy_batch = False
    checkpoint_activations = False
    offload_activations = False
    stack: StackInput
    causal = False
    normalize_before: bool
    ffn_dim: int
    widths: List[int]

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq calls this before each batch and when it loads a checkpoint."""
        if num_updates != self.num_updates:
            self.begin_update()
        self.num_updates = num_updates

    def begin_update(self) -> None:
        """Whoever drives the training calls this before the first batch of an update."""
        self.rows_routed = 0

    @property
    def loss_weights(self) -> Dict[str, float]:
        """Weight of each of the auxiliary losses."""
        return self.moe.loss_weights

    @property
    def context(self) -> RoutingContext:
        """What the router is told at this update."""
        return self._context(_Batch())

    def _context(self, batch: _Batch) -> RoutingContext:
        """What the router is told of a batch at this update."""
        moe, update = self.moe, self.num_updates
        phase = self.schedule.phase(update, moe.stage)
        return RoutingContext(
            temperature=self.schedule.temperature(update, moe.stage),
            hard=phase == phase.HARD,
            memory=batch.memory,
            statistics=batch.statistics,
            losses=moe.wanted_losses,
            causal=self.causal,
            noise_key=("gate", moe.spawner.seed, update, moe.spawner.layer) if self.training else None,
            warm_up=self.schedule.warms_up(update),
            first_row=batch.first_row,
        )

    def fc1(self, x: Tensor) -> Tensor:
        """The whole feed-forward network; x: (seq, batch, dim)."""
        batch = _batch.get() or _Batch()
        # One sentence after another, without padding: an order that does not depend on what else is in the
        # batch, so that tokens have the same places, and noise, on any number of ranks.
        x = x.transpose(0, 1)
        tokens, embeddings = batch.tokens, batch.embeddings
        if tokens is not None and tokens.shape != x.shape[:2]:
            tokens = embeddings = None  # fairseq was given other embeddings than those of tokens
        padding_mask = batch.padding_mask
        if self.training and self.is_dummy_batch:
            padding_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        sequences = torch.arange(x.shape[0], device=x.device).unsqueeze(1).expand(x.shape[:2])
        # with the norm after, what the output is added to is the input
        residual = batch.residual if self.normalize_before else None
        residual = None if residual is None else residual.transpose(0, 1)
        scale = getattr(self, "w_resid", None)
        if scale is not None and self.moe.in_passes:  # scale_resids
            residual = torch.mul(scale, x if residual is None else residual)
        y = self.moe(x, self._context(batch), padding_mask, tokens, sequences, embeddings, residual)
        batch.passed = True
        return y.transpose(0, 1)

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        """fairseq's sum, around attention and around ``fc1``, of which a router with passes must know."""
        y: Tensor = super().residual_connection(x, residual)  # type: ignore[misc]
        batch = _batch.get()
        if batch is None or not self.moe.in_passes:
            return y
        if batch.passed:
            return self.moe.finish(y)
        batch.residual = y
        return y

    def run(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor],
        layer: Callable[[Tensor], Any],
        generating: bool = False,
    ) -> Any:
        """Run fairseq's layer on x, telling the MoE layer what it does not see in x.

        Args:
            x: (seq, batch, dim).
            padding_mask: bool, (batch, seq).
            layer: fairseq's ``forward`` as a function of x.
            generating: whether x is the next step of what is being generated.
        """
        lookup, first_row = self.stack.lookup, self.rows_routed
        memory = lookup.memory
        # nobody waits for losses in generation and evaluation, unless a criterion or a trainer has asked
        statistics = bool(open_records()) and not generating

        def forward(x: Tensor) -> Any:
            # a copy, so that a second pass for the sake of the gradients, perhaps in another thread, finds
            # what the first one found
            found = lookup.tokens, lookup.embeddings, dict(memory)
            batch = _Batch(padding_mask, *found, statistics, first_row)
            before = _batch.set(batch)
            try:
                return layer(x)
            finally:
                _batch.reset(before)
                lookup.memory = batch.memory
                if self.training:
                    self.rows_routed = first_row + batch.memory.get("rows_of_ranks", (0, 0, 0))[2]

        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return forward(x)
        return recomputed(forward, x, self.offload_activations)

    def _load_from_state_dict(
        self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # here, and not in fairseq's upgrade_state_dict_named, because layers may be pruned in between
        self._take_dense(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _take_dense(self, state_dict: Dict[str, Any], prefix: str) -> None:
        """Let a dense checkpoint's feed-forward network be the base expert."""
        experts = prefix + "moe.experts."
        for dense in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            tensor = state_dict.pop(prefix + dense, None)
            if tensor is not None:
                name, tensor = from_dense(dense, tensor)
                state_dict[experts + name] = tensor
        for kind in ("weight", "bias"):
            norm = state_dict.pop(f"{prefix}ffn_layernorm.{kind}", None)
            if norm is not None:
                state_dict[f"{experts}hidden.norm.{kind}"] = norm


def identity(x: Tensor) -> Tensor:
    """What is left of fairseq's own feed-forward network, after ``fc1``."""
    return x


class MoEEncoderLayer(MoEFeedForward, compat.EncoderLayer):
    """fairseq's encoder layer with an MoE layer."""

    def forward(
        self, x: Tensor, encoder_padding_mask: Optional[Tensor], attn_mask: Optional[Tensor] = None
    ) -> Any:
        """See fairseq's ``TransformerEncoderLayerBase``."""
        layer = partial(super().forward, encoder_padding_mask=encoder_padding_mask, attn_mask=attn_mask)
        return self.run(x, encoder_padding_mask, layer)


class MoEDecoderLayer(MoEFeedForward, TransformerDecoderLayerBase):
    """fairseq's decoder layer with an MoE layer."""

    causal = True

    def forward(
        self,
        x: Tensor,
        encoder_out: Optional[Tensor] = None,
        encoder_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Any]] = None,
        *args: Any,
        self_attn_padding_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Any:
        """See fairseq's ``TransformerDecoderLayerBase``."""
        parent = super().forward

        def layer(x: Tensor) -> Any:
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


class MoEModel(_Mixin):
    """Mixin for a fairseq model whose layers have MoE layers.

    Attributes:
        moe_config: what the options were resolved to.
        experts_in_words: which layers have which experts.
        plateau: decides when the experts spawn, and is part of the model's state; ``None`` if the options
            say when.
        distillation: what the model has besides until its modules have learnt from a teacher's; ``None``
            afterwards, without a teacher, and where the model is not trained.
    """

    moe_config: MoEConfig
    experts_in_words: str
    plateau: Optional[Plateau] = None
    distillation: Optional[module_distillation.ModuleDistillation]  # no default, which would hide the module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See fairseq's model; until its modules have learnt, it is not the model itself that answers."""
        if self.distillation is not None:
            return self.distillation(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def with_config(self, config: MoEConfig, words: str) -> "MoEModel":
        """The model, which knows what its options were resolved to, and which experts it has, in words."""
        self.moe_config = config
        self.experts_in_words = words
        self.plateau = config.make_plateau()
        self.distillation = None
        freeze(cast(nn.Module, self), config.frozen_parts)
        return self

    def count_from_spawn(self) -> None:
        """Let the layers' schedules count from the spawns that ``plateau`` tells."""
        assert self.plateau is not None, "the options say when the experts spawn"
        for _, layer in moe_layers(cast(nn.Module, self)):
            layer.schedule = layer.make_schedule(self.plateau.spawned)

    def upgrade_state_dict_named(self, state_dict: Dict[str, Any], name: str) -> None:
        """See fairseq's ``BaseFairseqModel``."""
        compat.drop_fast_path_copies(state_dict)
        super().upgrade_state_dict_named(state_dict, name)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See ``torch.nn.Module``.

        Raises:
            CheckpointMismatch: the checkpoint does not fit the options; the sentence names the flags.
        """
        try:
            return super().load_state_dict(*args, **kwargs)
        except StateMismatch as error:
            text = str(error).replace("`widths`", "ffn-embed-dim, `expert_sizes` and `total_ffn_dim`")
            raise CheckpointMismatch(as_flags(text)) from error

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.plateau is not None:
            destination.update({prefix + key: x for key, x in self.plateau.state().items()})

    def _load_plateau(self, state_dict: Dict[str, Any], prefix: str) -> None:
        """Take the plateau's state, which there is if the experts of its run spawned by themselves."""
        keys = [key for key in Plateau.KEYS if prefix + key in state_dict]
        state = {key: state_dict.pop(prefix + key) for key in keys}
        if state and self.plateau is not None:
            self.plateau.load(state)
            self.count_from_spawn()

    def _load_from_state_dict(
        self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse MoE layers in other places than the model's."""
        self._load_plateau(state_dict, prefix)
        module_distillation.fit(self, state_dict, prefix)
        end = ".moe.experts.b2"
        found = {key[: -len(end)] for key in state_dict if key.endswith(end)}
        expected = {prefix + layer for layer, _ in moe_layers(cast(nn.Module, self))}
        if found and found != expected:
            raise CheckpointMismatch(
                f"The checkpoint has MoE layers at {sorted(found)}, but the model has them at "
                f"{sorted(expected)}: give the --moe-freq that it was trained with."
            )
        low_rank.check_state(cast(nn.Module, self), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def moe_layers(model: nn.Module) -> Iterator[Tuple[str, MoEFeedForward]]:
    """Name and layer of each fairseq layer with an MoE layer, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, MoEFeedForward):
            yield name, module


def has_experts(model: nn.Module) -> bool:
    """Whether a model is this package's business: it is one of ours, or has our layers."""
    return isinstance(model, MoEModel) or next(moe_layers(model), None) is not None


MODULES = {"router": ("router",), "experts": ("experts", "shared", "hyper_adapter", "heads")}
"""The modules of an MoE layer that ``--moe-freeze`` names together; ``backbone`` is what is in none."""


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Let the parts that ``--moe-freeze`` names be as they are, before and after the spawn."""
    for part in parts:
        for _, layer in moe_layers(model):
            layer.moe.freeze(*MODULES.get(part, ()))
        for parameter in parameters_of(model, part):
            parameter.requires_grad_(False)


def parameters_of(model: nn.Module, part: str) -> List[nn.Parameter]:
    """The parameters that there are now of a part that ``--moe-freeze`` names."""
    layers = [layer.moe for _, layer in moe_layers(model)]
    beside = [experts for _, experts in low_rank.low_rank_experts(model)]
    if part == "backbone":
        inside = {parameter for module in (*layers, *beside) for parameter in module.parameters()}
        return [parameter for parameter in model.parameters() if parameter not in inside]
    modules: List[Any] = [getattr(moe, name) for moe in layers for name in MODULES[part]]
    found = [parameter for module in modules if module is not None for parameter in module.parameters()]
    for experts in beside:
        of_experts = [experts.down_EDR, experts.up_ERO]
        found += of_experts if part == "experts" else experts.router.parameters()
    return list(dict.fromkeys(found))
