"""How experts change between two updates of a fairseq ``Trainer``: they spawn, or come and go."""

import functools
import logging
import math
import time
from dataclasses import replace
from typing import Any, Dict, List, Optional

from fairseq import metrics
from fairseq.trainer import Trainer
from torch import nn

from ..checkpoints.saved_options import SPAWNED_BEFORE
from ..config.config import MoEConfig
from ..config.errors import PREFIX
from ..evolution.plateau import Plateau
from ..models.feed_forward import MoEFeedForward, moe_layers
from ..models.layers import count_parameters
from ..moe import MoELayer
from ..moe.plan import Plan, resize_plan
from ..moe.routers.dynmoe import Resize
from . import freezing
from .change import Change
from .rebuild import change_experts
from .rescaling import output_scales
from .state import RunState

logger = logging.getLogger(__name__)

STAGES = ("anneal_updates", "hard_update", "stable_update")
"""Options that say when the stages after the spawn begin."""


def spawn_is_due(trainer: Trainer) -> bool:
    """Whether the experts must spawn before the next update, for the first time or again."""
    return any(_is_due(layer, trainer.get_num_updates()) for _, layer in moe_layers(trainer.get_model()))


def _is_due(layer: MoEFeedForward, update: int) -> bool:
    moe = layer.moe
    return moe.stage < len(moe.stages) and update >= layer.schedule.next_spawn(moe.stage)


def watch_loss(trainer: Trainer, logged: Optional[Dict[str, Any]]) -> None:
    """After an update, let experts that spawn by themselves do so before the next one if its loss says so.

    Args:
        trainer: fairseq's.
        logged: what its ``train_step`` returned.
    """
    model, update = trainer.get_model(), trainer.get_num_updates()
    plateau = _plateau(model)
    # with --amp, trainer.py calls train_step again from within, to try a batch once more
    if plateau is None or plateau.ended or plateau.update == update:
        return
    # trainer.py has just added it up over all ranks and read it; what it returns is rounded
    meter = metrics.get_meter("train", "loss")
    loss = math.nan if meter is None else float(meter.val)
    weight = float((logged or {}).get("sample_size", 0))
    if plateau.see(update, loss, weight, trainer.get_lr() or 0.0):
        model.count_from_spawn()


def _plateau(model: nn.Module) -> Optional[Plateau]:
    return getattr(model, "plateau", None)  # a model of somebody else's may have our layers


def _stage(model: nn.Module) -> int:
    """How many times the experts have spawned; the same in all layers."""
    return next(layer.moe.stage for _, layer in moe_layers(model))


def resume(trainer: Trainer, saved: Optional[Dict[str, Any]]) -> None:
    """Once a checkpoint is loaded, let experts that have spawned count from this run's updates.

    Experts that spawn by themselves begin anew to wait for it.  Those that have spawned in another run, or
    before the counter of updates was reset, go on in the last stage, unless the flags of the schedule say
    otherwise.

    Args:
        trainer: fairseq's.
        saved: what the checkpoint has beside model and optimizer; ``None``: there was no checkpoint.
    """
    model, update = trainer.get_model(), trainer.get_num_updates()
    layers = [layer for _, layer in moe_layers(model)]
    spawned = any(layer.moe.router is not None for layer in layers)
    plateau = _plateau(model)
    if plateau is not None and plateau.resume(update, _stage(model)):
        model.count_from_spawn()
    config: Optional[MoEConfig] = getattr(model, "moe_config", None)
    on_load = any(layer.moe.spawned_on_load for layer in layers)
    if saved is None or on_load:
        _tell_of_first_experts(model, on_load)
    if saved is None or config is None or not spawned or on_load:
        return
    run, stage = RunState.of(trainer), _stage(model)
    if update < max(layers[0].schedule.last_spawn(stage), 1):  # not in this run
        run.spawned_before = stage
    else:
        before = saved.get(SPAWNED_BEFORE, 0)
        run.spawned_before = stage if before is True else int(before)
    if run.spawned_before and config.router_class.stages:
        schedule = _count_from_before(config, layers, update, run.spawned_before)
        if schedule is not None and run.spawned_before == len(config.stages):
            _tell_evaluation(trainer, config, schedule)


def _tell_of_first_experts(model: nn.Module, on_load: bool) -> None:
    """Say what the experts are that are there from the start, perhaps out of the one of a checkpoint."""
    if on_load:
        moe = [layer.moe for _, layer in moe_layers(model)][-1]
        logger.info(
            f"spawned experts of the checkpoint's one expert: 1 -> {moe.num_experts} experts, "
            f"{count_parameters(model):,} parameters, {_method(moe)}{freezing.in_words(model)}"
        )
    freezing.warn_of_drawn_routers(model)


def _method(moe: MoELayer) -> str:
    return f"method {moe.spawner.method_name} (strength {moe.spawner.used_strength})"


