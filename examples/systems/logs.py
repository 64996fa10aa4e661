"""What the log of `fairseq-train` tells of a run."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """A validation.

    Attributes:
        update: after how many updates.
        seconds: of training until then.
        flops: of training until then.
        loss: on the validation set, in bits for each token.
    """

    update: int
    seconds: float
    flops: float
    loss: float


@dataclass(frozen=True)
class Run:
    """What a log tells.

    Attributes:
        curve: the validations.
        last: the last validation's statistics.
        parameters: of the model at the end.
        active_parameters: of those, how many a token uses on average, in the last validation.
        experts: of a token on average, in the last validation.
        seconds_per_update: the median.
        seconds: of all updates, without validation.
        flops: of all updates.
        drift: shares of tokens whose expert has changed, by the name that the log has for each.
        rises: of the training loss; see `_rises`.
    """

    curve: list[Point]
    last: dict[str, Any]
    parameters: int
    active_parameters: float
    experts: float
    seconds_per_update: float
    seconds: float
    flops: float
    drift: dict[str, float] = field(default_factory=dict)
    rises: list[list[float]] = field(default_factory=list)


def read(path: Path, validation: str, looked_up: int = 0) -> Run:
    """Read a log.

    The training FLOPs are 6 for each token and active parameter, as counted by `moe_active_params` while
    training (2 forward, 4 backward; embeddings that are shared with the output count once, as its product,
    and looking them up is free). Attention over positions and what a router does beyond its parameters are
    left out.

    Args:
        path: the log; where a run was interrupted, what it did again counts once.
        validation: the statistic of the validation that is the loss.
        looked_up: active parameters that are looked up and multiplied with nothing, which costs no FLOPs.

    Raises:
        ValueError: a log without a validation.
    """
    text = path.read_text(errors="replace")
    records = _records(text)
    valid = {int(r["valid_num_updates"]): r for r in records if r["tag"] == "valid"}
    if not valid:
        raise ValueError(f"{path} tells of no validation")
    parameters = _parameters(text)
    intervals = _intervals(records)
    clean = [seconds for seconds, undisturbed, _ in intervals.values() if undisturbed]
    median = statistics.median(clean or [seconds for seconds, _, _ in intervals.values()])

    curve, update, seconds, flops = [], 0, 0.0, 0.0
    for point in sorted({*intervals, *valid}):
        # a validation between two records: what is known of the interval that it is in
        key = min((u for u in intervals if u >= point), default=max(intervals))
        each, undisturbed, record = intervals[key]
        seconds += (point - update) * (each if undisturbed else median)
        tokens, active = record["wpb"], record.get("moe_active_params", parameters) - looked_up
        flops += (point - update) * 6 * tokens * active
        update = point
        if point in valid:
            curve.append(Point(point, seconds, flops, valid[point][validation]))
    last = valid[max(valid)]
    return Run(
        curve=curve,
        last=last,
        parameters=parameters,
        active_parameters=last.get("valid_moe_active_params", parameters),
        experts=last.get("valid_moe_experts", 1.0),
        seconds_per_update=median,
        seconds=seconds,
        flops=flops,
        drift=_drift(records),
        rises=_rises(records),
    )


def validated(path: Path) -> dict[str, Any]:
    """The last validation that a log tells of."""
    return [r for r in _records(path.read_text(errors="replace")) if r["tag"] == "valid"][-1]


def _records(text: str) -> list[dict[str, Any]]:
    """The JSON lines, each with its tag (`train_inner`, `valid`, ...), numbers as numbers."""
    found = []
    for tag, line in re.findall(r"^.* \| (\w+) \| (\{\".*\})$", text, flags=re.MULTILINE):
        found.append({"tag": tag, **{key: _number(value) for key, value in json.loads(line).items()}})
    return found


def _drift(records: list[dict[str, Any]]) -> dict[str, float]:
    """The last of each statistic of the routing's drift, whether it is of training or of validation."""
    found = {}
    for record in records:
        for name, value in record.items():
            name = name[len("valid_") :] if name.startswith("valid_") else name
            if name.startswith("moe_drift") and isinstance(value, float):
                found[name] = value
    return found


RISE, BEFORE = 0.02, 5
"""What counts as a rise: so much over the mean of so many intervals before."""


def _rises(records: list[dict[str, Any]]) -> list[list[float]]:
    """Update, and how far the training loss is over the mean of the five intervals before, as a share of it.

    Those of 2% and more, of which neighbours are one: the highest.
    """
    losses = [(r["num_updates"], r["loss"]) for r in records if r["tag"] == "train_inner" and "loss" in r]
    found: list[list[float]] = []
    last = -2
    for place in range(BEFORE, len(losses)):
        update, loss = losses[place]
        mean = statistics.mean(value for _, value in losses[place - BEFORE : place])
        if loss < (1 + RISE) * mean:
            continue
        rise = [update, round(loss / mean - 1, 4)]
        if last != place - 1:
            found.append(rise)
        elif rise[1] > found[-1][1]:
            found[-1] = rise
        last = place
    return found


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _intervals(records: list[dict[str, Any]]) -> dict[int, tuple[float, bool, dict[str, Any]]]:
    """By the last update of each interval: seconds for each update, whether undisturbed, and the record.

    fairseq's speed is disturbed in the first interval and in one with a validation.
    """
    found, undisturbed = {}, False
    for record in records:
        if record["tag"] == "train_inner":
            # of greater precision than the logged updates a second
            seconds = record["wpb"] / max(record["wps"], 1e-9)
            found[int(record["num_updates"])] = (seconds, undisturbed, record)
            undisturbed = True
        elif record["tag"] == "valid":
            undisturbed = False
    return found


def _parameters(text: str) -> int:
    """Number of parameters at the end; growing models tell of it when they grow."""
    built = re.findall(r"num\. shared model params: ([\d,]+)", text)
    spawned = re.findall(r"-> ([\d,]+) parameters", text)
    return int((spawned or built)[-1].replace(",", ""))


def bleu(path: Path) -> float:
    """BLEU in what `fairseq-generate` has printed."""
    return float(re.findall(r"BLEU\S* = ([\d.]+)", path.read_text(errors="replace"))[-1])
