"""The results: one JSON line for each run, in a folder for each version of the protocol."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "systems"))

import json_lines


def read(folder: Path) -> dict[str, dict]:
    """What is in the results, of any version of the protocol, by the key of its run."""
    paths = sorted(folder.glob("*/*.jsonl"))
    return {record["key"]: record for path in paths for record in json_lines.read(path)}


def read_speed(folder: Path) -> dict[str, dict[str, dict[int, float]]]:
    """What `speed.py` has timed: seconds an update, by task, label and round."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in json_lines.read(path):
            of_task = found.setdefault(path.stem, {})
            of_task.setdefault(line["label"], {})[line["round"]] = line["seconds_per_update"]
    return found


def read_gap(folder: Path) -> dict[str, list[dict]]:
    """What `gap.py` has found: the points of each system in the order of their updates."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in json_lines.read(path):
            found.setdefault(line["label"], []).append(line)
    return {label: sorted(points, key=lambda point: point["update"]) for label, points in found.items()}


def read_steps(folder: Path) -> dict[str, dict[int, dict]]:
    """What `stage_times.py` has timed: by experiment and number of experts, the last line of each."""
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in json_lines.read(path):
            found.setdefault(line["experiment"], {})[line["experts"]] = line
    return found


def differences(known: dict[str, dict], again: dict[str, dict]) -> list[str]:
    """What is not equal in the runs that two folders of results have in common, or that there are none.

    The loss is left out, but not the chunks whose sum it is: Python 3.12 adds floats up more exactly.
    """
    common = known.keys() & again.keys()
    if not common:
        return ["no run is in both"]
    wrong = []
    for key in sorted(common):
        one, other = (
            ({**r["test"], "loss": None}, [[p[0], p[2], p[3]] for p in r["curve"]])
            for r in (known[key], again[key])
        )
        wrong += [f"{key}: other numbers"] if one != other else []
    return wrong
