"""Grow experts inside a running fairseq ``Trainer``.

fairseq has no hook that is given the Trainer, so ``install`` wraps four of its methods (``trainer.py``):
``__init__``, to check the configuration as a whole before time is wasted; ``train_step``, before which
the experts spawn, or come and go, and after which statistics of all processes are added up;
``load_checkpoint``, after which the distributed wrapper is rebuilt if the model has grown; and
``_build_ema``, whose EMA would average whatever a checkpoint holds, tables of integers too.  Two more are
wrapped so that errors tell what to do: ``fsdp_enable_wrap``, which would ask for fairscale before our check
is made, and ``NanDetector.add_hooks``, which cannot look at a ``Routing``.
"""

import functools
import logging
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.nan_detector import NanDetector
from fairseq.trainer import Trainer
from torch import Tensor

from ..models.feed_forward import CheckpointMismatch, MoEFeedForward, MoEModel, moe_layers
from ..moe import MoELayer, Router
from ..moe.collect import Collector
from ..moe.routers.dynmoe import Resize
from . import optimizer_state
from .checks import check_before_trainer, check_run
from .plan import Plan, resize_plan

logger = logging.getLogger(__name__)

Change = Tuple[Plan, Callable[[MoELayer], None]]
"""What becomes of a layer's experts, and what carries it out on the layer or on a copy of it."""


def install() -> None:
    """Teach fairseq's ``Trainer`` to grow experts.  A second call does nothing."""
    if getattr(Trainer, "_evomoe", False):
        return
    Trainer._evomoe = True
    Trainer.__init__ = _checked_init(Trainer.__init__)
    Trainer.train_step = _growing_train_step(Trainer.train_step)
    Trainer.load_checkpoint = _growing_load_checkpoint(Trainer.load_checkpoint)
    Trainer._build_ema = _build_ema_of_integers(Trainer._build_ema)
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


def _build_ema_of_integers(original):
    @functools.wraps(original)
    def _build_ema(self):
        original(self)
        if self._ema is not None:
            _copy_integers(self._ema)

    return _build_ema


def _growing_train_step(original):
    @functools.wraps(original)
    def train_step(self, *args, **kwargs):
        if spawn_is_due(self):
            spawn(self)
        resize(self)
        before = self.get_num_updates()
        try:
            result = original(self, *args, **kwargs)
        except FloatingPointError as error:
            names = broken_gates(self.get_model())
            if not names:
                raise
            message = "{}: NaN or Inf in the gate of {}".format(error, ", ".join(names))
            raise FloatingPointError(message) from error
        collect(self, updated=self.get_num_updates() > before)
        return result

    return train_step


def _growing_load_checkpoint(original):
    @functools.wraps(original)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        layers = [layer for _, layer in moe_layers(self.get_model())]
        before = [_form(layer.moe) for layer in layers]
        try:
            result = original(self, filename, reset_optimizer, *args, **kwargs)
        except Exception as error:
            # trainer.py:560 replaces every error by "please ensure that the architectures match"
            mismatch = _mismatch_behind(error, layers, reset_optimizer)
            if mismatch is None:
                raise
            raise mismatch from error
        if [_form(layer.moe) for layer in layers] != before:
            # trainer.py:514 builds the distributed wrapper, around other experts, before it loads
            self._wrapped_model = None
        if layers:
            _warn_if_grown_early(self, layers)
        return result

    return load_checkpoint


def _form(moe: MoELayer) -> Tuple[bool, List[int]]:
    return moe.router is not None, list(moe.experts.widths)


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
    """Spawn the experts of every MoE layer, between two updates; see ``change_experts``."""
    start = time.perf_counter()
    model = trainer.get_model()
    parameters = sum(p.numel() for p in model.parameters())
    changes: Dict[str, Change] = {}
    for name, layer in moe_layers(model):
        plan = layer.moe.plan_growth()
        changes[name] = plan, functools.partial(MoELayer.grow, plan=plan)
        moe = layer.moe
    change_experts(trainer, changes)
    logger.info(
        "spawned experts before update {}: 1 -> {} experts, {:,} -> {:,} parameters, method {} "
        "(strength {}), {:.2f} s".format(
            trainer.get_num_updates(),
            moe.num_experts,
            parameters,
            sum(p.numel() for p in model.parameters()),
            moe.spawn.method_name,
            moe.spawn.used_strength,
            time.perf_counter() - start,
        )
    )


def resize(trainer: Trainer) -> None:
    """Let experts come and go in the layers whose routers are due to decide on it, between two updates."""
    model = trainer.get_model()
    parameters = sum(p.numel() for p in model.parameters())
    changes: Dict[str, Change] = {}
    news = []
    for name, layer in moe_layers(model):
        moe = layer.moe
        if moe.router is None or not moe.router.resizes or not moe.router.due:
            continue
        change = moe.router.decide()
        if change is None:
            moe.router.restart()
            continue
        plan = resize_plan(moe.experts.widths, change.kept, change.copied)
        changes[name] = plan, functools.partial(_resize_layer, plan, change)
        removed = sorted(set(range(moe.num_experts)) - set(change.kept))
        news.append(
            "{}: {} -> {} experts (removed {}, added {})".format(
                name,
                moe.num_experts,
                len(plan.widths),
                removed or "none",
                "none" if change.copied is None else "a copy of {}".format(change.copied),
            )
        )
    if changes:
        change_experts(trainer, changes)
        logger.info(
            "changed experts before update {}: {}; {:,} -> {:,} parameters".format(
                trainer.get_num_updates(),
                "; ".join(news),
                parameters,
                sum(p.numel() for p in model.parameters()),
            )
        )


