"""What the log says of a run's experts: a line at its start, at each phase, and at its end.

The lines of a spawn are in ``growth.py``.
"""

import logging
import math
from typing import Any, Dict, Optional, cast

from fairseq.trainer import Trainer
from torch import nn

from ..config.config import MoEConfig
from ..evolution.schedule import Phase
from ..models.feed_forward import MoEModel, moe_layers
from ..models.layers import count_parameters
from .state import RunState

logger = logging.getLogger(__name__)


def start(trainer: Trainer) -> None:
    """What the experts are and will be, once a checkpoint has been loaded, or none."""
    model, update = trainer.get_model(), trainer.get_num_updates()
    if not isinstance(model, MoEModel):
        return
    config, module = model.moe_config, cast(nn.Module, model)
    preset = f", preset {config.preset}" if config.preset else ""
    count, in_the_end = count_parameters(module), parameters_in_the_end(module)
    parameters = f"{count:,} parameters" + (f", {in_the_end:,} with all experts" if in_the_end else "")
    phase = RunState.of(trainer).phase = _phase(module, update)
    words = "" if phase is None else f"; {config.in_words(phase)}{_until(module, config, phase)}"
    logger.info(f"router {config.router}{preset}; {model.experts_in_words}; {parameters}{words}")


def watch(trainer: Trainer) -> None:
    """Before an update: say it if another phase begins than that of a spawn, which has a line of its own."""
    run, model, update = RunState.of(trainer), trainer.get_model(), trainer.get_num_updates()
    if not isinstance(model, MoEModel):
        return
    before, run.phase = run.phase, _phase(cast(nn.Module, model), update)
    if run.phase == Phase.HARD and before != Phase.HARD and model.moe_config.router_class.stages:
        logger.info(f"{model.moe_config.in_words(Phase.HARD)} from update {update} on")


def end(trainer: Trainer) -> None:
    """After the last update."""
    model, update = trainer.get_model(), trainer.get_num_updates()
    phase = _phase(cast(nn.Module, model), update) if isinstance(model, MoEModel) else None
    if phase is None:
        return
    experts = ", ".join(sorted({str(layer.moe.num_experts) for _, layer in moe_layers(model)}))
    having = "" if phase == Phase.DIVERSIFY else f" of {experts}"
    logger.info(
        f"the run ends at update {update}: {model.moe_config.in_words(phase)}{having}, "
        f"{count_parameters(model):,} parameters"
    )


def _phase(model: nn.Module, update: int) -> Optional[Phase]:
    """Of the next update; ``None``: the model's experts are no MoE layers."""
    for _, layer in moe_layers(model):
        return layer.schedule.phase(update, layer.moe.stage)
    return None


def _until(model: nn.Module, config: MoEConfig, phase: Phase) -> str:
    layer = next(layer for _, layer in moe_layers(model))
    spawn = layer.schedule.next_spawn(layer.moe.stage)
    if layer.moe.stage == len(layer.moe.stages) or math.isinf(spawn):
        return ""
    by_itself = " at the latest" if config.spawns_by_itself else ""
    return f" until update {spawn:g}{by_itself}"


def parameters_in_the_end(model: nn.Module) -> Optional[int]:
    """Number of parameters once the one expert has become all; ``None``: there are more, or it is unknown."""
    count = count_parameters(model)
    of_stacks: Dict[int, Dict[str, Any]] = {}
    modules = nn.ModuleList()
    for _, layer in moe_layers(model):
        moe = layer.moe
        if moe.stage > 0 or moe.has_hyper_adapter or len(moe.stages) > 1 or moe.resizes:
            return None
        each = moe.experts.parameters_of_each
        base = sum(each())
        count += sum(each(moe.widths_when_spawned())) - base + (base if moe.has_shared_expert else 0)
        modules.append(moe.build_router(of_stacks.setdefault(id(moe.of_stack), {}), moe.stages[0]))
        if moe.warmup is not None:
            count -= sum(parameter.numel() for parameter in moe.warmup.parameters())
    if not len(modules):
        return None
    return count + sum(parameter.numel() for parameter in modules.parameters())
