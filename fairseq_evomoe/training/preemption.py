"""A signal ends a training after the update that is under way, with a checkpoint: SLURM's preemption."""

import logging
import math
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from ..models.feed_forward import has_experts
from . import telling
from .state import RunState

logger = logging.getLogger(__name__)


def stop_or_go_on(
    original: Callable[..., Any],
    cfg: Any,
    trainer: Trainer,
    task: Any,
    epoch_itr: Any,
    valid_subsets: List[str],
    end_of_epoch: bool,
) -> Tuple[List[Optional[float]], bool]:
    """What stands in for fairseq's ``validate_and_save``, after each update: a signal may have come."""
    arguments = cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch
    if not has_experts(trainer.get_model()):
        return original(*arguments)
    listener = RunState.of(trainer).listener
    if not _any_rank(trainer, listener.received is not None):
        losses, should_stop = original(*arguments)
    else:
        # without a validation, which may take longer than there is time
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
        losses, should_stop = [None], True
        _tell(cfg, listener.received or "a signal to another rank", trainer.get_num_updates())
    if should_stop:
        listener.let_go()
    if should_stop or (end_of_epoch and epoch_itr.epoch >= (cfg.optimization.max_epoch or math.inf)):
        telling.end(trainer)
    return losses, should_stop


def _any_rank(trainer: Trainer, here: bool) -> bool:
    """Whether it is so on any rank: all must end after the same update."""
    if trainer.data_parallel_world_size == 1:
        return here
    flag = torch.tensor([int(here)], device=trainer.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=trainer.data_parallel_process_group)
    return bool(flag.item())


def _tell(cfg: Any, signal_name: str, update: int) -> None:
    if cfg.checkpoint.no_save or cfg.checkpoint.no_last_checkpoints:
        logger.warning(
            f"{signal_name}: the training ends after update {update}, and --no-save or --no-last-checkpoints "
            "leaves no checkpoint of it"
        )
    else:
        logger.info(
            f"{signal_name}: the training ends after update {update}, and goes on from there when it is "
            "started again"
        )