def _resize_layer(plan: Plan, change: Resize, moe: MoELayer) -> None:
    moe.become(plan)
    moe.router.resize(change)


def collect(trainer: Trainer, updated: bool) -> None:
    """Add up over all processes what the layers have collected in an update, and keep it.

    Args:
        trainer: fairseq's.
        updated: whether there was an update; with an overflow there is none, and the sums are dropped.
    """
    update = trainer.get_num_updates()
    collectors = [module for module in trainer.get_model().modules() if isinstance(module, Collector)]
    sums = [collector.take() for collector in collectors]
    # with --amp, trainer.py calls train_step again from within, to try a batch once more
    if not collectors or not updated or getattr(trainer, "_evomoe_collected", None) == update:
        return
    trainer._evomoe_collected = update
    total = torch.cat(sums)
    if trainer.data_parallel_world_size > 1:
        distributed_utils.all_reduce(total, group=trainer.data_parallel_process_group)
    for collector, part in zip(collectors, total.split([len(each) for each in sums])):
        collector.fold(part)


@torch.no_grad()
def change_experts(trainer: Trainer, changes: Dict[str, Change]) -> None:
    """Make the experts of MoE layers others, between two updates.

    Optimizer, learning-rate schedule and distributed wrapper are rebuilt through fairseq's own
    ``Trainer.reinitialize``; the optimizer's statistics, its float32 copies of the parameters, the
    position in the schedule, the loss scale, the update counter and the EMA carry over.  No random
    number of the run is used up.

    Args:
        trainer: fairseq's.
        changes: the change of each layer, by its name in the model.
    """
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    states = optimizer_state.read(optimizer)
    layers = dict(moe_layers(trainer.get_model()))
    for name, (plan, carry_out) in changes.items():
        moe = layers[name].moe
        old = dict(moe.named_parameters())
        carry_out(moe)
        _change_states(states, plan, old, dict(moe.named_parameters()))
    if trainer._ema is not None:
        _change_ema(trainer._ema, changes)
        _copy_integers(trainer._ema)

    trainer.reinitialize()
    optimizer_state.write(trainer.optimizer, states)
    optimizer_state.take_over_settings(optimizer, trainer.optimizer)
    optimizer_state.repoint(scheduler, optimizer, trainer.optimizer)
    trainer._lr_scheduler = scheduler


def _change_states(
    states: Dict[Tensor, optimizer_state.ParameterState],
    plan: Plan,
    old: Dict[str, Tensor],
    new: Dict[str, Tensor],
) -> None:
    """Replace the states of a layer's old parameters by those of its new ones."""
    gone = {key: states.pop(p, None) for key, p in old.items() if new.get(key) is not p}
    for key, parameter in new.items():
        module, _, name = key.partition(".")
        # the shared expert begins as the base expert
        state = gone.get("experts." + name if module == "shared" else key)
        if state is None or parameter is old.get(key):  # new, frozen, or not changed
            continue
        if module == "experts":
            state = state.become(
                functools.partial(plan.weights, name), functools.partial(plan.statistics, name)
            )
        elif module == "router":
            state = state.become(functools.partial(plan.per_expert, new=parameter.float()), plan.per_expert)
        states[parameter] = state


def _change_ema(ema: Any, changes: Dict[str, Change]) -> None:
    """Change fairseq's EMA (``models/ema/ema.py``): its copy of the model and its float32 parameters."""
    layers = dict(moe_layers(ema.get_model()))
    for layer_name, (plan, carry_out) in changes.items():
        moe, prefix = layers[layer_name].moe, layer_name + ".moe."
        carry_out(moe)
        if not ema.fp32_params:
            continue
        parameters, state = dict(moe.named_parameters()), moe.state_dict()
        for key in [key for key in ema.fp32_params if key.startswith(prefix)]:
            if key[len(prefix) :] not in state:
                del ema.fp32_params[key]
        for key, tensor in state.items():
            base = ema.fp32_params.get(prefix + key)
            module, _, name = key.partition(".")
            if not tensor.is_floating_point():
                tensor = tensor.clone()
            elif base is None or key not in parameters:
                tensor = tensor.float().clone()
            elif module == "experts" and "." not in name:
                tensor = plan.weights(name, base)
            elif module == "router":
                tensor = plan.per_expert(base, tensor.float())
            else:
                continue
            ema.fp32_params[prefix + key] = tensor


def _copy_integers(ema: Any) -> None:
    """Let fairseq's EMA copy the tensors that have no mean, such as a table of experts."""
    state = ema.get_model().state_dict()
    ema.skip_keys.update(key for key, tensor in state.items() if not tensor.is_floating_point())
