"""The tables of whether growth pays: every row of an experiment is there, those without a record too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import choosing
import numpy
from bootstrap import Difference, difference
from costs import Steps, cost
from growth import GROWTH, RATES, SHORTER
from protocol import TASKS, Experiment, Task, Variant
from tables import (
    Records,
    active_parameters,
    comparable,
    compared,
    in_percent,
    mean,
    of_variant,
    perplexity,
    score,
    spread,
    table,
)

NOT_RUN, NOT_TIMED = "not run yet", "not timed yet"
PAYS = ("growth_switch", "growth_context", "growth_many", "growth_narrow")
WITHIN, SECONDS, MEMORY = 0.005, 0.75, 0.6
"""The target: within so much of the final perplexity, for such shares of seconds and of memory x time."""

Known = dict[str, dict]


def sections(known: Known, steps: dict[str, Steps]) -> str:
    """All of it, by question."""
    parts = ["## Does growth pay?\n", verdict(known, steps)]
    parts.append("### 1. Equal quality, less cost\n")
    parts += [_section(GROWTH["growth_dense"], plain_table(GROWTH["growth_dense"], known))]
    parts += [_section(GROWTH[name], pays_table(GROWTH[name], known, steps.get(name, {}))) for name in PAYS]
    parts.append("### 2. When\n")
    parts.append(_section(GROWTH["growth_when"], when_table(GROWTH["growth_when"], known)))
    parts.append("### 3. The Dense-To-Sparse gate\n")
    parts.append(_section(GROWTH["growth_soft"], plain_table(GROWTH["growth_soft"], known)))
    parts.append(_section(GROWTH["growth_steadiness"], steadiness_table(GROWTH["growth_steadiness"], known)))
    parts.append("### 4. The paper's table\n")
    parts.append(_section(GROWTH["growth_table"], best_tables(GROWTH["growth_table"], known)))
    return "\n".join(parts)


def _section(experiment: Experiment, text: str) -> str:
    return f"#### {experiment.title}\n\n{experiment.text} `run.py --experiments {experiment.id}`\n\n{text}"


def _task(experiment: Experiment) -> Task:
    return TASKS[experiment.tasks[0]]


ONE_SEED = "One seed, so that intervals are of the test text alone"


def verdict(known: Known, steps: dict[str, Steps]) -> str:
    """Whether any way to grow reaches the target, and is better at equal seconds, a line an experiment."""
    lines = []
    for name in PAYS:
        experiment, times = GROWTH[name], steps.get(name, {})
        grown = [variant for variant in experiment.variants if _grows(experiment, variant)]
        shares = {one.label: _against_start(experiment, one, known, times) for one in grown}
        shares = {label: found for label, found in shares.items() if found is not None}
        if not shares:
            lines.append(f"- {experiment.title}: {NOT_RUN}.")
            continue
        reached = [label for label, found in shares.items() if _reaches(*found)]
        text = f"reached by {'; '.join(reached)}" if reached else f"missed by all {len(shares)} ways to grow"
        equal = {one.label: at_equal_seconds(experiment, one, known, times) for one in grown}
        equal = {label: found for label, found in equal.items() if found is not None}
        better = {label: found for label, found in equal.items() if found.high < 0}
        if equal:
            text += f". Better at equal seconds: {len(better) or 'none'} of {len(equal)}"
        if better:
            best = min(better, key=lambda label: better[label].mean)
            text += f", most of all {best} ({in_percent(better[best])})"
        seeds = max(len(of_variant(one, _task(experiment), known)) for one in grown)
        lines.append(f"- {experiment.title}: {text}. {ONE_SEED if seeds == 1 else f'Up to {seeds} seeds'}.")
    target = (
        f"Target: within {WITHIN:.1%} of the final perplexity of experts from the start, for at most "
        f"{SECONDS:g} of its seconds and {MEMORY:g} of its memory x time."
    )
    return "\n".join([target, "", *lines]) + "\n"


def _grows(experiment: Experiment, variant: Variant) -> bool:
    """Whether a row is a way to grow, and not experts that are there from the start."""
    start = experiment.compared(_task(experiment))
    return variant.options["moe_spawn_update"] != start.options["moe_spawn_update"]


def _against_start(
    experiment: Experiment, variant: Variant, known: Known, steps: Steps
) -> tuple[float, float, float] | None:
    """Relative perplexity, share of the seconds and of memory x time; `None` if anything is missing."""
    task, start = _task(experiment), experiment.compared(_task(experiment))
    if not _grows(experiment, variant):
        return None
    ours, theirs = (of_variant(one, task, known) for one in (variant, start))
    costs = [cost(one.run(task, 1), steps) for one in (variant, start)]
    if not comparable(ours, theirs) or None in costs:
        return None
    mine, its = costs
    return (
        difference(ours, theirs).mean,
        mine.seconds / its.seconds,
        mine.memory_seconds / its.memory_seconds,
    )


def at_equal_seconds(
    experiment: Experiment, variant: Variant, known: Known, steps: Steps
) -> Difference | None:
    """A way to grow against experts from the start that have as many seconds as it, with their own schedule.

    What they would reach is between two runs of them, the whole one and a shorter one: each chunk's loss is
    interpolated linearly in the logarithm of the updates.

    Returns:
        `None` if anything is missing, or its seconds are not between those of the two.
    """
    task, start = _task(experiment), experiment.compared(_task(experiment))
    shorter = next((one for one in experiment.variants if one.label == SHORTER), None)
    if shorter is None or not _grows(experiment, variant):
        return None
    ours, whole, short = (of_variant(one, task, known) for one in (variant, start, shorter))
    mine, its = (cost(one.run(task, 1), steps) for one in (variant, start))
    if mine is None or its is None:
        return None
    weight = 1 - math.log(mine.seconds / its.seconds) / math.log(shorter.share)
    between = blended(short, whole, weight)
    if not 0 <= weight <= 1 or not {r["seed"] for r in ours} & {r["seed"] for r in between}:
        return None
    return difference(ours, between)


def blended(short: Records, whole: Records, weight: float) -> Records:
    """Of each seed that both have, what the test would give between them: `weight` is that of the second."""
    others, found = {record["seed"]: record["test"]["chunks"] for record in short}, []
    for record in whole:
        if record["seed"] in others:
            pairs = zip(others[record["seed"]], record["test"]["chunks"])
            chunks = [[(1 - weight) * a[0] + weight * b[0], b[1]] for a, b in pairs]
            found.append({"seed": record["seed"], "test": {"chunks": chunks}})
    return found


def _reaches(perplexity_more: float, seconds: float, memory: float) -> bool:
    return perplexity_more <= WITHIN and seconds <= SECONDS and memory <= MEMORY


def pays_table(experiment: Experiment, known: Known, steps: Steps) -> str:
    """Quality and cost of each way to grow, against experts that are there from the start."""
    task, start = _task(experiment), experiment.compared(_task(experiment))
    theirs, its = of_variant(start, task, known), cost(start.run(task, 1), steps)
    heads = ["experts come", "test perplexity", "seeds", "against the first row", "seconds", "memory x time"]
    heads += ["memory at most, MB", "MB sent, of two ranks", "against the first row at equal seconds"]
    rows = []
    for variant in experiment.variants:
        ours, mine = of_variant(variant, task, known), cost(variant.run(task, 1), steps)
        cells = [variant.label, *_quality(ours)]
        cells.append(compared(ours, theirs) if ours and theirs and variant != start else "")
        if mine is None or its is None:
            cells += [NOT_TIMED, "", "", ""]
        else:
            cells.append(f"{mine.seconds:.0f} ({mine.seconds / its.seconds:.2f})")
            cells.append(f"{mine.memory_seconds / its.memory_seconds:.2f}")
            cells.append(f"{mine.peak_memory / 1e6:.0f}")
            cells.append(f"{mine.sent / 1e6:.0f}" + (f" ({mine.sent / its.sent:.2f})" if its.sent else ""))
        equal = at_equal_seconds(experiment, variant, known, steps)
        cells.append("" if equal is None else in_percent(equal))
        rows.append(cells)
    return table(heads, rows)


def _quality(found: Records) -> list[str]:
    return [spread(score, found), str(len(found))] if found else [NOT_RUN, ""]


def plain_table(experiment: Experiment, known: Known) -> str:
    """Quality of each row against the first one."""
    task, first = _task(experiment), experiment.compared(_task(experiment))
    theirs, rows = of_variant(first, task, known), []
    for variant in experiment.variants:
        ours = of_variant(variant, task, known)
        cells = [variant.label, *_quality(ours)]
        cells.append(compared(ours, theirs) if ours and theirs and variant != first else "")
        cells.append(f"{mean(active_parameters, ours):,.0f}" if ours else "")
        cells.append(f"{ours[0]['parameters']:,}" if ours else "")
        cells.append(f"{mean(lambda r: r['flops'], ours) / 1e12:.2f}" if ours else "")
        rows.append(cells)
    heads = ["row", "test perplexity", "seeds", "against the first row", "active parameters", "parameters"]
    return table([*heads, "TFLOPs"], rows)


def steadiness_table(experiment: Experiment, known: Known) -> str:
    """Drift of the routing, and rises of the training loss after its first tenth."""
    task, rows = _task(experiment), []
    for variant in experiment.variants:
        found = of_variant(variant, task, known)
        cells = [variant.label, *_quality(found)]
        for name in ("moe_drift", "moe_drift_recent"):
            values = [record["drift"][name] for record in found if name in record.get("drift", {})]
            cells.append(f"{statistics.mean(values):.3f}" if values else "")
        late = [[r for r in record["rises"] if r[0] > record["updates"] / 10] for record in found]
        cells.append(f"{statistics.mean(map(len, late)):.1f}" if found else "")
        highest = [rise for rises in late for _, rise in rises]
        cells.append(f"{max(highest):.1%}" if highest else "none" if found else "")
        rows.append(cells)
    heads = [
        "row",
        "test perplexity",
        "seeds",
        "drift",
        "drift, last tenth",
        "rises of the loss",
        "highest",
    ]
    return table(heads, rows)


def best_tables(experiment: Experiment, known: Known) -> str:
    """A table for each task."""
    tasks = [TASKS[name] for name in experiment.tasks]
    return "\n".join(f"{task.title}:\n\n{best_table(experiment, task, known)}" for task in tasks)


def best_table(experiment: Experiment, task: Task, known: Known) -> str:
    """Each system at the learning rate that the first task chooses for it, and what the others gave there."""
    chosen, chooses = choosing.best(experiment, known), task == _task(experiment)
    groups = list(dict.fromkeys(variant.group for variant in experiment.variants))
    ours = of_variant(chosen[groups[-1]], task, known) if groups[-1] in chosen else []
    rows = []
    for group in groups:
        best = chosen.get(group)
        found = of_variant(best, task, known) if best else []
        cells = [group, _rate(best) if best else "", *_quality(found)]
        cells.append(compared(ours, found) if ours and found and group != groups[-1] else "")
        rows.append([*cells, _tried(experiment, group, task, known)] if chooses else cells)
    heads = ["system", "its best rate", f"test {task.metric}", "seeds", f"{groups[-1]} against it"]
    rates = " / ".join(RATES)
    return table([*heads, f"valid perplexity with {rates}, first seed"] if chooses else heads, rows)


def _rate(variant: Variant) -> str:
    return variant.flags[variant.flags.index("--lr") + 1]


def _tried(experiment: Experiment, group: str, task: Task, known: Known) -> str:
    """The first seed's valid perplexity with each rate."""
    texts = []
    for variant in (variant for variant in experiment.variants if variant.group == group):
        first = of_variant(variant, task, known)[:1]
        texts.append(f"{perplexity(first[0]['valid_loss']):.2f}" if first else NOT_RUN)
    return " / ".join(texts)


