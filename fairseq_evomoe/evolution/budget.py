"""What a schedule of spawns costs beside a fixed number of experts: seconds, memory, bytes on the way."""

from dataclasses import dataclass
from typing import Callable, List, Sequence, Tuple


@dataclass(frozen=True)
class Step:
    """What an update costs a rank while a layer has a certain number of experts.

    Attributes:
        seconds: it takes.
        memory: bytes of weights, gradients and the optimizer's state.
        sent: bytes that a rank sends to others for its tokens.
    """

    seconds: float
    memory: float
    sent: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Updates in which nothing spawns.

    Attributes:
        updates: how many.
        experts: of each layer.
        soft: whether the gate is still on its way from dense to sparse.
    """

    updates: int
    experts: int
    soft: bool = False


@dataclass(frozen=True)
class Cost:
    """What a whole run costs a rank.

    Attributes:
        seconds: of all updates.
        memory_seconds: bytes times the seconds for which they are needed.
        peak_memory: bytes of the stage that needs most.
        sent: bytes that a rank sends.
    """

    seconds: float
    memory_seconds: float
    peak_memory: float
    sent: float


def stages(
    spawns: Sequence[Tuple[int, int]], updates: int, soft_updates: float = 0, restarts: bool = True
) -> List[Stage]:
    """The stages of a run, in order; those without updates are left out.

    Args:
        spawns: update before which experts spawn, and their number from then on; the updates rise.
        updates: length of the run.
        soft_updates: how long the gate is soft after a spawn.
        restarts: whether that counts from each spawn, instead of the first.
    """
    found = []
    starts = [(0, 1), *spawns, (updates, 0)]
    for (start, experts), (end, _) in zip(starts, starts[1:]):
        length = max(min(end, updates) - start, 0)
        origin = start if restarts or experts == 1 else spawns[0][0]
        soft = int(min(max(origin + soft_updates - start, 0), length)) if experts > 1 else 0
        found += [Stage(soft, experts, soft=True), Stage(length - soft, experts)]
    return [stage for stage in found if stage.updates > 0]


def cost(run: Sequence[Stage], step: Callable[[Stage], Step]) -> Cost:
    """What a run costs, of what an update of each stage costs."""
    steps = [(stage.updates, step(stage)) for stage in run]
    return Cost(
        seconds=sum(n * each.seconds for n, each in steps),
        memory_seconds=sum(n * each.seconds * each.memory for n, each in steps),
        peak_memory=max(each.memory for _, each in steps),
        sent=sum(n * each.sent for n, each in steps),
    )