def _count_from_before(
    config: MoEConfig, layers: List[MoEFeedForward], update: int, before: int
) -> Optional[Dict[str, Any]]:
    """Let the stages of experts that have spawned before update 0 be those that the flags say.

    Args:
        config: the options.
        layers: the model's, with experts.
        update: number of updates that the run has made.
        before: how many times the experts had spawned before it.

    Returns:
        options that say the same of a run in which nothing was loaded; ``None``: the options do.
    """
    stage = layers[0].moe.stage
    if "spawn_update" in config.given and not config.spawns_by_itself:
        spawn_update = layers[0].schedule.last_spawn(stage)
        if update < spawn_update:
            logger.warning(
                "the checkpoint's experts have spawned already, so nothing spawns at --moe-spawn-update "
                f"{spawn_update:g}; the gate is dense until then and anneals from there (leave it out to go "
                "on in the last stage)"
            )
        return None
    if config.spawns_by_itself and stage > before:
        return None  # they have spawned in this run, too, and stages count from there
    last = not config.given.intersection(STAGES)
    for layer in layers:
        schedule = layer.make_schedule([0] * before)
        layer.schedule = schedule.long_after(before) if last else schedule
    if last:
        logger.info(
            "the checkpoint's experts have spawned already, so that they go on in the last stage (to begin "
            "with the first one, give --moe-spawn-update 0)"
        )
        return dict.fromkeys(("spawn_update", *STAGES), 0)
    logger.warning(
        "the checkpoint's experts have spawned already: their stages count from update 0, as flags say"
    )
    return {"spawn_update": 0}


def _tell_evaluation(trainer: Trainer, config: MoEConfig, schedule: Dict[str, Any]) -> None:
    """Let checkpoints have options that say in which stage the gate is, for those who know nothing else."""
    known = config.flat()
    for name, value in schedule.items():
        if name in known:
            setattr(trainer.cfg.model, PREFIX + name, value)


def spawn(trainer: Trainer) -> None:
    """Spawn the experts of every MoE layer, between two updates; see ``change_experts``."""
    start = time.perf_counter()
    model, update = trainer.get_model(), trainer.get_num_updates()
    plateau, stage = _plateau(model), _stage(model)
    if plateau is not None:
        logger.info(f"spawning before update {update}: {plateau.reason(stage)}")
        plateau.begin_stage(stage, update)
        model.count_from_spawn()
    parameters = count_parameters(model)
    before = next(len(layer.moe.experts.widths) for _, layer in moe_layers(model))
    plans = {name: layer.moe.plan_spawn() for name, layer in moe_layers(model)}
    if getattr(model, "moe_config", None) is not None and model.moe_config.spawning.spawn_rescale:
        scales = output_scales(trainer, plans)
        plans = {name: replace(plan, output_scale=scales[name]) for name, plan in plans.items()}
    changes = {name: Change(p, functools.partial(MoELayer.spawn, plan=p)) for name, p in plans.items()}
    change_experts(trainer, changes)
    moe = [layer.moe for _, layer in moe_layers(model)][-1]
    logger.info(
        f"spawned experts before update {update}: {before} -> {moe.num_experts} experts, "
        f"{parameters:,} -> {count_parameters(model):,} parameters, {_method(moe)}, "
        f"{time.perf_counter() - start:.2f} s{freezing.in_words(model)}"
    )
    if stage == 0:
        freezing.warn_of_drawn_routers(model)


def resize(trainer: Trainer) -> None:
    """Let experts come and go in the layers whose routers are due to decide on it, between two updates."""
    model = trainer.get_model()
    parameters = count_parameters(model)
    changes: Dict[str, Change] = {}
    news: List[str] = []
    for name, layer in moe_layers(model):
        moe = layer.moe
        router: Any = moe.router  # those that resize have more methods than others
        if router is None or not router.resizes or not router.due:
            continue
        change = router.decide()
        if change is None:
            router.restart()
            continue
        plan = resize_plan(moe.experts.widths, change.kept, change.copied)
        changes[name] = Change(plan, functools.partial(_resize_layer, plan, change))
        news.append(f"{name}: {_news(moe.num_experts, plan, change)}")
    if changes:
        change_experts(trainer, changes)
        logger.info(
            f"changed experts before update {trainer.get_num_updates()}: {'; '.join(news)}; "
            f"{parameters:,} -> {count_parameters(model):,} parameters"
        )


def _news(experts: int, plan: Plan, change: Resize) -> str:
    removed = sorted(set(range(experts)) - set(change.kept))
    added = "none" if change.copied is None else f"a copy of {change.copied}"
    return f"{experts} -> {len(plan.widths)} experts (removed {removed or 'none'}, added {added})"


def _resize_layer(plan: Plan, change: Resize, moe: MoELayer) -> None:
    moe.apply_plan(plan)
    router: Any = moe.router
    router.resize(change)
