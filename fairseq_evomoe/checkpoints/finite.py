"""Whether what is about to be saved can be trained on, so that no NaN replaces the last good checkpoint."""

from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from torch import Tensor

from .index import EXPERTS, INDEX
from .saved_optimizer import LAYOUT, Layout


def not_finite(state: Dict[str, Any]) -> Optional[str]:
    """A parameter or a statistic of it, in a file of a checkpoint, that has NaN or Inf.

    Buffers are not looked at, which may have Inf by design or are never filled, as fairseq's
    ``_float_tensor``.
    This takes 0.09 s a gigabyte, a fifteenth of the time that writing it does.

    Returns:
        what to call it; ``None``: all is well.
    """
    return next((name for name, tensor in _trained(state) if not _is_finite(tensor)), None)


def _is_finite(tensor: Any) -> bool:
    if not torch.is_tensor(tensor) or not tensor.is_floating_point():
        return True
    # a sum reads each number once and writes none, and is NaN or Inf if one of them is
    low = tensor.dtype in (torch.float16, torch.bfloat16)
    total = tensor.sum(dtype=torch.float32 if low else None)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())  # or too large


def _trained(state: Dict[str, Any]) -> Iterator[Tuple[str, Any]]:
    """Names and values of all that an update changes."""
    saved = (state.get(INDEX) or {}).get("layout") or state.get(LAYOUT)
    layout = Layout([], [], False) if saved is None else Layout.from_dict(saved)
    extra, experts = state.get("extra_state") or {}, state.get(EXPERTS) or {}
    averages = {**(extra.get("ema") or {}), **(extra.get("ema_fp32_params") or {})}
    for tensors, name in ((state.get("model") or {}, "{}"), (averages, "{} of the EMA")):
        yield from ((name.format(key), tensors[key]) for key in layout.keys if key in tensors)
    for kind, name in (("model", "{}"), ("ema", "{} of the EMA"), ("ema_fp32", "{} of the EMA")):
        yield from ((name.format(key), tensor) for key, tensor in experts.get(kind, {}).items())
    for key, statistics in experts.get("optimizer", {}).items():
        yield from ((f"{name} of {key}", value) for name, value in statistics.items())
    yield from _statistics(state.get("last_optimizer_state") or {}, layout)


def _statistics(optimizer: Dict[str, Any], layout: Layout) -> Iterator[Tuple[str, Any]]:
    """Names and values of an optimizer's statistics."""
    for number, statistics in optimizer.get("state", {}).items():
        for name, value in statistics.items():
            if layout.flat and isinstance(value, Tensor) and value.numel() == sum(layout.sizes):
                parts = zip(layout.keys, value.split(layout.sizes))
                yield from ((f"{name} of {key}", part) for key, part in parts)
            elif not layout.flat and isinstance(number, int) and number < len(layout.keys):
                yield f"{name} of {layout.keys[number]}", value
            else:
                yield f"{name} of the optimizer's state {number}", value
