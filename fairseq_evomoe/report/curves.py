"""What the log of ``fairseq-train`` tells of a run, line by line."""

import json
import re
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np

from ..checkpoints.files import CommandError
from .sample import Array

SERIES = {
    "loss": "training loss",
    "nll_loss": "training loss",
    "gnorm": "gradient norm",
    "moe_phase": "phase",
    "moe_experts": "experts a token",
    "moe_temperature": "temperature of the gate",
    "moe_load_entropy": "evenness of the loads",
    "moe_load_max": "load of the busiest expert",
    "moe_gate_entropy": "entropy of the gate",
    "moe_dropped": "dropped pairs",
}
"""What is taken of the lines ``train_inner``, and what it is called."""
_JSON = re.compile(r"\| (train_inner|valid) \| (\{\".*\})\s*$")
_SIMPLE = re.compile(
    r"\| (train_inner|valid)(?: on '.*' subset)? \| epoch +\d+:?(?: +\d+ / \d+|) *\|? *(.*)$"
)
_PAIR = re.compile(r"(\w+)(?:=| )([-+.\w]+)")


def read(paths: Sequence[str]) -> Dict[str, Any]:
    """The curves in the logs of one run, of ``--log-format json`` or ``simple``; later files go before.

    Returns:
        ``update`` and one list for each of ``SERIES`` that is there; ``valid``: ``update`` and ``loss``;
        ``spikes``: updates at which the training loss jumped; ``spawns``: what the log says of them.

    Raises:
        CommandError: a file without such lines.
    """
    training: Dict[int, Dict[str, float]] = {}
    valid: Dict[int, float] = {}
    spawns: List[str] = []
    for path in paths:
        found = False
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            if "spawned experts" in line:
                spawns.append(line.rsplit(" | ", 1)[-1])
            tag, values = _values(line)
            if tag == "train_inner" and "num_updates" in values:
                training[int(values["num_updates"])] = values
                found = True
            elif tag == "valid" and "valid_num_updates" in values:
                valid[int(values["valid_num_updates"])] = values.get(
                    "valid_nll_loss", values.get("valid_loss", np.nan)
                )
        if not found:
            raise CommandError(
                f"`log` {path} has no lines `train_inner`: give what fairseq-train printed with --log-format "
                "json or simple."
            )
    return _curves(training, valid, list(dict.fromkeys(spawns)))


def _curves(
    training: Dict[int, Dict[str, float]], valid: Dict[int, float], spawns: List[str]
) -> Dict[str, Any]:
    updates = sorted(training)
    curves: Dict[str, Any] = {"update": updates, "spawns": spawns}
    for name in SERIES:
        values = [training[update].get(name) for update in updates]
        if any(value is not None for value in values):
            curves[name] = values
    loss = np.array([np.nan if x is None else x for x in curves.get("loss", [])], dtype=float)
    curves["spikes"] = [updates[i] for i in spikes(loss)]
    curves["valid"] = {"update": sorted(valid), "loss": [valid[update] for update in sorted(valid)]}
    return curves


def spikes(loss_U: Array, window: int = 11, factor: float = 6.0) -> List[int]:
    """Where a loss jumps: more than ``factor`` usual steps over the median of the ``window`` before it.

    A usual step is the median absolute difference of successive values there.  The first ``window`` values
    are none: too little is known of them.
    """
    found = []
    for i in range(window, len(loss_U)):
        before = loss_U[i - window : i]
        step = np.median(np.abs(np.diff(before)))
        if loss_U[i] - np.median(before) > factor * max(step, 1e-3 * abs(np.median(before))):
            found.append(i)
    return found


def _values(line: str) -> Any:
    """Tag and numbers of a line of a log; nothing of any other line."""
    match = _JSON.search(line)
    if match:
        items = json.loads(match.group(2)).items()
    else:
        match = _SIMPLE.search(line)
        if not match:
            return "", {}
        items = _PAIR.findall(match.group(2))
    values = {}
    for name, text in items:
        try:
            values[name] = float(text)
        except (TypeError, ValueError):
            continue
    if match.group(1) == "valid" and "num_updates" in values:  # as the simple format has it
        values = {f"valid_{name}": value for name, value in values.items()}
    return match.group(1), values
