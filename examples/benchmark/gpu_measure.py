"""How `gpu.py` measures: functions in turn, alone and queued, each figure written down at once."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

sys.path.append(str(Path(__file__).resolve().parents[1] / "systems"))

import json_lines
import torch
from timing import clean_up, interleave, peak_memory, ratios

from fairseq_evomoe.moe.dispatch import local as ways
from fairseq_evomoe.moe.dispatch.kernels import launch
from fairseq_evomoe.moe.routers import base

Step = Callable[[], None]


class Results:
    """What is known already, by key, and a file to which each new figure is added at once."""

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu.jsonl"
        self.known = {line["key"]: line for line in json_lines.read(self.path)}
        self.end = time.monotonic() + seconds

    def measure(self, key: str, part: str, function: Callable[[], dict[str, Any]]) -> None:
        """Add what the function returns, unless it is known or time is up; errors are results, too."""
        if key in self.known or time.monotonic() > self.end:
            return
        start = time.monotonic()
        try:
            found = function()
        except Exception as error:  # a case that cannot run must not take the others with it
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        seconds = round(time.monotonic() - start, 2)
        line = {"key": key, "part": part, "seconds": seconds, **found}
        self.known[key] = line
        json_lines.append(self.path, line)
        brief = found.get("brief") or found.get("error") or ""
        print(f"{key} ({seconds:.1f} s): {brief}", flush=True)
        clean_up()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Dispatch that does not take some of its ways."""
    before, ways.without = ways.without, set(names)
    try:
        yield
    finally:
        ways.without = before


def as_before(step: Step) -> Step:
    """A step without the kernels: what a GPU without Triton does."""

    def run() -> None:
        with without("kernels"):
            step()

    return run


@contextmanager
def taking(look_up: bool) -> Iterator[None]:
    """Dispatch by the candidates that are off until they are measured."""
    before = ways.candidates, launch.look_up
    ways.candidates, launch.look_up = {"one_function"}, look_up
    try:
        yield
    finally:
        ways.candidates, launch.look_up = before


def with_candidates(step: Step) -> dict[str, Step]:
    """A step by each of them."""

    def by(look_up: bool) -> Step:
        def run() -> None:
            with taking(look_up):
                step()

        return run

    return {"one function": by(False), "looked up": by(True)}


def on_device(step: Step) -> Step:
    """A step of BASE that assigns tokens on the GPU."""

    def run() -> None:
        before, base.on_device = base.on_device, True
        try:
            step()
        finally:
            base.on_device = before

    return run


def autocast(step: Step, device: str) -> Step:
    """A step under autocast to bfloat16."""

    def run() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            step()

    return run


def queued(functions: dict[str, Step], repeats: int, calls: int = 8) -> dict[str, float]:
    """Milliseconds of a call when others wait behind it, as in training: the median over some rounds."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(max(repeats // 4, 2)):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end) / calls)
    return {name: statistics.median(times) for name, times in found.items()}


def figures(functions: dict[str, Step], base: str, repeats: int) -> dict[str, Any]:
    """Times one at a time and queued, and memory, of what is run in turn; ratios to one of them."""
    times = interleave(functions, repeats)
    found: dict[str, Any] = {
        "ms": {name: round(1000 * t["median"], 4) for name, t in times.items()},
        "ratio": {name: {k: round(v, 3) for k, v in ratios(times, name, base).items()} for name in functions},
        "mib": {name: peak_memory(function) for name, function in functions.items()},
    }
    if torch.cuda.is_initialized():
        found["queued_ms"] = {name: round(v, 4) for name, v in queued(functions, repeats).items()}
    times = found.get("queued_ms", found["ms"])
    found["brief"] = {name: round(times[name] / times[base], 3) for name in functions}
    return found
