"""What ``fairseq-train`` would train, in this process and update by update: to time it, and to compare."""

import itertools
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

import numpy
import torch
from fairseq import checkpoint_utils, metrics, options, tasks
from fairseq import utils as fairseq_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer


class Updates(NamedTuple):
    """Some updates that were made.

    Attributes:
        seconds: that they took, without fetching their batches.
        logs: what fairseq's ``train_step`` returned of each; empty where it made none.
    """

    seconds: float
    logs: List[Dict[str, Any]]


class Training:
    """A training that goes on when it is asked to, and rests in between: several can take turns.

    Attributes:
        cfg: what the flags mean.
        trainer: fairseq's.
        epochs: fairseq's iterator over the data.
        restored: what the checkpoint has beside model and optimizer that it goes on from; empty without one.

    Args:
        flags: of ``fairseq-train``, the folder of the data first.
        load: whether to go on from the checkpoint that the flags name, if there is one.
        common: options of ``cfg.common`` to change, which no flag can.
    """

    def __init__(
        self, flags: Sequence[str], load: bool = True, common: Optional[Mapping[str, Any]] = None
    ) -> None:
        args = options.parse_args_and_arch(options.get_training_parser(), input_args=list(flags))
        self.cfg = cfg = convert_namespace_to_omegaconf(args)
        for name, value in (common or {}).items():
            cfg.common[name] = value
        numpy.random.seed(cfg.common.seed)
        fairseq_utils.set_torch_seed(cfg.common.seed)
        self.task = tasks.setup_task(cfg.task)
        model, criterion = self.task.build_model(cfg.model), self.task.build_criterion(cfg.criterion)
        self.trainer = Trainer(cfg, self.task, model, criterion)
        self.restored: Dict[str, Any] = {}
        if load:
            restored, self.epochs = checkpoint_utils.load_checkpoint(cfg.checkpoint, self.trainer)
            self.restored = restored or {}
        else:
            self.epochs = self.trainer.get_train_iterator(epoch=1, load_dataset=True)
        self._batches = self._batches_of_updates()

    @property
    def updates(self) -> int:
        """How many there were."""
        made: int = self.trainer.get_num_updates()
        return made

    @property
    def model(self) -> Any:
        """The model, without what fairseq wraps it in."""
        return self.trainer.get_model()

    def _batches_of_updates(self) -> Iterator[List[Any]]:
        """The batches of each update, epoch after epoch."""
        accumulated = self.cfg.optimization.update_freq[0]
        while True:
            self.trainer.begin_epoch(self.epochs.next_epoch_idx)
            yield from _grouped(self.epochs.next_epoch_itr(), accumulated)

    def update(self, times: int = 1) -> Updates:
        """Make some updates."""
        every = [next(self._batches) for _ in range(times)]
        logs = []
        with metrics.aggregate(new_root=True):
            start = now()
            for batches in every:
                logs.append(self.trainer.train_step(batches) or {})
            return Updates(now() - start, logs)

    def save(self, path: Path, **more: Any) -> None:
        """Write a checkpoint, with something beside model, optimizer and place in the data."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.trainer.consolidate_optimizer()  # as fairseq does before it saves
        self.trainer.save_checkpoint(str(path), {"train_iterator": self.epochs.state_dict(), **more})


def _grouped(batches: Iterator[Any], size: int) -> Iterator[List[Any]]:
    return iter(lambda: list(itertools.islice(batches, size)), [])


def now() -> float:
    """Seconds on a clock, once a GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
