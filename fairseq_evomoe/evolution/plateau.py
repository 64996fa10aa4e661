"""When experts spawn by themselves (``--moe-spawn-update auto``): ours, not from the paper."""

import math
from dataclasses import dataclass, field
from typing import Dict, List, Optional

import torch
from torch import Tensor

from ..moe.options import Options, option

_COUNTS = ("update", "count", "windows")
_NOT_YET = -1
"""In the state: the update of a spawn that has not come."""
_LOSSES = ("loss_sum", "weight_sum", "mean", "fall", "steepest", "lr")


@dataclass(frozen=True)
class PlateauOptions(Options):
    """What counts as a plateau; the names are flat."""

    spawn_window: Optional[int] = option(
        None,
        "Updates whose losses are averaged to find a plateau, with moe-spawn-update auto; a fortieth of "
        "max-update, but at least 10, if not given, and 500 without max-update.",
        at_least=1,
        duration=True,
    )
    spawn_plateau: float = option(
        0.2,
        "With moe-spawn-update auto, the experts spawn after the first window whose mean loss is lower "
        "than that of the window before by less than this share of the greatest such fall so far, unless "
        "the learning rate has risen.",
        at_least=0,
        below=1,
    )


@dataclass
class Plateau:
    """Finds the first plateau of the training loss, and with several stages the first one after each spawn.

    Updates are taken in windows of ``window``.  With m_k the mean loss of window k, in which each update
    weighs its sample size, the loss falls by ``f_k = m_(k-1) - m_k`` in window k >= 2.  The window is a
    plateau if

    - ``f_k < share * F`` with ``F = max(f_2, ..., f_(k-1)) > 0``: measured in its own steepest fall, the loss
      falls no more, whatever its unit and however long a window is;
    - and the learning rate after it is not greater than after window k - 1: while it warms up, a loss that
      hardly falls says nothing.

    So the third window is the first that can be one.

    A loss of NaN or Inf is left out of its window's mean, and a window that has no other is left out
    altogether.  All numbers are float64 on the CPU and come from what fairseq has added up over all ranks, so
    that every rank decides the same, and a run that is resumed from ``state`` goes on as it would have.

    Attributes:
        window: W, updates in a window.
        share: see above.
        stages: how many spawns there are.
        update: the last update that was seen.
        spawned: the updates before which the experts have spawned, or spawn now.
        count: updates in the window that is being filled.
        windows: how many there were.
        loss_sum: sum of weight times loss in the window that is being filled.
        weight_sum: sum of their weights.
        mean: m_k of the last window, in the unit of fairseq's ``loss`` (bits).
        fall: its f_k, 0 before the second window.
        steepest: the greatest fall of a window so far, at least 0.
        lr: learning rate after the last window.
    """

    window: int
    share: float
    stages: int = 1
    update: int = 0
    spawned: List[int] = field(default_factory=list)
    count: int = 0
    windows: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    mean: float = 0.0
    fall: float = 0.0
    steepest: float = 0.0
    lr: float = 0.0

    KEYS = ("plateau.updates", "plateau.losses")
    """Names of the tensors in a model's state."""

    @property
    def spawn_update(self) -> Optional[int]:
        """The update before which the experts spawn, or have spawned last; ``None``: no plateau yet."""
        return self.spawned[-1] if self.spawned else None

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to wait for."""
        return len(self.spawned) >= self.stages

    def see(self, update: int, loss: float, weight: float, lr: float) -> bool:
        """Take in an update; whether it ends a window that is a plateau, so that the experts spawn now.

        Args:
            update: its number, counted from 1.
            loss: mean loss of its batch, over all ranks.
            weight: size of that batch.
            lr: learning rate of the next update.
        """
        self.update = update
        self.count += 1
        if math.isfinite(loss) and weight > 0:
            self.loss_sum += weight * loss
            self.weight_sum += weight
        if self.count < self.window:
            return False
        found = self.weight_sum > 0 and self._end_window(self.loss_sum / self.weight_sum, lr)
        self.count, self.loss_sum, self.weight_sum = 0, 0.0, 0.0
        if found:
            self.spawned.append(update)
        return found

    def begin_stage(self, stage: int, update: int) -> None:
        """Note that the experts spawn, and look for the plateau that the next spawn waits for, if one does.

        Args:
            stage: how many times they had spawned before.
            update: before which they do it now.
        """
        self.spawned = [*self.spawned[:stage], update]
        if not self.ended:
            fresh = Plateau(self.window, self.share, self.stages, self.update, self.spawned)
            vars(self).update(vars(fresh))

    def _end_window(self, mean: float, lr: float) -> bool:
        self.fall = self.mean - mean if self.windows > 0 else 0.0
        flat = self.steepest > 0 and self.fall < self.share * self.steepest and lr <= self.lr
        self.steepest = max(self.steepest, self.fall)
        self.mean, self.lr = mean, lr
        self.windows += 1
        return flat

    def reason(self, stage: int = 0) -> str:
        """Why the experts spawn now, which have done so ``stage`` times before."""
        if len(self.spawned) <= stage:
            part = "the first half" if self.stages == 1 else f"its part of the first half (stage {stage + 1})"
            return f"the training loss has reached no plateau in {part} of --max-update"
        return (
            f"the mean loss of {self.window} updates fell by {self.fall:.4g} to {self.mean:.4g}, by less "
            f"than {self.share:g} of its greatest fall of {self.steepest:.4g}"
        )

    def state(self) -> Dict[str, Tensor]:
        """What a checkpoint needs, by the names in ``KEYS``."""
        spawn_update = _NOT_YET if self.spawn_update is None else self.spawn_update
        earlier = self.spawned[:-1]
        # of one length in all stages: an EMA compares shapes
        earlier = earlier + [_NOT_YET] * (self.stages - 1 - len(earlier))
        counts = [spawn_update] + [getattr(self, name) for name in _COUNTS] + earlier
        losses = [getattr(self, name) for name in _LOSSES]
        return dict(zip(self.KEYS, (torch.tensor(counts), torch.tensor(losses, dtype=torch.float64))))

    def load(self, state: Dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        # scripts/average_checkpoints.py makes a mean of whole numbers, too
        spawn_update, *counts = (round(x) for x in state[self.KEYS[0]].tolist())
        earlier = [update for update in counts[len(_COUNTS) :] if update >= 0]
        spawned = [] if spawn_update < 0 else [*earlier, spawn_update]
        self.spawned = spawned[-self.stages :]  # a merged model has one stage left
        vars(self).update(zip(_COUNTS, counts))
        vars(self).update(zip(_LOSSES, state[self.KEYS[1]].tolist()))

    def resume(self, update: int, stage: int) -> bool:
        """Begin anew if a checkpoint was loaded that another run, or another count of updates, left.

        What waits for a plateau forgets that other loss; experts that have spawned count as spawned at 0.

        Args:
            update: the number of updates that the run has made.
            stage: how many times the experts have spawned.

        Returns:
            whether it was so.
        """
        foreign = len(self.spawned) < stage or update < max(self.spawned, default=0)
        if stage < self.stages:
            foreign = foreign or update != self.update
        if foreign:
            fresh = Plateau(self.window, self.share, self.stages, update, [0] * min(stage, self.stages))
            vars(self).update(vars(fresh))
        return foreign
