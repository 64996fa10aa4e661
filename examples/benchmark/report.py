"""The results as Markdown."""

from __future__ import annotations


def markdown(results: dict) -> str:
    """Tables of the parts that were measured, after how they were, which parts of one command say once."""
    parts, before = [], None
    for name, function in (
        ("layer", layer),
        ("routers", routers),
        ("peers", peers),
        ("scaling", scaling),
        ("programs", programs),
    ):
        if name in results:
            made = results[name].get("made", results)  # files of older versions have one of all parts
            if made != before:
                parts.append(made_with(made["command"], made["machine"]))
            parts.append(function(results[name]))
            before = made
    return "\n\n".join(parts) + "\n"


def made_with(command: str, machine: dict) -> str:
    """How parts were measured."""
    text = "{cpu}, {cores} cores, {threads} threads, torch {torch}, Python {python}, load {load}; GPU: {gpu}"
    return f"Command: `{command}`\n\nMachine: " + text.format(**machine)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| {} |".format(" | ".join(line)) for line in lines)


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def layer(result: dict) -> str:
    """Part (a)."""
    head = ["case", "at most", "medians", "minima", "CPU time", "floor, ms", "MiB, layer / floor"]
    rows = [
        [
            row["case"],
            number(row["target"]),
            *(number(row["ratio"][key]) for key in ("median", "minimum", "cpu")),
            number(row["ms"]["floor"]["median"]),
            "{} / {}".format(*(number(row["mib"][key], "{:.0f}") for key in ("layer", "floor"))),
        ]
        for row in result["rows"]
    ]
    return "## The layer\n\n{}, {} repeats; times in units of the floor's\n\n{}".format(
        result["size"], result["repeats"], table(head, rows)
    )


def routers(result: dict) -> str:
    """What deciding costs."""
    rows = [
        [
            row["name"],
            *(number(row["share"][key], "{:.3f}") for key in ("median", "minimum", "cpu")),
            number(row["ms"]),
        ]
        for row in result["rows"]
    ]
    rows += [[name, error, "", "", ""] for name, error in result["errors"].items()]
    head = ["router", "medians", "minima", "CPU time", "ms"]
    return "## Routers\n\n{}\n\n{}".format(result["note"], table(head, rows))


def peers(result: dict) -> str:
    """Part (b)."""
    parts = ["## Other implementations\n\n" + result["note"]]
    for case in result["cases"]:
        head = [case["case"], "medians", "minima", "CPU time", "ms", "MiB"]
        rows = []
        for row in case["rows"]:
            if "error" in row:
                rows.append([row["name"], row["error"], "", "", "", ""])
                continue
            figures = [number(row["ratio"][key]) for key in ("median", "minimum", "cpu")]
            rows.append([row["name"], *figures, number(row["ms"], "{:.1f}"), number(row["mib"], "{:.0f}")])
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def scaling(result: dict) -> str:
    """Part (c)."""
    parts = ["## Scaling\n\n{}; milliseconds, minima; see scaling.svg".format(result["note"])]
    for series in result["series"]:
        head = [series["axis"], "layer", "floor", "ratio"]
        rows = [
            [str(x), number(a, "{:.1f}"), number(b, "{:.1f}"), number(a / b)]
            for x, a, b in zip(series["x"], series["layer"], series["floor"])
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def programs(result: dict) -> str:
    """Parts (d) and (e)."""
    head = [
        "program",
        "at least",
        "share of the dense model's speed",
        "best runs",
        "by CPU time",
        "dense",
        "unit",
    ]
    rows = [
        [
            row["name"],
            number(row["target"]),
            number(row["share"]["median"]),
            number(row["share"]["best"]),
            number(row["share"]["cpu"]),
            number(row["dense"], "{:.2f}"),
            row["unit"],
        ]
        for row in result["rows"]
    ]
    other = [[row["name"], number(row["seconds"]), number(row["target"])] for row in result["others"]]
    return "## Whole programs\n\n{}\n\n{}\n\n{}".format(
        result["note"], table(head, rows), table(["", "seconds", "at most"], other)
    )
