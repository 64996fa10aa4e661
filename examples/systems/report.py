"""One table of all systems, as Markdown and CSV, and one plot of their curves."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from logs import Point, Run
from systems import System


@dataclass(frozen=True)
class Result:
    """What came out of one system with one seed.

    Attributes:
        system: the system.
        seed: the seed.
        error: why there is nothing else.
        run: the training run.
        before: the dense run that it was made of.
        peak_mib: largest memory of the process.
        bleu: on the test set, for translation.
    """

    system: System
    seed: int
    error: str = ""
    run: Run | None = None
    before: Run | None = None
    peak_mib: int = 0
    bleu: float | None = None

    @property
    def curve(self) -> list[Point]:
        """The validations, those of the dense run first."""
        if self.before is None:
            return self.run.curve
        update, seconds, flops = self.before.curve[-1].update, self.before.seconds, self.before.flops
        return self.before.curve + [
            Point(p.update + update, p.seconds + seconds, p.flops + flops, p.loss) for p in self.run.curve
        ]

    @property
    def flops(self) -> float:
        """FLOPs of training."""
        return self.curve[-1].flops


# heading, format, value
COLUMNS: list[tuple[str, str, Callable[[Result], float]]] = [
    ("validation perplexity", "{:.2f}", lambda r: float(r.run.last["valid_ppl"])),
    ("experts per token", "{:.2f}", lambda r: r.run.experts),
    ("active parameters", "{:,.0f}", lambda r: r.run.active_parameters),
    ("parameters", "{:,.0f}", lambda r: r.run.parameters),
    ("seconds per update", "{:.3f}", lambda r: r.run.seconds_per_update),
    ("peak memory, MiB", "{:,.0f}", lambda r: r.peak_mib),
    ("training FLOPs, 1e12", "{:.3g}", lambda r: r.flops / 1e12),
]
BLEU = ("test BLEU", "{:.2f}", lambda r: r.bleu)


def columns(metric: str) -> list[tuple[str, str, Callable[[Result], float]]]:
    """The columns after the system, the one to compare by first."""
    return ([BLEU] if metric == "BLEU" else []) + COLUMNS


def markdown(results: list[Result], metric: str) -> str:
    """The table: a row for each system, means over the seeds, best first; then what there is no result of."""
    shown = columns(metric)
    lines = ["| system | " + " | ".join(heading for heading, _, _ in shown) + " |"]
    lines.append("|---" * (len(shown) + 1) + "|")
    value = shown[0][2]
    better = -1 if metric == "BLEU" else 1
    finished = [group for group in _by_system(results) if not _error(group)]
    for group in sorted(finished, key=lambda g: better * statistics.mean(map(value, g))):
        cells = [_cell(group, text, get, i == 0) for i, (_, text, get) in enumerate(shown)]
        lines.append(f"| {_label(group[0].system)} | " + " | ".join(cells) + " |")
    for group in _by_system(results):
        if _error(group):
            lines.append(
                f"| {_label(group[0].system)} | {_escape(_error(group))} |" + " |" * (len(shown) - 1)
            )
    return "\n".join(lines) + "\n"


def _by_system(results: list[Result]) -> list[list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.system.id, []).append(result)
    return list(groups.values())


def _error(group: list[Result]) -> str:
    return next((result.error for result in group if result.error), "")


def _label(system: System) -> str:
    return f"{system.name} (`{system.id}`)"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _cell(group: list[Result], text: str, get: Callable[[Result], float], spread: bool) -> str:
    values = [get(result) for result in group]
    cell = text.format(statistics.mean(values))
    if spread and len(values) > 1:
        cell += " ± " + text.format(statistics.stdev(values))
    return cell


def write_csv(path: Path, results: list[Result], metric: str) -> None:
    """A row for each system and seed, unrounded."""
    shown = columns(metric)
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["system", "name", "paper", "seed", *(heading for heading, _, _ in shown), "error"])
        for r in results:
            values = [""] * len(shown) if r.error else [get(r) for _, _, get in shown]
            out.writerow([r.system.id, r.system.name, r.system.paper, r.seed, *values, r.error])


def plot(path: Path, results: list[Result]) -> None:
    """Validation loss against updates, seconds and FLOPs; of several seeds the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "systems", "font.size": 8})
    firsts = [group[0] for group in _by_system(results) if not _error(group)]
    if not firsts:
        return
    firsts.sort(key=lambda r: r.curve[-1].loss)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.5), sharey=True)
    colours = pyplot.get_cmap("tab10").colors
    for i, result in enumerate(firsts):
        style = {"color": colours[i % 10], "linestyle": ("-", "--", ":")[i // 10 % 3], "linewidth": 1}
        if result.system.dense:
            style = {"color": "black", "linewidth": 2}
        losses = [point.loss for point in result.curve]
        for axis, name in zip(axes, ("update", "seconds", "flops")):
            axis.plot([getattr(p, name) for p in result.curve], losses, label=result.system.id, **style)
    for axis, label in zip(axes, ("updates", "seconds of training", "training FLOPs")):
        axis.set_xlabel(label)
        axis.grid(linewidth=0.3)
    lowest = firsts[0].curve[-1].loss
    seconds = [r.curve[min(1, len(r.curve) - 1)].loss for r in firsts]
    if max(seconds) > lowest:  # the first validations are so high that they would hide the rest
        axes[0].set_ylim(lowest - 0.05 * (max(seconds) - lowest), max(seconds))
    axes[0].set_ylabel("validation loss, bits per token")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
