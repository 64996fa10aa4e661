"""How a checkpoint comes onto the disk, so that at every moment a whole one is there.

fairseq writes one file, copies it to other names in place, and deletes old checkpoints; here that is recorded
while it goes on, and carried out by all ranks that write a file of the checkpoint, together:

1. each writes its file under a temporary name, copies it for the other names, and flushes them to the disk;
2. when all have, the first rank gives the first files their names: from now on the checkpoint is there, since
   the other files are found under their temporary names, too (``index.places_of``);
3. when it has, the others give theirs their names;
4. when all have, the first rank deletes the checkpoints that are too old.

A rank that cannot write tells the others before anything is renamed, and the old checkpoints stay.
"""

import contextlib
import logging
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig

from ..moe.ranks import ALONE, Ranks
from . import recovery, storage
from .finite import not_finite
from .index import path_of, suffix_of

logger = logging.getLogger(__name__)

Original = Callable[..., Any]


def step(name: str) -> None:
    """Nothing: where tests let a rank die."""


class CannotSave(RuntimeError):
    """A checkpoint cannot be written, or must not be; those that were there are still there."""


@dataclass
class Saving:
    """A checkpoint that is being saved, as one rank sees it.

    Attributes:
        ranks: those that write a file each; ``ALONE``: there is one file.
        source: the first name of this rank's file, once it is written under its temporary name.
        names: all names that it is to have.
        error: why it could not be written.
    """

    ranks: Ranks = ALONE
    source: Optional[str] = None
    names: List[str] = field(default_factory=list)
    error: Optional[str] = None

    @property
    def number(self) -> int:
        """Of this rank's file."""
        return self.ranks.group_rank

    def first_name(self, name: str) -> str:
        """The name of the first file of a set, of which this rank's file has a name."""
        return name if self.number == 0 else name[: -len(suffix_of(self.number) + ".pt")] + ".pt"

    def write(self, state: Dict[str, Any], name: str) -> None:
        """Write this rank's file under its temporary name."""
        self.names.append(name)
        with self._noting_errors(f"The checkpoint cannot be written to {name}"):
            broken = not_finite(state)
            if broken is not None:
                raise CannotSave(
                    f"{broken} has NaN or Inf: {name} is not written, and the checkpoints there stay. Go "
                    "on from one of them with a lower --lr or --clip-norm."
                )
            self._make_room(self.first_name(name))
            storage.write(state, name + storage.TEMPORARY)
            self.source = name
        step("written")

    def commit(self) -> List[str]:
        """Let the checkpoint be there; all ranks that write a file must call this.

        Returns:
            the names of the first file.

        Raises:
            CannotSave: a rank could not write; the old checkpoints are still there.
        """
        firsts = self._meet([self.first_name(name) for name in self.names])
        targets = [path_of(first, self.number) for first in firsts]
        with self._noting_errors("The checkpoint cannot be copied to its other names"):
            for first, target in zip(firsts, targets):
                if target != self.source:
                    self._make_room(first)
                    storage.copy(f"{self.source}{storage.TEMPORARY}", target + storage.TEMPORARY)
                    step("copied")
            storage.flush_folders(targets)
        self._meet(firsts)
        step("all written")
        if self.number == 0:
            self._rename(targets)
        self._meet(firsts)
        step("first renamed")
        if self.number > 0:
            self._rename(targets)
        self._meet(firsts)
        step("all renamed")
        if self.number == 0:
            self._remove_former(firsts)
        return firsts

    def _remove_former(self, firsts: List[str]) -> None:
        """Remove what is left of sets that had more files; other ranks may write the next one already."""
        for first in firsts:
            own = {path_of(first, number) for number in range(self._files)}
            for ending in ("", storage.TEMPORARY):
                former = set(recovery.parts_of(first, ending)) - {path + ending for path in own}
                storage.remove(former)

    @property
    def _files(self) -> int:
        return self.ranks.parallel

    def _make_room(self, first: str) -> None:
        """What has the temporary name may be needed: by a set whose ranks died before they renamed it."""
        if self.number > 0:
            recovery.settle(first, self.number)

    def _rename(self, targets: List[str]) -> None:
        for target in targets:
            storage.rename(target)
            step("renamed")
        storage.flush_folders(targets)

    @contextlib.contextmanager
    def _noting_errors(self, text: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".")
            self.error = str(error) if isinstance(error, CannotSave) else f"{text}: {reason}."
            logger.error(self.error)

    def _meet(self, names: List[str]) -> List[str]:
        """Wait until all ranks are here.

        Returns:
            the first rank's names.

        Raises:
            CannotSave: a rank could not write; what was written under temporary names is removed.
        """
        told: List[Tuple[Optional[str], List[str]]] = [(self.error, names)]
        if self._files > 1:
            told = told * self._files
            dist.all_gather_object(told, (self.error, names), group=self.ranks.expert_group)
        errors = [error for error, _ in told if error is not None]
        if errors:
            firsts = {self.first_name(name) for name in self.names} | set(told[0][1])
            storage.remove(path_of(first, self.number) + storage.TEMPORARY for first in firsts)
            raise CannotSave(errors[0])
        return told[0][1]


