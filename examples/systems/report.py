"""The tables of all systems, as Markdown and CSV, and a plot of their curves, out of records alone."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from equivalence import Difference, compare
from labels import label_lines
from systems import System

Record = dict[str, Any]


@dataclass
class Row:
    """A system of the table.

    Attributes:
        system: the system.
        records: what came out of it, one for each seed.
        error: why there is nothing, or not more.
        missing: seeds that are asked for and have no record.
        older: whether a record was made with other code of the router.
    """

    system: System
    records: list[Record] = field(default_factory=list)
    error: str = ""
    missing: list[int] = field(default_factory=list)
    older: bool = False

    @property
    def perplexities(self) -> dict[int, float]:
        """By seed."""
        return {record["seed"]: record["perplexity"] for record in self.records}

    def mean(self, name: str) -> float:
        """Of a value of the records."""
        return statistics.mean(record[name] for record in self.records)

    @property
    def group(self) -> str:
        """Which systems it is beside, by what its experts are."""
        options = self.records[0]["options"]
        if self.system.dense:
            return "Dense"
        if self.system.dense_updates:
            return "Experts made of a dense model"
        if options["expert_activation"].endswith("glu"):
            return "Gated experts"
        if options["total_ffn_dim"] is not None:
            return "Narrow experts"
        one = self.mean("experts") < 1.1
        return "One expert a token" if one else "Several experts a token"


OLDER = " †"

GROUPS = (
    "One expert a token",
    "Several experts a token",
    "Gated experts",
    "Narrow experts",
    "Experts made of a dense model",
    "Dense",
)


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        heading: its name.
        text: a row's cell.
        value: a record's, for the CSV file.
    """

    heading: str
    text: Callable[[Row], str]
    value: Callable[[Record], Any] | None = None


def _number(heading: str, name: str, text: str, scale: float = 1) -> Column:
    """A column with the mean of a value."""
    return Column(heading, lambda row: text.format(row.mean(name) * scale), lambda r: r[name] * scale)


def _spread(values: list[float]) -> str:
    text = f"{statistics.mean(values):.2f}"
    return text + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def columns(rows: list[Row], reference: Row | None, times: dict[str, float]) -> list[Column]:
    """The columns after the system; those of what no record has are left out.

    Args:
        rows: with records.
        reference: what the others are compared with.
        times: seconds per update, by system.
    """
    found = [
        Column(
            "validation perplexity",
            lambda row: _spread(list(row.perplexities.values())),
            lambda r: r["perplexity"],
        ),
        Column("seeds", lambda row: str(len(row.records))),
    ]
    if any("bleu" in row.records[0] for row in rows):
        found.insert(0, Column("test BLEU", lambda row: _spread([r["bleu"] for r in row.records]), _bleu))
    if reference is not None:
        found += [
            Column(f"against `{reference.system.id}`", lambda row: str(_against(row, reference) or "")),
            Column("within 1%?", lambda row: getattr(_against(row, reference), "verdict", "")),
        ]
    found += [
        _number("experts per token", "experts", "{:.2f}"),
        _number("active parameters", "active_parameters", "{:,.0f}"),
        _number("parameters", "parameters", "{:,.0f}"),
        _number("training FLOPs, 1e12", "flops", "{:.3g}", 1e-12),
    ]
    names = sorted({name for row in rows for record in row.records for name in record["drift"]})
    found += [
        Column(name, lambda row, n=name: _drift(row, n), lambda r, n=name: r["drift"].get(n, ""))
        for name in names
    ]
    if times:
        found.append(
            Column(
                "seconds per update",
                lambda row: f"{times[row.system.id]:.4f}" if row.system.id in times else "",
                lambda r: times.get(r["system"], ""),
            )
        )
    return found


def _bleu(record: Record) -> float:
    return record["bleu"]


def _drift(row: Row, name: str) -> str:
    values = [record["drift"][name] for record in row.records if name in record["drift"]]
    return f"{statistics.mean(values):.3f}" if values else ""


def _against(row: Row, reference: Row) -> Difference | None:
    return None if row is reference else compare(row.perplexities, reference.perplexities)


def markdown(rows: list[Row], reference: str, times: dict[str, float]) -> str:
    """The tables: one for each kind of experts, best first, with the dense models of the same sizes.

    Args:
        rows: the systems.
        reference: name of that which the others are compared with.
        times: seconds per update, by system.
    """
    known = [row for row in rows if row.records]
    compared = next((row for row in known if row.system.id == reference), None)
    shown = columns(known, compared, times)
    dense = [row for row in known if row.system.dense]
    parts = []
    for group in GROUPS:
        members = [row for row in known if row.group == group]
        if members:
            beside = [] if group == "Dense" else _matched(members, dense)
            parts.append(f"**{group}**\n\n{_table(members, beside, shown)}")
    others = [f"- {_label(row.system)}: {_escape(row.error)}" for row in rows if row.error]
    missing: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        if row.missing and not row.error:
            missing.setdefault(tuple(row.missing), []).append(f"`{row.system.id}`")
    if others:
        parts.append("\n".join(others) + "\n")
    if missing:
        runnable = sum(not row.error for row in rows)
        lines = ["| not trained yet | systems |", "|---|---|"]
        for seeds, names in sorted(missing.items()):
            listed = "all" if len(names) == runnable > 1 else ", ".join(names)
            lines.append(f"| {_seeds(seeds)} | {listed} |")
        parts.append("\n".join(lines) + "\n")
    if any(row.older for row in known):
        parts.append(f"{OLDER.strip()} The code of its router has changed since.\n")
    if known:
        parts.append(provenance([record for row in known for record in row.records]) + "\n")
    return "\n".join(parts)


