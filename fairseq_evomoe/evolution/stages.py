"""Growth in stages: how many experts a layer has, and from which update on.

``--moe-spawn-update 5%:4,15%:16,40%:64`` says it: one expert for 5% of the run, then four, then sixteen, and
from 40% on sixty-four.  A single update is one stage, to all experts at once.
"""

import math
import re
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from ..moe.options import OptionError

Moment = Union[int, str]

BY_ITSELF = "auto"
"""Moment of a stage that comes at a plateau of the training loss."""


class Stage(NamedTuple):
    """A spawn.

    Attributes:
        update: before which it is; ``None``: at a plateau of the training loss.
        experts: in each layer, after it.
    """

    update: Optional[int]
    experts: int


def latest(stages: Sequence[Stage], max_update: int) -> Tuple[float, ...]:
    """The update before which each stage spawns, at the latest: if the loss decides, by half of the run."""
    last = [math.inf] * len(stages)
    if max_update > 0:
        last = [max(max_update // 2 * (i + 1) // len(stages), i + 1) for i in range(len(stages))]
    return tuple(limit if stage.update is None else stage.update for stage, limit in zip(stages, last))


def is_list(value: object) -> bool:
    """Whether a value of ``spawn_update`` is a list of stages instead of one moment."""
    return isinstance(value, str) and ":" in value


def read(value: Optional[Moment], experts: int) -> Tuple[Stage, ...]:
    """The stages that a value of ``spawn_update`` means, of which there is at least one.

    Args:
        value: an update, ``auto``, or a list as ``counted`` makes it.
        experts: of the last stage, where the value is a single moment.
    """
    if not is_list(value):
        return (Stage(value if isinstance(value, int) else None, experts),)
    return tuple(
        Stage(None if moment == BY_ITSELF else int(moment), int(number))
        for moment, number in _pairs(str(value))
    )


def last_experts(value: object) -> Optional[int]:
    """The number of experts that a list of stages ends with; ``None`` if it does not say it."""
    number = str(value).rpartition(":")[2].strip()
    return int(number) if is_list(value) and number.isdecimal() else None


def counted(value: str, count: Callable[[str], object], experts: int) -> str:
    """A list of stages with updates and numbers of experts in place of percentages.

    Args:
        value: such as ``5%:25%,20%:100%``.
        count: what a moment is in updates.
        experts: what percentages of experts are of; a stage has at least 2.

    Raises:
        OptionError: it is no list of stages.
    """
    parts = []
    for moment, number in _pairs(value):
        update = count(moment)
        match = re.fullmatch(r"(\d*\.?\d+)\s*%", number)
        if match is not None:
            number = str(max(round(float(match.group(1)) / 100 * experts), 2))
        if not (str(update).isdecimal() or update == BY_ITSELF) or not number.isdecimal():
            raise _no_list(value)
        parts.append(f"{update}:{int(number)}")
    return ",".join(parts)


def contradictions(stages: Tuple[Stage, ...], experts: int, even: bool) -> Iterator[OptionError]:
    """What stages have against each other, the number of experts and how they multiply.

    Args:
        stages: see ``read``.
        experts: of the last one, as it is given.
        even: whether each expert has as many children as any other.
    """
    text = ", ".join(f"{BY_ITSELF if s.update is None else s.update}:{s.experts}" for s in stages)
    updates = [stage.update for stage in stages if stage.update is not None]
    numbers = [stage.experts for stage in stages]
    if updates and len(updates) < len(stages):
        yield OptionError(
            "spawn_update",
            f"`spawn_update` {text} counts updates in some stages and waits for a plateau in others: give "
            f"{BY_ITSELF} for all of them or for none.",
        )
    if not _rise(updates):
        yield OptionError(
            "spawn_update", f"`spawn_update` {text} must have a later update in each stage: raise them."
        )
    if not _rise(numbers) or (len(stages) > 1 and numbers[0] < 2):
        yield OptionError(
            "spawn_update",
            f"`spawn_update` {text} must have more experts in each stage, and at least 2 in the first: raise "
            "them.",
        )
    elif numbers[-1] != experts:
        yield OptionError(
            "spawn_update",
            f"`spawn_update` {text} ends with {numbers[-1]} experts, but `experts` is {experts}: leave that "
            "out, or let it be the last stage's.",
        )
    elif even:
        for before, after in zip(numbers, numbers[1:]):
            if after % before:
                yield OptionError(
                    "spawn_update",
                    f"`spawn_update` {text} makes {after} experts of {before}, which cannot all have as many "
                    "children: give a multiple, or `spawn_select` load or gradient.",
                )


def _rise(numbers: List[int]) -> bool:
    return all(before < after for before, after in zip(numbers, numbers[1:]))


def _pairs(value: str) -> List[Tuple[str, str]]:
    pairs = [tuple(word.strip() for word in part.split(":")) for part in value.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise _no_list(value)
    return pairs  # type: ignore[return-value]


def _no_list(value: str) -> OptionError:
    return OptionError(
        "spawn_update",
        "`spawn_update` must be one moment, or moments with numbers of experts, such as 5%:4,15%:16 or "
        f"{BY_ITSELF}:4,{BY_ITSELF}:16, but is {value}.",
    )
