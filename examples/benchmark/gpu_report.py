"""The figures of `gpu.py` as Markdown."""

from __future__ import annotations

from typing import Any, Iterator

Known = dict[str, dict[str, Any]]
ONE_TOKEN = "layer, one token, E = 64, with its gate"
MEMORY = 1.20
"""At most so many times the memory that the floor needs beyond its inputs and weights."""
KINDS = {
    "layer": ["layer", "one function", "looked up", "before", "no biases", "products"],
    "routers": ["router", "in training", "on device", "compiled", "captured"],
}


def report(known: Known) -> str:
    """What is known as Markdown."""
    lines = ["# Measured on a GPU", ""]
    info = known.get("machine", {}).get("machine")
    if info:
        lines += ["{gpu}, torch {torch}, Python {python}, {cores} cores".format(**info), ""]
    lines += [*_targets(known), *_layers_and_routers(known), *_router_sizes(known)]
    return "\n".join([*lines, *_peers(known), *_profiles(known)])


def _table(title: str, text: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """A section; columns but for the first are numbers."""
    if not rows:
        return []
    lines = [title, ""] + ([text, ""] if text else [])
    lines += ["| {} |".format(" | ".join(header)), "| --- |" + " --: |" * (len(header) - 1)]
    return [*lines, *("| {} |".format(" | ".join(row)) for row in rows), ""]


def _title(key: str) -> str:
    return key.split(", ", 1)[1]


def _in_floors(row: dict[str, Any], name: str) -> float:
    """A time, behind others that wait on a GPU, in units of the floor's."""
    times = row.get("queued_ms", row["ms"])
    return times[name] / times["floor"]


def _memory(row: dict[str, Any]) -> float | None:
    """The layer's memory in units of the floor's."""
    layer, floor = (row["mib"].get(name) for name in ("layer", "floor"))
    return layer / floor if layer is not None and floor else None


def _measured(known: Known, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and figures of what has a target and could run."""
    for key, row in known.items():
        if row["part"] == part and "error" not in row:
            yield key, row


def _targets(known: Known) -> list[str]:
    """Each target, what was measured, and whether it is met."""
    rows = []

    def add(case: str, most: float, found: float) -> None:
        rows.append([case, f"{most:.2f}", f"{found:.2f}", "met" if found <= most else "**missed**"])

    layers = [(key, row) for key, row in _measured(known, "layer") if _is_target(key)]
    for key, row in layers:
        add(_title(key), row["target"], _in_floors(row, "layer"))
    memory = {key: _memory(row) for key, row in layers if key != ONE_TOKEN and "update" not in key}
    most = max((share for share in memory.values() if share is not None), default=None)
    if most is not None:
        add("memory, of the floor's, the most of them", MEMORY, most)
    for key, row in _measured(known, "routers"):
        if key.startswith("router, "):
            way = "in training" if "in training" in row["ms"] else "router"
            add(key, row["target"], _in_floors(row, way))
    for row in _peer_rows(known):
        rows.append(
            [row["case"], "1.00", f"{row['ours']:.2f}", "ahead" if row["ours"] <= 1 else "**behind**"]
        )
    text = "In units of the floor, queued behind others; peers: our time in units of the best of theirs."
    return _table("## Targets", text, ["case", "at most", "measured", ""], rows)


def _is_target(key: str) -> bool:
    """Whether the case is one of the table of targets: the middle number of tokens, bfloat16."""
    return key.startswith(("layer, T = 16384", "layer, T = 64,", "layer, whole")) or key == ONE_TOKEN


def _peer_rows(known: Known) -> Iterator[dict[str, Any]]:
    for key, row in _measured(known, "peers"):
        ours, *others = row["rows"]
        ms = [
            r["ms"]
            for r in others
            if "error" not in r and "bare" not in r["name"] and "evomoe" not in r["name"]
        ]
        if "error" not in ours and ms:
            yield {"case": key, "ours": ours["ms"] / min(ms)}


def _layers_and_routers(known: Known) -> list[str]:
    lines = []
    for part, names in KINDS.items():
        rows = [line for line in known.values() if line["part"] == part]
        names = [name for name in names if any(name in line.get("ratio", {}) for line in rows)]
        header = ["case", "at most", *names, "floor, ms", "memory"]
        text = (
            "In units of the floor: queued behind others, and (in brackets) alone. Memory: the layer's, too."
        )
        lines += _table(f"## {part.capitalize()}", text, header, [_cells(row, names) for row in rows])
    return lines


def _cells(row: dict[str, Any], names: list[str]) -> list[str]:
    if "error" in row:
        return [_title(row["key"]), "", row["error"], *[""] * (len(names) + 1)]
    cells = [_title(row["key"]), "{:.2f}".format(row["target"])]
    for name in names:
        alone = row["ratio"].get(name, {}).get("median")
        cells.append("-" if alone is None else f"{_in_floors(row, name):.2f} ({alone:.2f})")
    floor, memory = row.get("queued_ms", row["ms"])["floor"] / row.get("calls", 1), _memory(row)
    return [*cells, f"{floor:.3f}", "-" if memory is None else f"{memory:.2f}"]


def _router_sizes(known: Known) -> list[str]:
    """All routers in training by dtype and number of tokens, in units of the floor."""
    columns = dict(_measured(known, "router sizes"))
    names = list(dict.fromkeys(name for row in columns.values() for name in row["ms"] if name != "floor"))
    rows = [
        [name, *(f"{_in_floors(row, name):.2f}" if name in row["ms"] else "-" for row in columns.values())]
        for name in names
    ]
    header = ["router, in training", *(_title(key) for key in columns)]
    return _table("## Routers by size", "In units of the floor.", header, rows)


def _peers(known: Known) -> list[str]:
    lines = []
    for row in (line for line in known.values() if line["part"] == "peers"):
        title = f"### {row['key']}"
        if "error" in row:
            lines += [title, "", row["error"], ""]
            continue
        cells = []
        for r in row["rows"]:
            if "error" in r:
                cells.append([r["name"], r["error"], "", ""])
            else:
                mib = "-" if r["mib"] is None else f"{r['mib']:.0f}"
                cells.append([r["name"], f"{r['ratio']['median']:.2f}", f"{r['ms']:.2f}", mib])
        lines += _table(title, "", ["", "times ours", "ms", "MiB"], cells)
    return lines


def _profiles(known: Known) -> list[str]:
    profiles = [row for _, row in _measured(known, "profile")]
    for line in known.values():  # those of a whole update are with its times
        for name, found in line.get("profiles", {}).items():
            profiles.append({**found, "key": "{}: {}".format(line["key"], name)})
    rows = []
    for row in profiles:
        most = "; ".join(f"{name[:40]} {us:.0f} us" for name, _, us in row["kernels"][:4])
        times = [f"{row[name]:.0f}" for name in ("launches", "busy_us", "span_us")]
        rows.append([_title(row["key"]), *times, most.replace("|", "/")])
    return _table("## Profiles", "", ["", "launches", "busy, us", "of, us", "most of it"], rows)