def _table(members: list[Row], dense: list[tuple[Row, str]], shown: list[Column]) -> str:
    """One table; the best is bold if it is better than the next and not level with it."""
    members = sorted(members, key=lambda row: row.mean("perplexity"))
    beside = [(row, "") for row in members] + dense
    beside.sort(key=lambda pair: pair[0].mean("perplexity"))
    lines = ["| system | " + " | ".join(column.heading for column in shown) + " |"]
    lines.append("|---" * (len(shown) + 1) + "|")
    first = [row for row, _ in beside[:2]]
    wins = (
        len(first) == 2
        and (d := compare(first[0].perplexities, first[1].perplexities))
        and d.verdict == "better"
    )
    for i, (row, why) in enumerate(beside):
        label = _label(row.system) + OLDER * row.older + why
        cells = [column.text(row) for column in shown]
        lines.append(f"| {f'**{label}**' if wins and i == 0 else label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _matched(members: list[Row], dense: list[Row]) -> list[tuple[Row, str]]:
    """The dense models that are nearest to a group in active and in all parameters, each with what it is."""
    found: dict[str, tuple[Row, list[str]]] = {}
    for name, what in (("active_parameters", "active parameters"), ("parameters", "parameters in all")):
        wanted = statistics.median(row.mean(name) for row in members)
        if dense:
            nearest = min(dense, key=lambda row: abs(row.mean("parameters") - wanted))
            found.setdefault(nearest.system.id, (nearest, []))[1].append(what)
    return [(row, f", nearest in {' and '.join(why)}") for row, why in found.values()]


def provenance(records: list[Record]) -> str:
    """What some records were made with, in a sentence."""
    versions = sorted({tuple(sorted(record["versions"].items())) for record in records})
    with_ = "; ".join(", ".join(f"{name} {version}" for name, version in each) for each in versions)
    commits, processors = (sorted({record[key] for record in records}) for key in ("commit", "processor"))
    seeds = sorted({record["seed"] for record in records})
    number = "1 run" if len(records) == 1 else f"{len(records)} runs"
    return (
        f"{number}, {_seeds(seeds)}. Made with {with_}; commits {', '.join(commits)}; "
        f"processor {', '.join(processors)}."
    )


def _seeds(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))


def _label(system: System) -> str:
    return f"{system.name} (`{system.id}`)"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_csv(path: Path, rows: list[Row], times: dict[str, float]) -> None:
    """A row for each system and seed, unrounded."""
    known = [row for row in rows if row.records]
    shown = [column for column in columns(known, None, times) if column.value is not None]
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        headings = [column.heading for column in shown]
        out.writerow(["system", "name", "paper", "seed", *headings, "peak memory, MiB", "error"])
        for row in rows:
            about = [row.system.id, row.system.name, row.system.paper]
            for record in row.records:
                values = [column.value(record) for column in shown]
                out.writerow([*about, record["seed"], *values, record["peak_mib"], ""])
            if row.error:
                out.writerow([*about, "", *([""] * (len(shown) + 1)), row.error])


def plot(path: Path, rows: list[Row]) -> None:
    """Validation loss against updates and FLOPs; of several seeds the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "systems", "font.size": 8})
    firsts = [(row.system, row.records[0]["curve"]) for row in rows if row.records]
    if not firsts:
        return
    firsts.sort(key=lambda pair: pair[1][-1][2])
    height = max(5, 0.16 * len(firsts))  # which has room for all names
    figure, axes = pyplot.subplots(1, 2, figsize=(11, height), sharey=True)
    colours = pyplot.get_cmap("tab10").colors
    for i, (system, curve) in enumerate(firsts):
        style = {"color": colours[i % 10], "linestyle": ("-", "--", ":", "-.")[i // 10 % 4], "linewidth": 1}
        if system.dense:
            style = {"color": "black", "linewidth": 1 + system.width / 3}
        for axis, place in zip(axes, (1, 0)):
            axis.plot(
                [point[place] for point in curve], [point[2] for point in curve], label=system.id, **style
            )
    for axis, label in zip(axes, ("training FLOPs", "updates")):
        axis.set_xlabel(label)
        axis.grid(linewidth=0.3)
    lowest = firsts[0][1][-1][2]
    seconds = [curve[min(1, len(curve) - 1)][2] for _, curve in firsts]
    if max(seconds) > lowest:  # the first validations are so high that they would hide the rest
        axes[0].set_ylim(lowest - 0.05 * (max(seconds) - lowest), max(seconds))
    axes[0].set_ylabel("validation loss, bits per token")
    label_lines(axes[-1])
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
