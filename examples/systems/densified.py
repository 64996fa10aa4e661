"""How much of the gain of a mixture of experts is kept when a checkpoint becomes dense (`evomoe densify`).

The gain is what the mixture's validation loss is lower than that of the dense model of the same width, which
a densified one has. Each method is validated at once and after some more updates as a dense model that learns
from the mixture (`evomoe_distillation`), as in OneS (arXiv 2201.10890). The dense model itself has as many
updates more, with the same teachers, which is what teaching gives without any gathering, and without one,
which is where the gain is counted from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import logs
from jobs import Job
from plan import Plan
from systems import DENSE, PLUGIN, TASKS, Settings

METHODS = ("sum", "average", "topk", "svd")
NOTHING = "dense model, nothing gathered"


def make(plans: dict[str, Plan], settings: Settings) -> tuple[list[Job], Any]:
    """The jobs, and what makes the rows once they are done.

    Args:
        plans: of the systems, and of the dense model.
        settings: those of the refinement, with its length.
    """
    dense = plans[DENSE.id]
    alone = _refine(f"{DENSE.id}, refined", dense.checkpoint, dense, settings)
    every = [alone]
    made: dict[tuple[str, str], tuple[Job | None, Job]] = {}
    for name, plan in plans.items():
        if name == DENSE.id:
            continue
        for method in METHODS:
            title, path = f"{name}, {method}", plan.checkpoint.with_name(f"densified-{method}.pt")
            command = [sys.executable, str(PLUGIN / "bin" / "evomoe"), "densify", str(plan.checkpoint)]
            command += ["--method", method, "--out", str(path), "--force"]
            gather = Job(f"{title}: densify", command, path.with_suffix(".densify.log"), needs=plan.jobs)
            check = Job(title, settings.validate(path), path.with_suffix(".log"), needs=[*plan.jobs, gather])
            refine = _refine(f"{title}, refined", path, plan, settings, teacher=plan)
            refine.needs.append(gather)
            every += [gather, check, refine]
            made[name, method] = check, refine
        taught = _refine(f"{DENSE.id}, refined by {name}", dense.checkpoint, dense, settings, teacher=plan)
        every.append(taught)
        made[name, NOTHING] = None, taught

    def rows() -> list[dict[str, Any]]:
        validation = TASKS[settings.task].validation

        def loss(job: Job) -> float:
            return logs.validated(job.log)[validation]

        whole = {name: plan.record()["curve"][-1][2] for name, plan in plans.items()}
        base, refined = whole[DENSE.id], loss(alone)
        found = []
        for (name, method), (check, refine) in made.items():
            gain = base - whole[name]
            losses = {"at_once": loss(check) if check else base, "refined": loss(refine)}
            kept = {
                "at_once": (base - losses["at_once"]) / gain,
                "refined": (refined - losses["refined"]) / gain,
            }
            row = {"system": name, "method": method, "seed": plans[name].seed, "updates": settings.updates}
            found.append({**row, "gain": gain, "losses": losses, "kept": kept, "dense_refined": refined})
        return found

    return every, rows


def _refine(title: str, checkpoint: Path, plan: Plan, settings: Settings, teacher: Plan | None = None) -> Job:
    """The training that goes on from a checkpoint as a dense model."""
    name = f"{checkpoint.stem}-{settings.updates}-" + (f"by-{teacher.asked['system']}" if teacher else "more")
    save = checkpoint.with_name(name)
    command = [*settings.train(DENSE, plan.seed + 2000, save), "--finetune-from-model", str(checkpoint)]
    if teacher:
        command += ["--criterion", "evomoe_distillation", "--distillation-teacher", str(teacher.checkpoint)]
    needs = [*plan.jobs, *(teacher.jobs if teacher and teacher is not plan else ())]
    return Job(title, command, save / "train.log", settings.updates, needs)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: perplexity and share of the gain, at once and refined."""
    lines = ["| system | method | perplexity at once | gain kept | refined for | perplexity | gain kept |"]
    lines.append("|---" * 7 + "|")
    for each in rows:
        cells = [f"`{each['system']}`", each["method"]]
        for when in ("at_once", "refined"):
            cells += [f"{each['updates']} updates"] if when == "refined" else []
            cells += [f"{2 ** each['losses'][when]:.2f}", f"{100 * each['kept'][when]:.0f}%"]
        lines.append("| " + " | ".join(cells) + " |")
    if rows:
        refined = 2 ** rows[0]["dense_refined"]
        lines.append(f"| `{DENSE.id}` | no teacher | | | {rows[0]['updates']} updates | {refined:.2f} | 0% |")
    return "\n".join(lines) + "\n"
