"""Phase and temperature as pure functions of the update number."""

import math
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Iterator, Optional, Tuple, Union

from ..moe.options import OptionError, Options, option


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


class StageTemperature(str, Enum):
    """Whether each further stage of growth is a new beginning for the gate."""

    restart = "restart"
    go_on = "continue"


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """When the experts spawn, and how the gate goes from dense to sparse; the names are flat."""

    spawn_update: Optional[Union[int, str]] = option(
        None,
        "Update before which the single expert becomes moe-experts experts; with 0 the experts are there "
        "from the start, each with initial weights of its own; with auto they spawn when the training loss "
        "reaches a plateau, or else after half of max-update. Several stages, each with its number of "
        "experts: 5%:4,15%:16,40%:64, or auto:4,auto:16; a number may be a percentage of moe-experts. If not "
        "given, 10% of max-update with the router dts, or auto without max-update, and 0 with the others.",
        at_least=0,
        duration=True,
        words=("auto",),
        stages=True,
    )
    stage_temperature: StageTemperature = option(
        "restart",
        "With several stages in moe-spawn-update, whether the Gumbel-softmax gate is dense again in each of "
        "them, and anneals from its spawn (restart), or anneals once, from the first spawn (continue).",
    )
    gate_warmup: int = option(
        0,
        "Updates before the first spawn, at most all of them, in which a linear gate learns already, from "
        "the single expert's input, to tell tokens apart and to be even over them. Nothing else changes "
        "until the spawn.",
        at_least=0,
        duration=True,
    )
    temperature_start: float = option(
        2.0, "Temperature of the Gumbel-softmax gate when the experts have spawned.", above=0
    )
    temperature_end: float = option(
        0.5, "Temperature of the Gumbel-softmax gate at the end of the anneal.", above=0
    )
    temperature_schedule: TemperatureSchedule = option(
        "linear", "How the temperature falls from start to end; constant keeps it at the start."
    )
    anneal_updates: int = option(
        5000, "Length of the anneal in updates, counted from the spawn.", at_least=0, duration=True
    )
    hard_update: Optional[int] = option(
        None,
        "Updates after the spawn from which each token goes to moe-hard-experts experts only; 1.2 times "
        "moe-anneal-updates if not given, and -1 for never.",
        at_least=-1,
        duration=True,
    )

    def contradictions(self, experts: int) -> Iterator[OptionError]:
        """See the parent."""
        if self.temperature_end > self.temperature_start:
            yield OptionError(
                "temperature_end",
                f"`temperature_end` ({self.temperature_end}) must not be greater than `temperature_start` "
                f"({self.temperature_start}), since the gate goes from dense to sparse.",
            )


@dataclass(frozen=True)
class Schedule:
    """When the experts spawn, how the gate's temperature falls and when routing becomes top-1.

    A layer's ``stage`` is how many times its experts have spawned, 0 while there is one.

    Attributes:
        spawn_update: U, the update before which the experts spawn, at the latest if they spawn by themselves
            and have not yet; 0: there from the start; infinity: perhaps never; minus infinity: long ago, in
            another run.
        temperature_start: temperature at the spawn.
        temperature_end: temperature at the end of the anneal.
        kind: how the temperature falls; ``constant`` stays at the start.
        anneal_updates: D, length of the anneal in updates, counted from the spawn.
        hard_update: updates after the spawn from which routing is top-1; ``None``: 1.2 D; -1: never.
        later_spawns: the same as ``spawn_update`` of each further stage.
        gate_warmup: updates before the first spawn in which the gate learns already.
        restarts: whether anneal and top-1 count from the last spawn that there was, instead of the first.
    """

    spawn_update: float = 0
    temperature_start: float = 2.0
    temperature_end: float = 0.5
    kind: TemperatureSchedule = TemperatureSchedule.linear
    anneal_updates: int = 5000
    hard_update: Optional[int] = None
    later_spawns: Tuple[float, ...] = ()
    restarts: bool = True
    gate_warmup: int = 0

    def warms_up(self, update: Optional[int]) -> bool:
        """Whether a gate learns at an update that has no experts yet."""
        return update is not None and 0 <= self.spawn_update - update <= self.gate_warmup

    @property
    def spawn_updates(self) -> Tuple[float, ...]:
        """The update before which each stage spawns."""
        return (self.spawn_update, *self.later_spawns)

    def long_after(self, stage: int) -> "Schedule":
        """The schedule where the first spawns, as many as the stage says, were long ago, in another run."""
        spawns = (-math.inf,) * stage + self.spawn_updates[stage:]
        return replace(self, spawn_update=spawns[0], later_spawns=spawns[1:])

    def next_spawn(self, stage: int) -> float:
        """The update before which a layer of a stage spawns; infinity: never again."""
        return self.spawn_updates[stage] if stage < len(self.spawn_updates) else math.inf

    def last_spawn(self, stage: int) -> float:
        """The update before which a layer of a stage has spawned last; of stage 0: will spawn."""
        return self.spawn_updates[min(max(stage, 1), len(self.spawn_updates)) - 1]

    def _origin(self, stage: int) -> float:
        """The update from which anneal and top-1 count."""
        return self.last_spawn(stage) if self.restarts else self.spawn_update

    @property
    def hard_after(self) -> float:
        """Updates after the spawn from which routing is top-1."""
        if self.hard_update is None:
            return round(1.2 * self.anneal_updates)
        return math.inf if self.hard_update < 0 else self.hard_update

    def temperature(self, update: Optional[int], stage: int = 1) -> float:
        """Temperature at an update; ``None``: after training.

        With n updates since the spawn (0 before it), linear: ``max(start - n (start - end) / D, end)``,
        exponential: ``max(start (end / start)^(n / D), end)``.
        """
        if self.kind == TemperatureSchedule.constant:
            return self.temperature_start
        done = 1.0
        if update is not None and self.anneal_updates > 0:
            done = min(max(update - self._origin(stage), 0) / self.anneal_updates, 1.0)
        start, end = self.temperature_start, self.temperature_end
        if self.kind == TemperatureSchedule.exponential:
            return start * (end / start) ** done
        return start - done * (start - end)

    def phase(self, update: Optional[int], stage: int) -> Phase:
        """Phase at an update; ``None``: after training.

        Args:
            update: the update number.
            stage: of the layer.  A checkpoint whose experts have spawned stays grown when its update counter
                is reset; it waits for the spawn update in the soft phase.
        """
        if stage == 0:
            return Phase.DIVERSIFY
        if update is None or update - self._origin(stage) >= self.hard_after:
            return Phase.HARD if self.hard_after != math.inf else Phase.SOFT
        return Phase.SOFT
