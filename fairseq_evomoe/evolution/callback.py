"""Grow experts inside a running fairseq ``Trainer``.

fairseq has no hook that is given the Trainer, so ``install`` wraps three of its methods (``trainer.py``):
``__init__``, to check the configuration as a whole before time is wasted; ``train_step``, before which
the experts spawn; and ``load_checkpoint``, after which the distributed wrapper is rebuilt if the model
has grown.  Two more are wrapped so that errors tell what to do: ``fsdp_enable_wrap``, which would ask for
fairscale before our check is made, and ``NanDetector.add_hooks``, which cannot look at a ``Routing``.
"""

import functools
import logging
import sys
import time
from typing import List, Optional

import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.nan_detector import NanDetector
from fairseq.trainer import Trainer

from ..models.feed_forward import CheckpointMismatch, MoEFeedForward, MoEModel, moe_layers
from ..moe import Router
from . import optimizer_state
from .checks import check_before_trainer, check_run

logger = logging.getLogger(__name__)


def install() -> None:
    """Teach fairseq's ``Trainer`` to grow experts.  A second call does nothing."""
    if getattr(Trainer, "_evomoe", False):
        return
    Trainer._evomoe = True
    Trainer.__init__ = _checked_init(Trainer.__init__)
    Trainer.train_step = _growing_train_step(Trainer.train_step)
    Trainer.load_checkpoint = _growing_load_checkpoint(Trainer.load_checkpoint)
    NanDetector.add_hooks = _add_hooks_to_tensors(NanDetector.add_hooks)
    for name in ("fairseq.distributed", "fairseq_cli.train", "__main__"):  # python fairseq_cli/train.py
        module = sys.modules.get(name)
        if hasattr(module, "fsdp_enable_wrap"):
            module.fsdp_enable_wrap = _checked_enable_wrap(module.fsdp_enable_wrap)


def _checked_enable_wrap(original):
    # fairseq_cli/train.py calls it before it builds a model, and it asks for fairscale
    @functools.wraps(original)
    def fsdp_enable_wrap(cfg):
        run = cfg._get_parent()
        if issubclass(ARCH_MODEL_REGISTRY.get(run.model._name, object), MoEModel):
            check_before_trainer(run)
        return original(cfg)

    return fsdp_enable_wrap


def _add_hooks_to_tensors(original):
    # fairseq/nan_detector.py looks for the module that made a NaN with torch's backward hooks, which take
    # the first item of a module's output; a Routing has none
    @functools.wraps(original)
    def add_hooks(self, module):
        if not isinstance(module, Router):
            original(self, module)

    return add_hooks


def _checked_init(original):
    @functools.wraps(original)
    def __init__(self, cfg, task, model, criterion, *args, **kwargs):
        layers = [layer for _, layer in moe_layers(model)]
        if layers:
            check_before_trainer(cfg)
        original(self, cfg, task, model, criterion, *args, **kwargs)
        if layers:
            check_run(self.cfg, layers, criterion)

    return __init__


def _growing_train_step(original):
    @functools.wraps(original)
    def train_step(self, *args, **kwargs):
        if spawn_is_due(self):
            spawn(self)
        try:
            return original(self, *args, **kwargs)
        except FloatingPointError as error:
            names = broken_gates(self.get_model())
            if not names:
                raise
            message = "{}: NaN or Inf in the gate of {}".format(error, ", ".join(names))
            raise FloatingPointError(message) from error

    return train_step


def _growing_load_checkpoint(original):
    @functools.wraps(original)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        layers = [layer for _, layer in moe_layers(self.get_model())]
        before = [layer.moe.grown for layer in layers]
        try:
            result = original(self, filename, reset_optimizer, *args, **kwargs)
        except Exception as error:
            # trainer.py:560 replaces every error by "please ensure that the architectures match"
            mismatch = _mismatch_behind(error, layers, reset_optimizer)
            if mismatch is None:
                raise
            raise mismatch from error
        if [layer.moe.grown for layer in layers] != before:
            # trainer.py:514 builds the distributed wrapper, around a single expert, before it loads
            self._wrapped_model = None
        if layers:
            _warn_if_grown_early(self, layers)
        return result

    return load_checkpoint


