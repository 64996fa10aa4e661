"""Statistics of the tokens of each update, summed up over the ranks of a fairseq ``Trainer``."""

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from ..moe.statistics import Collector
from .state import RunState


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