def when_table(experiment: Experiment, known: Known) -> str:
    """Valid perplexity by the share of updates with one expert, the latest that loses nothing, and a rule."""
    task = _task(experiment)
    cases: dict[tuple[str, ...], dict[str, Variant]] = {}
    for variant in experiment.variants:
        *case, when = variant.label.split(", ")
        cases.setdefault(tuple(case), {})[when.replace("spawn at ", "")] = variant
    moments = list(next(iter(cases.values())))
    rows, points = [], []
    for case, variants in cases.items():
        losses = {}
        for when, variant in variants.items():
            found = of_variant(variant, task, known)
            losses[when] = mean(lambda r: r["valid_loss"], found) if found else None
        cells = [", ".join(case)]
        cells += [NOT_RUN if losses[w] is None else f"{perplexity(losses[w]):.2f}" for w in moments]
        latest = latest_share(losses)
        cells.append("" if latest is None else f"{latest:.1%}")
        rows.append(cells)
        if latest:
            points.append((_numbers(case), latest))
    return table(["case", *moments, "loses nothing until"], rows) + "\n" + rule(points) + "\n"


def _numbers(case: Sequence[str]) -> tuple[float, float, float]:
    """Experts, learning rate and updates of a case."""
    experts, rate, updates = case
    return float(experts.split()[0]), float(rate.split()[1]), float(updates.split()[0])


