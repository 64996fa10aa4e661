"""How long ranks wait for one another, and which of them it was that did not come."""

import contextlib
import os
import re
import socket
import threading
import time
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch.distributed as dist
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils

from ..config.config import RankOptions
from ..config.errors import PREFIX

BEAT = 1.0
"""Seconds between two signs of life."""

SILENCE = 5 * BEAT
"""Seconds without one after which a rank is stopped, or gone."""

_COMMUNICATION = re.compile(r"gloo|nccl|timed? ?out|connection|socket|broken pipe", re.IGNORECASE)


class RankAbsent(RuntimeError):
    """An exchange between ranks failed; the text names those that do not answer."""


class Pulse:
    """A sign of life of this process in the store that all ranks share, from a thread of its own.

    It goes on while the process waits for others, and stops with the process, or at the ``end`` of the run.

    Args:
        store: of torch.distributed.
        rank: of this process.
        size: number of ranks.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        store.set(f"evomoe_process/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        store.set(f"evomoe_beat/{rank}", "0")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beats = 0
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that keeps it
            while not self._ended.wait(BEAT):
                beats += 1
                self.store.set(f"evomoe_beat/{self.rank}", str(beats))

    def end(self) -> None:
        """Nobody waits for this process any more."""
        self._ended.set()
        self._thread.join(BEAT)  # not for ever: the store may not answer

    def silent(self) -> List[str]:
        """The ranks without a sign of life, in words; takes one to three times ``SILENCE``."""
        before = _in_time(self._beats)
        time.sleep(SILENCE)
        after = _in_time(self._beats)
        if before is None or after is None:
            return ["rank 0, or whoever keeps the store of all ranks,"]
        return [name for name, beats in before.items() if after[name] == beats]

    def _beats(self) -> Dict[str, bytes]:
        """How many signs of life there have been of each other rank, by the rank in words."""
        moment = timedelta(seconds=SILENCE / (self.size + 1))
        self.store.wait([f"evomoe_beat/{self.rank}"], moment)  # an error if the store itself is gone
        found = {}
        for rank in range(self.size):
            name, keys = f"rank {rank}", [f"evomoe_{what}/{rank}" for what in ("process", "beat")]
            if rank == self.rank:
                continue
            try:
                self.store.wait(keys, moment)
            except RuntimeError:  # it has never come so far
                found[name] = b""
            else:
                process, beats = map(self.store.get, keys)
                found[f"{name} ({process.decode()})"] = beats
        return found


def seconds(cfg: FairseqConfig) -> int:
    """How long a rank waits, by the configuration of a run, whose model may be somebody else's."""
    given = getattr(cfg.model, PREFIX + "timeout", None)
    return int(RankOptions().timeout if given is None else given)


def _in_time(ask: Callable[[], Any]) -> Optional[Any]:
    """What is found out within ``SILENCE`` seconds; ``None``: nobody answers."""
    found: List[Any] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SILENCE)
    return found[0] if found else None


def meet(seconds: int) -> Pulse:
    """Wait for all ranks, and let no further wait for others be longer; all ranks must call this.

    Args:
        seconds: for fairseq's groups, which are made here, and for the store through which groups are made.

    Raises:
        RankAbsent: a rank has not come.
    """
    longest = timedelta(seconds=seconds)
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(longest)
    change = getattr(dist.distributed_c10d, "_set_pg_timeout", None)  # since torch 2.1
    if change is not None:
        change(longest)
    pulse = Pulse(store, dist.get_rank(), dist.get_world_size())
    with naming_the_absent(pulse, seconds):
        # a rank that has failed is noticed here, where ranks are connected; to make a group, the others would
        # wait for it
        dist.barrier()
        function: Any = distributed_utils.get_global_group
        if not hasattr(function, "_global_group"):
            function._global_group = dist.new_group(timeout=longest)
        elif change is not None:  # of an earlier run in this process
            change(longest, function._global_group)
    return pulse


@contextlib.contextmanager
def naming_the_absent(pulse: Optional[Pulse], seconds: int) -> Iterator[None]:
    """Say which rank does not answer, where an exchange with it fails.

    Args:
        pulse: of this process; ``None``: it is alone.
        seconds: how long it has waited at most.

    Raises:
        RankAbsent: an exchange failed, and a rank does not answer.
    """
    try:
        yield
    except RankAbsent:
        raise
    except RuntimeError as error:
        if pulse is None or not _COMMUNICATION.search(str(error)):
            raise
        silent = pulse.silent()
        if not silent:
            raise
        text = f"no answer from {' and '.join(silent)} (--moe-timeout {seconds}): {error}"
        raise RankAbsent(text) from error
