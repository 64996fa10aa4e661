"""The tables of the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from bootstrap import Difference, difference
from protocol import SEEDS, TASKS, Experiment, Task, Variant

Records = list[dict]


def of_variant(variant: Variant, task: Task, known: dict[str, dict]) -> Records:
    """What is known of a variant, one record for each seed."""
    keys = [variant.run(task, seed).key for seed in SEEDS]
    return [known[key] for key in keys if key in known]


def perplexity(bits: float) -> float:
    """Of a loss in bits for each token."""
    return 2**bits


def score(record: dict) -> float:
    """What a run is compared by on the test set."""
    test = record["test"]
    return test["bleu"] if "bleu" in test else perplexity(test["loss"])


def mean(of: Callable[[dict], float], found: Records) -> float:
    """The mean over seeds."""
    return statistics.mean(map(of, found))


def spread(of: Callable[[dict], float], found: Records) -> str:
    """Mean and standard deviation over seeds."""
    text = f"{mean(of, found):.2f}"
    return text + (f" ± {statistics.stdev(map(of, found)):.2f}" if len(found) > 1 else "")


def active_parameters(record: dict) -> float:
    """Parameters that are multiplied with a token of the test set, on average."""
    return record["test"].get("moe_active_params", record["parameters"]) - record["looked_up_parameters"]


def tested(name: str, found: Records) -> str:
    """The mean of a statistic on the test set; nothing where there is none."""
    return f"{mean(lambda r: r['test'][name], found):.2f}" if name in found[0]["test"] else ""


def comparable(ours: Records, theirs: Records) -> bool:
    """Whether two rows have a seed in common."""
    return not {record["seed"] for record in ours}.isdisjoint(record["seed"] for record in theirs)


def compared(ours: Records, theirs: Records) -> str:
    """The paired difference with its interval, bold where one is better; nothing if no seed is common."""
    if not comparable(ours, theirs):
        return ""
    return in_percent(difference(ours, theirs), points="bleu" in ours[0]["test"])


def in_percent(found: Difference, points: bool = False) -> str:
    """A difference with its interval, in percent or in points; see ``Difference.decides``."""
    scale, unit = (1, "") if points else (100, "%")
    text = f"{scale * found.mean:+.2f}{unit} [{scale * found.low:+.2f}, {scale * found.high:+.2f}]"
    return f"**{text}**" if found.decides else text


def reaches(found: Records, target: float, axis: int) -> float | None:
    """Where on an axis of its curve (0 updates, 1 seconds, 2 FLOPs) a system reaches a validation loss.

    The mean curve of the seeds, between validations interpolated linearly; the first validation, if it is
    there by then; `None`: never.
    """
    curve = mean_curve(found)
    if curve[0][3] <= target:
        return curve[0][axis]
    for before, after in zip(curve, curve[1:]):
        if after[3] <= target:
            part = (before[3] - target) / (before[3] - after[3])
            return before[axis] + part * (after[axis] - before[axis])
    return None


def shares(found: Records, switch: Records, axis: int) -> tuple[float | None, float | None] | None:
    """Where a system reaches what Switch ends with, and as a share of where that is.

    Returns:
        two times `None`: never; `None`: they have no seed in common.
    """
    ends = {record["seed"]: record for record in switch}
    found = [record for record in found if record["seed"] in ends]
    if not found:
        return None
    end = mean_curve([ends[record["seed"]] for record in found])[-1]
    value = reaches(found, end[3], axis)
    return (None, None) if value is None else (value, value / end[axis])


def mean_curve(found: Records) -> list[list[float]]:
    """Update, seconds, FLOPs and validation loss in bits at each validation, means over seeds."""
    return [
        [statistics.mean(values) for values in zip(*points)]
        for points in zip(*(record["curve"] for record in found))
    ]


def systems_table(experiment: Experiment, task: Task, known: dict[str, dict]) -> str:
    """One row for each system, best first."""
    ours = of_variant(experiment.compared(task), task, known)
    heads = ["system", f"test {task.metric}", "ours against it", "valid perplexity", "seeds"]
    heads += ["experts a token", "active parameters", "parameters", "load entropy", "largest load"]
    heads += ["seconds/update", "TFLOPs", "MiB"]
    rows = []
    for variant in experiment.variants:
        found = of_variant(variant, task, known)
        if not found:
            continue
        test = found[0]["test"]
        cells = [variant.label, spread(score, found)]
        cells.append(compared(ours, found) if ours != found else "")
        cells.append(f"{mean(lambda r: perplexity(r['valid_loss']), found):.2f}")
        cells.append(str(len(found)))
        cells.append(f"{test.get('moe_experts', 1):.2f}")
        cells.append(f"{mean(active_parameters, found):,.0f}")
        cells.append(f"{found[0]['parameters']:,}")
        cells.append(tested("moe_load_entropy", found))
        cells.append(tested("moe_load_max", found))
        cells.append(f"{mean(lambda r: r['seconds_per_update'], found):.3f}")
        cells.append(f"{mean(lambda r: r['flops'], found) / 1e12:.2f}")
        cells.append(f"{max(r['peak_mib'] for r in found):,}")
        rows.append((mean(score, found), cells))
    rows.sort(key=lambda row: row[0], reverse=task.translates)
    return table(heads, [cells for _, cells in rows])


def reach_table(experiment: Experiment, task: Task, known: dict[str, dict]) -> str:
    """When each system reaches what Switch has at its end."""
    by_label = {v.label: of_variant(v, task, known) for v in experiment.variants}
    rows = []
    for label, found in by_label.items():
        reached = [shares(found, by_label.get("Switch", []), axis) for axis in (0, 1, 2)]
        if None in reached:
            continue
        cells = [label]
        for (value, share), text in zip(reached, ("{:.0f} ({:.2f})", "{:.0f} ({:.2f})", "{:.2e} ({:.2f})")):
            cells.append("never" if value is None else text.format(value, share))
        rows.append(cells)
    if not rows:
        return ""
    return table(["system", "updates", "seconds", "FLOPs"], rows)


def ablation_table(experiment: Experiment, task: Task, known: dict[str, dict]) -> str:
    """One row for each variant, in the order of the protocol."""
    reference = of_variant(experiment.compared(task), task, known)
    rows = []
    for variant in experiment.variants:
        found = of_variant(variant, task, known)
        if not found:
            continue
        same = [r for r in reference if r["seed"] in {f["seed"] for f in found}]
        cells = [variant.label, spread(lambda r: perplexity(r["valid_loss"]), found), str(len(found))]
        cells.append(compared(found, same) if same and found[0]["key"] != same[0]["key"] else "")
        cells.append(f"{found[0]['test'].get('moe_experts', 1):.2f}")
        adaptive = [r for r in found if "adaptive" in r]
        cells.append(
            f"{mean(lambda r: perplexity(r['adaptive']['loss']), adaptive):.2f} "
            f"({mean(lambda r: r['adaptive']['moe_experts'], adaptive):.2f})"
            if adaptive
            else ""
        )
        cells.append(f"{found[0]['test'].get('moe_load_max', 1):.2f}")
        cells.append(f"{mean(lambda r: r['flops'], found) / 1e12:.2f}")
        rows.append(cells)
    heads = ["variant", "valid perplexity", "seeds", "test, against the first row marked", "experts a token"]
    heads[3] = f"test, against {experiment.compared(task).label}"
    heads += ["adaptive: test perplexity (experts)", "largest load", "TFLOPs"]
    return table(heads, rows) if rows else ""


def speed_table(
    found: dict[str, dict[str, dict[int, float]]], experiment: Experiment, known: dict[str, dict]
) -> str:
    """Seconds an update of each system, as `speed.py` has timed them side by side.

    Args:
        found: by task, label and round; see `records.read_speed`.
        experiment: the systems.
        known: the results, which tell how many updates each needs for what Switch ends with.
    """
    parts = []
    for task, systems in found.items():
        of = {v.label: of_variant(v, TASKS[task], known) for v in experiment.variants}
        rows = []
        for label, seconds in systems.items():
            ratios = [seconds[i] / systems["Switch"][i] for i in seconds if i in systems.get("Switch", {})]
            ratio = statistics.median(ratios) if ratios else math.nan
            text = f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
            reached = ""
            if (found_at := shares(of[label], of["Switch"], 0)) is not None:
                reached = "never" if found_at[1] is None else f"{found_at[1] * ratio:.2f}"
            median = statistics.median(seconds.values())
            cells = [label, f"{median:.4f}", text, reached, str(len(seconds))]
            rows.append((ratio, median, cells))
        cells = [row[-1] for row in sorted(rows)]
        heads = ["system", "seconds an update", "against Switch in the same round"]
        heads += ["time to where Switch ends, as a share of its own", "rounds"]
        parts.append(f"{TASKS[task].title}:\n\n{table(heads, cells)}")
    return "\n".join(parts)


def gap_table(found: dict[str, list[dict]]) -> str:
    """Valid perplexity with the routing of training, adaptive routing and top-1, through a run.

    Args:
        found: by label; see `records.read_gap`.
    """
    if not found:
        return ""
    by_update = {label: {point["update"]: point for point in points} for label, points in found.items()}
    rows = []
    for update in sorted(set().union(*by_update.values())):
        cells = [str(update)]
        for points in by_update.values():
            point = points.get(update)
            ways = [point[way] for way in ("training", "adaptive", "top1")] if point else []
            text = " / ".join(f"{perplexity(way['loss']):.1f}" for way in ways)
            cells.append(f"{text} ({ways[0]['moe_experts']:.1f})" if ways else "")
        rows.append(cells)
    return table(["updates", *by_update], rows) + "\n![The gap](plots/gap.svg)\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def section(experiment: Experiment, known: dict[str, dict]) -> str:
    """All tables of an experiment, with its plots."""
    parts = []
    for task in (TASKS[name] for name in experiment.tasks):
        make = systems_table if experiment.compares_systems else ablation_table
        text = make(experiment, task, known)
        if text.count("\n") < 2 + experiment.least:
            continue
        parts.append(f"### {experiment.title}: {task.title}\n\n{experiment.text}\n\n{text}")
        if experiment.compares_systems:
            parts.append(
                f"When each reaches the validation loss that Switch ends with (share of Switch's own):\n\n"
                f"{reach_table(experiment, task, known)}"
            )
        parts.append(f"![{experiment.title}, {task.title}](plots/{experiment.id}-{task.id}.svg)\n")
    return "\n".join(parts)
