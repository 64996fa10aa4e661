"""Seconds per update of all systems, side by side: in one process, on one machine, in one run.

In a round each system is trained from its start to its end, all stages scaled to that length, a few updates
at a time in turn with all others, so that whatever else the machine does slows all of them. Of the same
updates of several rounds the median counts.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import finished
from systems import DENSE, Settings, System, share

TIMES = "times.json"
BLOCK = 5
"""Updates of a system until it is another's turn."""


def read(folder: Path) -> dict[str, float]:
    """The seconds per update of each system, if they have been timed."""
    path = folder / TIMES
    return json.loads(path.read_text())["seconds"] if path.exists() else {}


def measure(systems: list[System], settings: Settings, rounds: int) -> dict[str, Any]:
    """Time some systems.

    Args:
        systems: the systems.
        settings: what is the same for all; `updates` is the length of a training.
        rounds: how often each is trained.

    Returns:
        `seconds` per update, by system; `rounds`, the same of each round; and what it was made with.
    """
    import torch

    torch.set_num_threads(1)
    applicable = [system for system in systems if settings.task not in system.not_for]
    if any(system.dense_updates for system in applicable) and DENSE not in applicable:
        applicable.insert(0, DENSE)
    found = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(_round(applicable, settings, Path(folder)))
        print(f"round {number + 1} of {rounds} is done", flush=True)
    each = [{name: _per_update(blocks) for name, blocks in one.items()} for one in found]
    median = {name: _per_update(_medians([one[name] for one in found])) for name in found[0]}
    for system in applicable:
        for seconds in (median, *each):
            _add_dense_part(seconds, system, settings.updates)
    return {
        "seconds": {name: round(value, 5) for name, value in median.items()},
        "rounds": [{name: round(value, 5) for name, value in one.items()} for one in each],
        "updates": settings.updates,
        **finished.made_with(),
    }


Blocks = list[tuple[int, float]]
"""Updates and the seconds that they took."""


def _round(systems: list[System], settings: Settings, folder: Path) -> dict[str, Blocks]:
    """Train all, in turn; the first update of each is not timed."""
    from fairseq_evomoe.training.in_process import Training

    trainings = {}
    for system in systems:
        updates, dense = settings.updates, None
        if system.dense_updates:
            updates -= share(system.dense_updates, settings.updates)
            dense = _dense_checkpoint(settings, settings.updates - updates, folder)
        command = settings.train(system, 1, folder / system.id, dense)
        trainings[system.id] = Training(command[1:]), updates
    blocks: dict[str, Blocks] = {name: [] for name in trainings}
    for training, _ in trainings.values():
        training.update(1)
    for made in range(1, settings.updates, BLOCK):
        for name, (training, updates) in trainings.items():
            more = min(BLOCK, updates - made)
            if more > 0:
                blocks[name].append((more, training.update(more).seconds))
    return blocks


def _dense_checkpoint(settings: Settings, updates: int, folder: Path) -> Path:
    """A dense model after some updates, made once."""
    from fairseq_evomoe.training.in_process import Training

    path = folder / f"dense-{updates}.pt"
    if not path.exists():
        short = Settings(settings.data, settings.task, updates, settings.more)
        training = Training(short.train(DENSE, 1, folder / "dense-first")[1:])
        training.update(updates)
        training.save(path)
    return path


def _per_update(blocks: Blocks) -> float:
    return sum(seconds for _, seconds in blocks) / sum(updates for updates, _ in blocks)


def _medians(rounds: list[Blocks]) -> Blocks:
    """Each block's median over the rounds."""
    return [(same[0][0], statistics.median(seconds for _, seconds in same)) for same in zip(*rounds)]


def _add_dense_part(seconds: dict[str, float], system: System, updates: int) -> None:
    """Let a system that is made of a dense model cost what both parts of its run do."""
    if system.dense_updates:
        part = share(system.dense_updates, updates) / updates
        seconds[system.id] = part * seconds[DENSE.id] + (1 - part) * seconds[system.id]
