"""Plots of the results as small SVGs."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "systems"))
matplotlib.use("Agg")

from bootstrap import difference
from labels import label_lines
from matplotlib import pyplot
from protocol import TASKS, Experiment, Task
from tables import Records, comparable, mean_curve, of_variant, score

matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quality", "font.size": 8})


def plot(experiment: Experiment, known: dict[str, dict], folder: Path) -> None:
    """One file for each task that there are results of."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in (TASKS[name] for name in experiment.tasks):
        found = {
            variant.label: records
            for variant in experiment.variants
            if (records := of_variant(variant, task, known))
        }
        if len(found) < experiment.least:
            continue
        draw = _curves if experiment.compares_systems else _dots
        figure = draw(experiment, task, found)
        figure.savefig(
            folder / f"{experiment.id}-{task.id}.svg", bbox_inches="tight", metadata={"Date": None}
        )
        pyplot.close(figure)


def plot_gap(found: dict[str, list[dict]], folder: Path) -> None:
    """Validation loss through a run, a panel for each system and a curve for each way to route."""
    if not found:
        return
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(4 * len(found), 3), sharey=True, squeeze=False, layout="constrained"
    )
    ways = {"training": "as trained", "adaptive": "adaptive", "top1": "top-1"}
    for axis, (label, points) in zip(axes[0], found.items()):
        for way, name in ways.items():
            updates = [point["update"] for point in points]
            axis.plot(updates, [point[way]["loss"] for point in points], ".-", label=name, linewidth=1)
        axis.set_title(label)
        axis.set_xlabel("updates")
        axis.grid(linewidth=0.3)
    axes[0][0].set_ylabel("validation loss, bits per token")
    label_lines(axes[0][-1])
    figure.savefig(folder / "gap.svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _curves(experiment: Experiment, task: Task, found: dict[str, Records]) -> pyplot.Figure:
    """The test set's differences, and validation loss against FLOPs, seconds and updates."""
    figure, (first, *curves) = pyplot.subplots(1, 4, figsize=(16, 4), width_ratios=[1.2, 1, 1, 1])
    colours = pyplot.get_cmap("tab10").colors
    styles = {}
    for i, (label, records) in enumerate(found.items()):
        style = {"color": colours[i % 10], "linestyle": ("-", "--", ":")[i // 10 % 3], "linewidth": 1}
        if label.startswith("EvoMoE"):
            style["linewidth"] = 2
        styles[label] = style
        curve = mean_curve(records)
        for axis, column in zip(curves, (2, 1, 0)):
            axis.plot([point[column] for point in curve], [point[3] for point in curve], label=label, **style)
    for axis, name in zip(curves, ("training FLOPs", "seconds of training", "updates")):
        axis.set_xlabel(name)
        axis.grid(linewidth=0.3)
    lowest = min(mean_curve(records)[-1][3] for records in found.values())
    second = max(mean_curve(records)[1][3] for records in found.values())
    for axis in curves:
        axis.set_ylim(lowest - 0.05 * (second - lowest), second)
    curves[0].set_ylabel("validation loss, bits per token")
    label_lines(curves[-1])
    _differences(first, task, found, experiment.compared(task).label, styles)
    return figure


def _differences(axis, task: Task, found: dict[str, Records], reference: str, styles: dict) -> None:
    """What each system has more than the reference on the test set, with intervals."""
    reference = reference if reference in found else next(iter(found))
    order = sorted(found, key=lambda label: sum(map(score, found[label])) / len(found[label]))
    for row, label in enumerate(order):
        if label == reference or not comparable(found[label], found[reference]):
            continue
        d = difference(found[label], found[reference])
        scale = 1 if task.translates else 100
        axis.plot([scale * d.low, scale * d.high], [row, row], color=styles[label]["color"])
        axis.plot([scale * d.mean], [row], "o", color=styles[label]["color"], markersize=4)
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_yticks(range(len(order)), order)
    for text, label in zip(axis.get_yticklabels(), order):
        text.set_color(styles[label]["color"])
    unit = "BLEU" if task.translates else "perplexity, %"
    axis.set_xlabel(f"test {unit}, against {reference}")
    axis.grid(linewidth=0.3, axis="x")


def _dots(experiment: Experiment, task: Task, found: dict[str, Records]) -> pyplot.Figure:
    """Validation perplexity of each variant: a dot for each seed, a line through their mean."""
    figure, axis = pyplot.subplots(figsize=(4.5, 0.6 + 0.25 * len(found)))
    labels = list(found)
    for row, label in enumerate(labels):
        values = [2 ** record["valid_loss"] for record in found[label]]
        axis.plot(values, [row] * len(values), "o", color="tab:blue", markersize=4, alpha=0.7)
        axis.plot([sum(values) / len(values)], [row], "|", color="black", markersize=10)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("validation perplexity")
    axis.grid(linewidth=0.3, axis="x")
    axis.set_title(f"{experiment.title}, {task.title}")
    return figure
