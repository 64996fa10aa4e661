"""Statistics of the tokens of each update, summed up over the ranks of a fairseq ``Trainer``."""

from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from ..checkpoints import optimizer_state
from ..models.feed_forward import moe_layers
from ..moe.sharding import rows_per_expert
from ..moe.statistics import Collector
from .state import RunState


def watch_gradients(trainer: Trainer) -> None:
    """Let layers whose experts multiply by their gradients know those of an update, which are all there now.

    The measure is the length of the gradient of all weights of an expert; what all of them have in common,
    such as the scale of the loss, or how many ranks have the same gradients, does not matter.
    """
    layers = [layer.moe for _, layer in moe_layers(trainer.get_model())]
    layers = [moe for moe in layers if moe.demand is not None and moe.spawner.measure == "gradient"]
    if not layers:
        return
    gradient = dict(optimizer_state.gradients(trainer.optimizer))
    for moe in layers:
        square_E = torch.zeros(moe.num_experts, device=moe.experts.w1.device)
        local = torch.tensor(moe.experts.local, dtype=torch.long, device=square_E.device)
        for name, parameter in moe.experts.named_parameters(recurse=False):
            found = gradient.get(parameter)
            if found is not None:
                rows = found.view(parameter.shape).split(rows_per_expert(name, moe.experts.local_widths))
                square_E[local] += torch.stack([part.float().square().sum() for part in rows])
        demand: Any = moe.demand  # which these have
        demand.add(square_E.sqrt())


def commit_statistics(trainer: Trainer, updated: bool) -> None:
    """Add up over all ranks what the layers have collected in an update, and keep it.

    Args:
        trainer: fairseq's.
        updated: whether there was an update; with an overflow there is none, and the sums are dropped.
    """
    run, update = RunState.of(trainer), trainer.get_num_updates()
    collectors = [module for module in trainer.get_model().modules() if isinstance(module, Collector)]
    sums = [collector.drain() for collector in collectors]
    # with --amp, trainer.py calls train_step again from within, to try a batch once more
    if not collectors or not updated or run.last_counted == update:
        return
    run.last_counted = update
    total_K = torch.cat(sums)
    if trainer.data_parallel_world_size > 1:
        distributed_utils.all_reduce(total_K, group=trainer.data_parallel_process_group)
    for collector, part_K in zip(collectors, total_K.split([len(each) for each in sums])):
        collector.commit(part_K)
