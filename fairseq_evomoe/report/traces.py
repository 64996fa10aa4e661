"""What ``--moe-trace`` wrote beside the checkpoints: loads, drift and growth while the run was trained."""

import os
from typing import Any, Dict, List, Optional

from ..checkpoints import trace_file
from ..checkpoints.files import CommandError
from .loads import evenness

MOST = 200
"""Records of a long run that are kept, at even distances."""


def read(folder: str) -> Optional[Dict[str, Any]]:
    """What the file in a folder says, by layer; ``None``: there is none.

    Returns:
        ``update``, ``temperature`` and ``phase`` of each record; ``layers``: of each ``load`` (share of
        the tokens of each expert), ``evenness``, ``dropped`` (share of pairs), ``drift`` (share of
        a fixed batch's tokens that have another first choice than at the record before) and ``family``, see
        ``history.generation``.

    Raises:
        CommandError: a file that cannot be read.
    """
    path = os.path.join(folder, trace_file.NAME)  # of a folder "", too: where the command is called
    if not os.path.isfile(path):
        return None
    try:
        records = trace_file.read(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"{str(error).rstrip('.')}.") from error
    updates = [record for record in records if record["kind"] == "update"]
    changes = [record for record in records if record["kind"] == "experts"]
    if not updates:
        return None
    kept = _thinned(updates)
    names = records[0]["layers"]
    return {
        **{key: [record[key] for record in kept] for key in ("update", "temperature", "phase")},
        "layers": {name: _layer(name, kept, updates, changes) for name in names},
    }


def _thinned(records: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """All, or as many as are kept, the last one in any case."""
    step = -(-len(records) // MOST)
    return records[::-1][::step][::-1]


def _layer(
    name: str, kept: List[Dict[str, Any]], updates: List[Dict[str, Any]], changes: List[Dict[str, Any]]
) -> Dict[str, Any]:
    of_layer = [record["layers"][name] for record in kept]
    return {
        "load": [_shares(one) for one in of_layer],
        "evenness": [evenness(one["load"]) if one["tokens"] else None for one in of_layer],
        "dropped": [one["dropped"] / max(one["dropped"] + one["assignments"], 1) for one in of_layer],
        "drift": [(one["probe"] or {}).get("drift") for one in of_layer],
        "family": family(name, updates, changes),
    }


def _shares(layer: Dict[str, Any]) -> List[float]:
    return [round(load / max(layer["tokens"], 1), 5) for load in layer["load"]]


def family(name: str, updates: List[Dict[str, Any]], changes: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The experts of a layer from the first record on: a generation for each change, and one for the end.

    The loads are those of the last record before the next change, or even ones if there is none.
    """
    of_layer = [change for change in changes if name in change["layers"]]
    if not of_layer:
        return []
    first = of_layer[0]["layers"][name]
    starts = [updates[0]["update"], *(change["update"] for change in of_layer)]
    starts[0] = min(starts[0], starts[1])
    made: List[Dict[str, Any]] = [{"update": starts[0], "experts": max(first["parents"]) + 1}]
    for change in of_layer:
        parents = change["layers"][name]["parents"]
        found = {"parents": parents, "likeness": [1.0] * len(parents)}
        made.append({"update": change["update"], "experts": len(parents), **found})
    last = updates[-1]["update"]
    if last > made[-1]["update"]:
        same = list(range(made[-1]["experts"]))
        made.append({"update": last, "experts": len(same), "parents": same, "likeness": [1.0] * len(same)})
    ends = [*(one["update"] for one in made[1:]), last]
    for one, end in zip(made, ends):
        loads = [record["layers"][name] for record in updates if one["update"] <= record["update"] <= end]
        loads = [load for load in loads if len(load["load"]) == one["experts"]]
        one["load"] = _shares(loads[-1]) if loads else [1 / one["experts"]] * one["experts"]
    return made