TOLERANCE = 0.003
"""Of the perplexity, which counts as nothing: about what a seed makes of difference."""


def latest_share(losses: dict[str, float | None]) -> float | None:
    """The share of the updates with one expert up to which nothing is lost, interpolated; `None`: not known.

    Args:
        losses: bits for each token, by `from the start` or a percentage; rising percentages.
    """
    start = losses["from the start"]
    points = [(float(w.rstrip("%")) / 100, loss) for w, loss in losses.items() if w != "from the start"]
    if start is None or any(loss is None for _, loss in points):
        return None
    limit, before = start + math.log2(1 + TOLERANCE), (0.0, start)
    for share, loss in points:
        if loss > limit:
            return before[0] + (share - before[0]) * (limit - before[1]) / (loss - before[1])
        before = share, loss
    return before[0]


def rule(points: Sequence[tuple[tuple[float, float, float], float]]) -> str:
    """A power law of the latest share, by least squares on logarithms, with what it explains.

    Args:
        points: experts, learning rate, updates; share.
    """
    if len(points) < 6:
        return f"Rule: {NOT_RUN} ({len(points)} of at least 6 cases are known)."
    names = ("experts", "learning rate", "updates")
    x = numpy.log([case for case, _ in points])
    y = numpy.log([share for _, share in points])
    matrix = numpy.column_stack([numpy.ones(len(points)), x])
    factors = numpy.linalg.lstsq(matrix, y, rcond=None)[0]
    rest = y - matrix @ factors
    explained = 1 - (rest @ rest) / max(((y - y.mean()) ** 2).sum(), 1e-12)
    law = " x ".join(f"({name})^{power:.2f}" for name, power in zip(names, factors[1:]))
    text = (
        f"Rule: share = {math.exp(factors[0]):.3g} x {law}; it explains {explained:.0%} of the variance of "
    )
    text += f"the logarithms of {len(points)} cases"
    if explained < 0.5:
        return text + ", which is no rule."
    return text + f", and is off by a factor of {math.exp(numpy.abs(rest).max()):.2f} at most."
