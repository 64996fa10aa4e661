"""Where the time of a step goes on a GPU."""

from __future__ import annotations

from typing import Any, Callable

import torch


def profile(step: Callable[[], object], steps: int = 3) -> dict[str, Any]:
    """Where the time of a step goes: its kernels by time, how many, and how long the GPU has none.

    On a CPU, PyTorch's operations take the kernels' place.
    """
    on_gpu = torch.cuda.is_initialized()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=kinds) as prof:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [e for e in prof.events() if e.device_type == device]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, end = 0.0, spans[0][0] if spans else 0.0
    for first, last in spans:
        busy += max(last - max(first, end), 0)
        end = max(end, last)
    totals: dict[str, list[float]] = {}
    for event in events:
        entry = totals.setdefault(event.name[:120], [0, 0])
        entry[0] += 1 / steps
        entry[1] += (event.time_range.end - event.time_range.start) / steps
    order = sorted(totals.items(), key=lambda item: -item[1][1])
    span = (end - spans[0][0]) / steps if spans else 0.0
    return {
        "launches": round(len(events) / steps, 1),
        "busy_us": round(busy / steps, 1),
        "span_us": round(span, 1),
        "kernels": [[name, round(n, 2), round(us, 1)] for name, (n, us) in order[:30]],
        "brief": "{:.0f} launches, {:.0f} of {:.0f} us busy".format(len(events) / steps, busy / steps, span),
    }
