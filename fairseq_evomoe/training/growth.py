"""How experts change between two updates of a fairseq ``Trainer``: they spawn, or come and go."""

import functools
import logging
import math
import time
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from fairseq import metrics
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from torch import Tensor

from ..checkpoints import optimizer_state
from ..evolution.plateau import Plateau
from ..models.feed_forward import moe_layers
from ..moe import MoELayer
from ..moe.plan import Inherit, Plan, resize_plan
from ..moe.routers.dynmoe import Resize
from ..moe.statistics import Collector
from . import ranks as parallel

logger = logging.getLogger(__name__)

Change = Tuple[Plan, Callable[[MoELayer], None]]
"""What becomes of a layer's experts, and what carries it out on the layer or on a copy of it."""


def spawn_is_due(trainer: Trainer) -> bool:
    """Whether the experts must spawn before the next update."""
    return any(
        not layer.moe.spawned and trainer.get_num_updates() >= layer.schedule.spawn_update
        for _, layer in moe_layers(trainer.get_model())
    )


def watch_loss(trainer: Trainer, logged: Optional[Dict[str, Any]]) -> None:
    """After an update, let experts that spawn by themselves do so before the next one if its loss says so.

    Args:
        trainer: fairseq's.
        logged: what its ``train_step`` returned.
    """
    model, update = trainer.get_model(), trainer.get_num_updates()
    plateau = _plateau(model)
    # with --amp, trainer.py calls train_step again from within, to try a batch once more
    if plateau is None or plateau.spawn_update is not None or plateau.update == update:
        return
    # trainer.py has just added it up over all ranks and read it; what it returns is rounded
    meter = metrics.get_meter("train", "loss")
    loss = math.nan if meter is None else float(meter.val)
    weight = float((logged or {}).get("sample_size", 0))
    if plateau.see(update, loss, weight, trainer.get_lr() or 0.0):
        model.count_from_spawn()


def _plateau(model: torch.nn.Module) -> Optional[Plateau]:
    return getattr(model, "plateau", None)  # a model of somebody else's may have our layers


def resume(trainer: Trainer) -> None:
    """Once a checkpoint is loaded, let experts that spawn by themselves count from this run's updates."""
    model, update = trainer.get_model(), trainer.get_num_updates()
    plateau = _plateau(model)
    if plateau is None:
        return
    spawned = any(layer.moe.router is not None for _, layer in moe_layers(model))
    if plateau.resume(update, spawned):
        model.count_from_spawn()
        if spawned:
            logger.warning(
                "the checkpoint's experts have spawned already, but not in this count of updates: the gate "
                "anneals from update 0, as with --moe-spawn-update 0 (to start from the sparse gate, set "
                "--moe-hard-update 0)"
            )


def spawn(trainer: Trainer) -> None:
    """Spawn the experts of every MoE layer, between two updates; see ``change_experts``."""
    start = time.perf_counter()
    model = trainer.get_model()
    plateau = _plateau(model)
    if plateau is not None:
        logger.info(f"spawning before update {trainer.get_num_updates()}: {plateau.reason()}")
        plateau.spawn_update = trainer.get_num_updates()
        model.count_from_spawn()
    parameters = count_parameters(model)
    changes: Dict[str, Change] = {}
    for name, layer in moe_layers(model):
        plan = layer.moe.plan_spawn()
        changes[name] = plan, functools.partial(MoELayer.spawn, plan=plan)
        moe = layer.moe
    change_experts(trainer, changes)
    logger.info(
        f"spawned experts before update {trainer.get_num_updates()}: 1 -> {moe.num_experts} experts, "
        f"{parameters:,} -> {count_parameters(model):,} parameters, method {moe.spawner.method_name} "
        f"(strength {moe.spawner.used_strength}), {time.perf_counter() - start:.2f} s"
    )


def resize(trainer: Trainer) -> None:
    """Let experts come and go in the layers whose routers are due to decide on it, between two updates."""
    model = trainer.get_model()
    parameters = count_parameters(model)
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
                "none" if change.copied is None else f"a copy of {change.copied}",
            )
        )
    if changes:
        change_experts(trainer, changes)
        logger.info(
            "changed experts before update {}: {}; {:,} -> {:,} parameters".format(
                trainer.get_num_updates(),
                "; ".join(news),
                parameters,
                count_parameters(model),
            )
        )


def _resize_layer(plan: Plan, change: Resize, moe: MoELayer) -> None:
    moe.apply_plan(plan)
    moe.router.resize(change)