def _mismatch_behind(
    error: BaseException, layers: List[MoEFeedForward], reset_optimizer: bool
) -> Optional[CheckpointMismatch]:
    if any(layer.moe.spawned_on_load for layer in layers) and not reset_optimizer:
        return CheckpointMismatch(
            "The checkpoint has one expert and the state of an optimizer for it, but with "
            "--moe-spawn-update 0 the experts are there from the start: add --reset-optimizer to spawn "
            "them from the checkpoint, or give the --moe-spawn-update that it was trained with."
        )
    cause: Optional[BaseException] = error
    while cause is not None and not isinstance(cause, CheckpointMismatch):
        cause = cause.__cause__ or cause.__context__
    return cause


def _warn_if_grown_early(trainer: Trainer, layers: List[MoEFeedForward]) -> None:
    update, spawn_update = trainer.get_num_updates(), layers[0].schedule.spawn_update
    if layers[0].moe.router is not None and update < spawn_update:
        logger.warning(
            "the checkpoint's experts have spawned already, so nothing spawns at --moe-spawn-update {0}; "
            "the gate is dense until then and anneals from there (to start from the sparse gate, set "
            "--moe-spawn-update 0 --moe-hard-update 0)".format(spawn_update)
        )


def broken_gates(model: torch.nn.Module) -> List[str]:
    """Names of the layers whose gate gave NaN or Inf for the last batch."""
    names = []
    for name, layer in moe_layers(model):
        entropy = None if layer.moe.routing is None else layer.moe.routing.gate_entropy
        if entropy is not None and not torch.isfinite(entropy):
            names.append(name)
    return names


def spawn_is_due(trainer: Trainer) -> bool:
    """Whether the experts must spawn before the next update."""
    return any(
        not layer.moe.grown and trainer.get_num_updates() >= layer.schedule.spawn_update
        for _, layer in moe_layers(trainer.get_model())
    )


def spawn(trainer: Trainer) -> None:
    """Spawn the experts of every MoE layer, between two updates.

    Optimizer, learning-rate schedule and distributed wrapper are rebuilt through fairseq's own
    ``Trainer.reinitialize``; the optimizer's statistics, its float32 copies of the parameters, the
    position in the schedule, the loss scale, the update counter and the EMA carry over.  No random
    number of the run is used up.
    """
    start = time.perf_counter()
    model, optimizer = trainer.get_model(), trainer.optimizer
    scheduler = trainer.lr_scheduler
    parameters = sum(p.numel() for p in model.parameters())
    states = optimizer_state.read(optimizer)
    for _, layer in moe_layers(model):
        moe = layer.moe
        old = dict(moe.experts.named_parameters(recurse=False))
        moe.grow()
        for name, new in moe.experts.named_parameters(recurse=False):
            state = states.pop(old[name], None)
            if state is not None:  # None: frozen
                states[new] = state.spawn(
                    functools.partial(moe.spawn, name), functools.partial(moe.spawn.inherit, name)
                )
    if trainer._ema is not None:
        _grow_ema(trainer._ema)

    trainer.reinitialize()
    optimizer_state.write(trainer.optimizer, states)
    optimizer_state.take_over_settings(optimizer, trainer.optimizer)
    optimizer_state.repoint(scheduler, optimizer, trainer.optimizer)
    trainer._lr_scheduler = scheduler
    logger.info(
        "spawned experts before update {}: 1 -> {} experts, {:,} -> {:,} parameters, method {} "
        "(strength {}), {:.2f} s".format(
            trainer.get_num_updates(),
            moe.num_experts,
            parameters,
            sum(p.numel() for p in model.parameters()),
            moe.spawn.method.value,
            moe.spawn.used_strength,
            time.perf_counter() - start,
        )
    )


def _grow_ema(ema) -> None:
    """Grow fairseq's EMA (``models/ema/ema.py``): its copy of the model and its float32 parameters."""
    for name, layer in moe_layers(ema.get_model()):
        layer.moe.grow()
        if not ema.fp32_params:
            continue
        for key, tensor in layer.moe.state_dict(prefix=name + ".moe.").items():
            base = ema.fp32_params.get(key)
            if base is None:
                ema.fp32_params[key] = tensor.float().clone()
            elif base.shape != tensor.shape:
                ema.fp32_params[key] = layer.moe.spawn(key.rsplit(".", 1)[1], base)
