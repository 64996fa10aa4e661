"""Which rows of an experiment are the best of their group, by one seed's valid loss; their further seeds."""

from __future__ import annotations

from protocol import SEEDS, TASKS, Experiment, Task, Variant
from tables import of_variant


def best(experiment: Experiment, known: dict[str, dict]) -> dict[str, Variant]:
    """The best row of each group whose rows all have a record, by the valid loss of the first seed.

    Args:
        experiment: which may have groups.
        known: the results.
    """
    task = TASKS[experiment.tasks[0]]
    groups: dict[str, list[Variant]] = {}
    for variant in experiment.variants:
        if variant.group:
            groups.setdefault(variant.group, []).append(variant)
    found = {}
    for group, variants in groups.items():
        losses = [_first_loss(variant, task, known) for variant in variants]
        if None not in losses:
            found[group] = variants[losses.index(min(losses))]
    return found


def _first_loss(variant: Variant, task: Task, known: dict[str, dict]) -> float | None:
    records = [record for record in of_variant(variant, task, known) if record["seed"] == SEEDS[0]]
    return records[0]["valid_loss"] if records else None


def seeds(experiment: Experiment, variant: Variant, task: Task, known: dict[str, dict]) -> tuple[int, ...]:
    """The seeds of a row: those of the protocol, and all of them once it is the best of its group.

    On other tasks than the first one, which chooses, the best of a group is trained alone.
    """
    if not variant.group:
        return experiment.seeds_of(variant, task)
    if best(experiment, known).get(variant.group) == variant:
        return tuple(seed for seed in SEEDS if seed in task.seeds)
    return experiment.seeds_of(variant, task) if task.id == experiment.tasks[0] else ()
