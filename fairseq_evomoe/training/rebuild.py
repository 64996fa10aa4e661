"""Other experts inside a running fairseq ``Trainer``: what is built anew, and what carries over."""

import functools
from typing import Any, Dict

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from ..checkpoints import optimizer_state
from ..checkpoints.optimizer_state import ParameterState
from ..models.feed_forward import moe_layers
from ..moe import MoELayer
from ..moe.multiplying import child_tensor
from ..moe.plan import Inherit, Plan
from . import ema, ranks
from .change import Change
from .state import RunState

States = Dict[Tensor, ParameterState]


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
        old: Dict[str, Tensor] = dict(moe.named_parameters())
        if moe.sharded and plan.inherit == Inherit.unchanged:  # which compares weights of all experts
            whole = {f"experts.{key}": tensor for key, tensor in moe.gather_experts().items()}
        else:
            whole = old
        _gather_states(states, moe)
        carry_out(moe)
        _change_states(states, plan, old, whole, moe)
    if trainer._ema is not None:
        ema.change(trainer._ema, changes)
        ema.copy_integers(trainer._ema)

    ranks.keep_from_ddp(trainer.get_model())
    trainer.reinitialize()
    optimizer_state.write(trainer.optimizer, states)
    optimizer_state.take_over_settings(optimizer, trainer.optimizer)
    optimizer_state.repoint(scheduler, optimizer, trainer.optimizer)
    trainer._lr_scheduler = scheduler
    plans = {name: change.plan for name, change in changes.items()}
    RunState.of(trainer).trace.note_change(trainer.get_num_updates(), plans)


def _gather_states(states: States, moe: MoELayer) -> None:
    """Let the states of experts that are sharded among ranks be those of all experts."""
    if moe.sharded:
        for name, parameter in moe.experts.named_parameters(recurse=False):
            if parameter in states:
                gather: Any = functools.partial(moe.gather_rows, name)  # to all ranks, so to this one
                states[parameter] = states[parameter].apply(gather, gather)


def _change_states(
    states: States, plan: Plan, old: Dict[str, Tensor], whole: Dict[str, Tensor], moe: MoELayer
) -> None:
    """Replace the states of a layer's old parameters by those of its new ones.

    Args:
        states: of the parameters of the model, of all experts.
        plan: what became of the layer's experts.
        old: the layer's parameters before, by name.
        whole: the weights of all its experts before, under the same names.
        moe: the layer.
    """
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
            statistics = functools.partial(own.statistics, name, weights=whole[key].detach())
            state = state.apply(functools.partial(own.weights, name), None if anew else statistics)
        elif plan.offspring is not None:
            child = functools.partial(child_tensor, moe, plan, key, shape=parameter.shape)
            state = state.apply(functools.partial(child, gate=True), None if anew else child)
        elif module == "router":
            state = state.apply(functools.partial(plan.per_expert, new=parameter.float()), plan.per_expert)
        states[parameter] = state
