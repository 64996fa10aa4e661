"""Ranks that are threads of this process, so that what they add up stays one graph of gradients."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, List, Sequence

import torch
from torch import Tensor

from fairseq_evomoe.moe.ranks import Ranks


class _Meeting:
    """Where ranks put down what they have and pick up what all have."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=120)
        self.things: List[Any] = [None] * size

    def exchange(self, rank: int, thing: Any) -> List[Any]:
        self.things[rank] = thing
        self.barrier.wait()
        found = list(self.things)
        self.barrier.wait()
        return found


class ThreadRanks(Ranks):
    """One rank; other than with processes, the gradient of a sum over ranks is not added up over them."""

    def __init__(self, size: int, rank: int, meeting: _Meeting) -> None:
        super().__init__(size, rank)
        object.__setattr__(self, "meeting", meeting)

    def total(self, *values):
        first = next(value for value in values if torch.is_tensor(value))
        own = [value if torch.is_tensor(value) else first.new_tensor(float(value)) for value in values]
        return [sum(parts) for parts in zip(*self.meeting.exchange(self.rank, own))]

    def gather_counts(self, count_K: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, count_K))

    def gather_rows(self, rows: Tensor) -> List[Tensor]:
        return self.meeting.exchange(self.rank, rows.detach())


def on_ranks(function: Callable[[Ranks, Any], Any], parts: Sequence[Any]) -> List[Any]:
    """``function(ranks, part)`` on one rank for each of the parts, side by side."""
    meeting = _Meeting(len(parts))

    def run(rank: int) -> Any:
        try:
            return function(ThreadRanks(len(parts), rank, meeting), parts[rank])
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))