_under_way: ContextVar[Optional[Saving]] = ContextVar("saving", default=None)


@contextlib.contextmanager
def recorded(saving: Saving) -> Iterator[None]:
    """Let what fairseq writes, copies and deletes within be recorded instead."""
    token = _under_way.set(saving)
    try:
        yield
    finally:
        _under_way.reset(token)


def write(original: Original, state: Dict[str, Any], filename: str, *args: Any, **kwargs: Any) -> None:
    """A file of a checkpoint is written under a temporary name, until all ranks have written theirs."""
    saving = _under_way.get()
    if saving is None or saving.names:  # what somebody else's task writes beside it
        original(state, filename, *args, **kwargs)
    else:
        saving.write(state, filename)


def copy(original: Original, src_path: str, dst_path: str, *args: Any, **kwargs: Any) -> Any:
    """fairseq copies a checkpoint in place, so that one that dies meanwhile has destroyed what was there."""
    saving = _under_way.get()
    if saving is None or src_path not in saving.names:
        return original(src_path, dst_path, *args, **kwargs)
    saving.names.append(dst_path)
    return True


def found(original: Original, path: str, pattern: str, *args: Any, **kwargs: Any) -> List[Any]:
    """While a checkpoint is saved, there is nothing to delete; all ranks see the same names as the first."""
    saving = _under_way.get()
    if saving is None:
        return original(path, pattern, *args, **kwargs)
    if saving.names:
        return []
    firsts = original(path, pattern.replace(suffix_of(saving.number), ""), *args, **kwargs)
    return [path_of(first, saving.number) for first in firsts]


def delete_old(cfg: CheckpointConfig, end_of_epoch: bool, suffix: str) -> None:
    """Delete the checkpoints that are too old, as the end of fairseq's ``save_checkpoint`` does.

    Args:
        cfg: says how many of each kind are kept.
        end_of_epoch: whether the one that was saved is that of an epoch.
        suffix: what fairseq adds to the names of first files.
    """
    find = checkpoint_utils.checkpoint_paths
    old: List[str] = []
    if cfg.keep_interval_updates > 0 and not end_of_epoch:
        pattern, multiple = rf"checkpoint_\d+_(\d+){suffix}\.pt", cfg.keep_interval_updates_pattern
        kept = find(cfg.save_dir, pattern=pattern, keep_match=True)
        paths = [path for path, update in kept if multiple == -1 or update % multiple != 0]
        old += paths[cfg.keep_interval_updates :]
    if cfg.keep_last_epochs > 0:
        old += find(cfg.save_dir, pattern=rf"checkpoint(\d+){suffix}\.pt")[cfg.keep_last_epochs :]
    if cfg.keep_best_checkpoints > 0:
        metric = cfg.best_checkpoint_metric
        best = find(cfg.save_dir, pattern=rf"checkpoint\.best_{metric}_(\d+\.?\d*){suffix}\.pt")
        best = best if cfg.maximize_best_checkpoint_metric else best[::-1]
        old += best[cfg.keep_best_checkpoints :]
    for path in old:
        storage.remove([path, *recovery.parts_of(path), *recovery.parts_of(path, storage.TEMPORARY)])
        step("deleted")