def collect(trainer: Trainer, updated: bool) -> None:
    """Add up over all processes what the layers have collected in an update, and keep it.

    Args:
        trainer: fairseq's.
        updated: whether there was an update; with an overflow there is none, and the sums are dropped.
    """
    update = trainer.get_num_updates()
    collectors = [module for module in trainer.get_model().modules() if isinstance(module, Collector)]
    sums = [collector.drain() for collector in collectors]
    # with --amp, trainer.py calls train_step again from within, to try a batch once more
    if not collectors or not updated or getattr(trainer, "_evomoe_collected", None) == update:
        return
    trainer._evomoe_collected = update
    total = torch.cat(sums)
    if trainer.data_parallel_world_size > 1:
        distributed_utils.all_reduce(total, group=trainer.data_parallel_process_group)
    for collector, part in zip(collectors, total.split([len(each) for each in sums])):
        collector.commit(part)


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
        _gather_states(states, moe)
        carry_out(moe)
        _change_states(states, plan, old, moe)
    if trainer._ema is not None:
        _change_ema(trainer._ema, changes)
        copy_integers(trainer._ema)

    parallel.keep_from_ddp(trainer.get_model())
    trainer.reinitialize()
    optimizer_state.write(trainer.optimizer, states)
    optimizer_state.take_over_settings(optimizer, trainer.optimizer)
    optimizer_state.repoint(scheduler, optimizer, trainer.optimizer)
    trainer._lr_scheduler = scheduler


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters of a model, those of experts on other ranks included."""
    count = sum(p.numel() for p in model.parameters())
    for _, layer in moe_layers(model):
        sizes = layer.moe.experts.parameters_of_each()
        count += sum(sizes) - sum(sizes[e] for e in layer.moe.experts.local)
    return count


def _gather_states(states: Dict[Tensor, optimizer_state.ParameterState], moe: MoELayer) -> None:
    """Let the states of experts that are shared out among ranks be those of all experts."""
    if moe.sharded:
        for name, parameter in moe.experts.named_parameters(recurse=False):
            if parameter in states:
                whole = functools.partial(moe.gather_rows, name)
                states[parameter] = states[parameter].apply(whole, whole)


def _change_states(
    states: Dict[Tensor, optimizer_state.ParameterState], plan: Plan, old: Dict[str, Tensor], moe: MoELayer
) -> None:
    """Replace the states of a layer's old parameters by those of its new ones."""
    new = dict(moe.named_parameters())
    own = plan.only(moe.experts.local)
    anew = plan.inherit == Inherit.none
    gone = {key: states.pop(p, None) for key, p in old.items() if new.get(key) is not p}
    for key, parameter in new.items():
        module, _, name = key.partition(".")
        # the shared expert begins as the base expert
        state = gone.get("experts." + name if module == "shared" else key)
        if state is None or parameter is old.get(key):  # new, frozen, or not changed
            continue
        if module == "experts":
            statistics = functools.partial(own.statistics, name, weights=old[key].detach())
            state = state.apply(functools.partial(own.weights, name), None if anew else statistics)
        elif module == "router":
            state = state.apply(functools.partial(plan.per_expert, new=parameter.float()), plan.per_expert)
        states[parameter] = state


def _change_ema(ema: Any, changes: Dict[str, Change]) -> None:
    """Change fairseq's EMA (``models/ema/ema.py``): its copy of the model and its float32 parameters."""
    layers = dict(moe_layers(ema.get_model()))
    for layer_name, (plan, carry_out) in changes.items():
        moe, prefix = layers[layer_name].moe, layer_name + ".moe."
        for name, _ in moe.experts.named_parameters(recurse=False):
            key = prefix + "experts." + name
            if key in ema.fp32_params:
                ema.fp32_params[key] = moe.gather_rows(name, ema.fp32_params[key])
        carry_out(moe)
        if not ema.fp32_params:
            continue
        own = plan.only(moe.experts.local)
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
                tensor = own.weights(name, base)
            elif module == "router":
                tensor = plan.per_expert(base, tensor.float())
            else:
                continue
            ema.fp32_params[prefix + key] = tensor


def copy_integers(ema: Any) -> None:
    """Let fairseq's EMA copy the tensors that have no mean, such as a table of experts."""
    state = ema.get_model().state_dict()
    ema.skip_keys.update(key for key, tensor in state.items() if not tensor.is_floating_point())
    ema.skip_keys.update(Plateau.KEYS)
