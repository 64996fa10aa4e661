"""Times of functions that are run in turn, so that a noisy machine hits all of them alike."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Callable

import torch

from fairseq_evomoe.moe.dispatch import memory


def machine(threads: int) -> dict:
    """What the figures depend on besides the code."""
    cpu = "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def in_words(error: Exception) -> str:
    """An error in the cell of a table: its kind, and the first line of what it says, if it says anything."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}".rstrip(": ")


def interleave(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict]:
    """Run the functions in turn, ``repeats`` times after one that is not counted.

    Returns:
        for each function the median, the minimum and all of its wall times, and the minimum of the time
        that the process's threads spent computing, in seconds.
    """
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            _wait_for_device()
            cpu_start, start = time.process_time(), time.perf_counter()
            function()
            _wait_for_device()
            end, cpu_end = time.perf_counter(), time.process_time()
            if repeat:
                wall[name].append(end - start)
                cpu[name].append(cpu_end - cpu_start)
    return {
        name: {
            "median": statistics.median(wall[name]),
            "minimum": min(wall[name]),
            "cpu_minimum": min(cpu[name]),
            "all": [round(t, 6) for t in wall[name]],
        }
        for name in functions
    }


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratios(times: dict[str, dict], name: str, base: str) -> dict[str, float]:
    """How many times ``base`` a function takes, by each of the measures."""
    a, b = times[name], times[base]
    pairs = [x / y for x, y in zip(a["all"], b["all"])]
    return {
        "median": a["median"] / b["median"],
        "minimum": a["minimum"] / b["minimum"],
        "cpu": a["cpu_minimum"] / max(b["cpu_minimum"], 1e-9),
        "pairs": statistics.median(pairs),
    }


def peak_memory(function: Callable[[], None]) -> float | None:
    """MiB that a call needs at its peak beyond what is in use before it; ``None`` where Linux is not there.

    Gradients of the call before count as in use, so that those of this call, which replace them, do not
    count as needed.  Once a GPU is in use, its memory is meant.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free counts as free
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        function()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def step(function: Callable, inputs: list, grad: torch.Tensor) -> Callable[[], None]:
    """A function that runs forward and backward once, with fresh gradients as an optimizer leaves them."""

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        function().backward(grad)

    return run


def clean_up() -> None:
    """Give back what the case before has left, so that cases do not depend on their order."""
    gc.collect()
    memory.release()
