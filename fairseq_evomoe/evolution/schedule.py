"""Phase and temperature as pure functions of the update number."""

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Optional


class Phase(IntEnum):
    """The stages of EvoMoE's training (arXiv 2112.14397)."""

    DIVERSIFY = 0  # one expert learns
    SOFT = 1  # many experts, from dense to sparse as the temperature falls
    HARD = 2  # one expert for each token


class TemperatureSchedule(str, Enum):
    """How the temperature goes from start to end."""

    linear = "linear"
    exponential = "exponential"
    constant = "constant"


@dataclass(frozen=True)
class Schedule:
    """When the experts spawn, how the gate's temperature falls and when routing becomes top-1.

    Attributes:
        spawn_update: U, the update before which the experts spawn, at the latest if they spawn by themselves
            and have not yet; 0: there from the start; infinity: perhaps never.
        temperature_start: temperature at the spawn.
        temperature_end: temperature at the end of the anneal.
        kind: how the temperature falls; ``constant`` stays at the start.
        anneal_updates: D, length of the anneal in updates, counted from the spawn.
        hard_update: updates after the spawn from which routing is top-1; ``None``: 1.2 D; -1: never.
    """

    spawn_update: float = 0
    temperature_start: float = 2.0
    temperature_end: float = 0.5
    kind: TemperatureSchedule = TemperatureSchedule.linear
    anneal_updates: int = 5000
    hard_update: Optional[int] = None

    @property
    def hard_after(self) -> float:
        """Updates after the spawn from which routing is top-1."""
        if self.hard_update is None:
            return round(1.2 * self.anneal_updates)
        return float("inf") if self.hard_update < 0 else self.hard_update

    def temperature(self, update: Optional[int]) -> float:
        """Temperature at an update; ``None``: after training.

        With n updates since the spawn (0 before it), linear: ``max(start - n (start - end) / D, end)``,
        exponential: ``max(start (end / start)^(n / D), end)``.
        """
        if self.kind == TemperatureSchedule.constant:
            return self.temperature_start
        done = 1.0
        if update is not None and self.anneal_updates > 0:
            done = min(max(update - self.spawn_update, 0) / self.anneal_updates, 1.0)
        start, end = self.temperature_start, self.temperature_end
        if self.kind == TemperatureSchedule.exponential:
            return start * (end / start) ** done
        return start - done * (start - end)

    def phase(self, update: Optional[int], spawned: bool) -> Phase:
        """Phase at an update; ``None``: after training.

        Args:
            update: the update number.
            spawned: whether the experts have spawned.  A checkpoint whose experts have spawned stays
                grown when its update counter is reset; it waits for the spawn update in the soft phase.
        """
        if not spawned:
            return Phase.DIVERSIFY
        if update is None or update - self.spawn_update >= self.hard_after:
            return Phase.HARD if self.hard_after != float("inf") else Phase.SOFT
        return Phase.SOFT
