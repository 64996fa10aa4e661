"""How good a system is with fewer or more experts at inference than it has in the table.

DS-MoE trains with all experts and generates with k; EvoMoE generates with its best expert, or with all over
its threshold (adaptive). What is validated are the checkpoints of the table's runs.
"""

from __future__ import annotations

import re
from typing import Any

import logs
from jobs import Job
from plan import Plan
from systems import Settings

WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "ds_moe": {
        **{f"k = {k}": {"moe_hard_experts": k} for k in (1, 2, 4, 8)},
        **{f"over {c}": {"moe_eval_routing": "adaptive", "moe_threshold": c} for c in (0.1, 0.2)},
    },
    "evomoe": {
        "best expert": {},
        **{f"adaptive, over {c}": {"moe_eval_routing": "adaptive", "moe_threshold": c} for c in (0.001, 0.1)},
    },
}
"""Of each system, the options that its checkpoint is validated with."""


def jobs_of(plan: Plan, settings: Settings) -> dict[str, Job]:
    """The validations of a system's checkpoint."""
    found = {}
    for way, options in WAYS[plan.asked["system"]].items():
        log = plan.train.log.with_name(re.sub(r"[^\w.]+", "-", f"inference {way}.log"))
        command = settings.validate(plan.checkpoint, options)
        found[way] = Job(f"{plan.train.title}: {way}", command, log, needs=plan.jobs)
    return found


def row(plan: Plan, way: str, job: Job) -> dict[str, Any]:
    """What a validation has found."""
    found = logs.validated(job.log)
    values = {"system": plan.asked["system"], "way": way, "seed": plan.seed}
    return {**values, "perplexity": found["valid_ppl"], "experts": found["valid_moe_experts"]}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: each system's ways in order, with what they lose against its best."""
    best: dict[str, float] = {}
    for each in rows:
        best[each["system"]] = min(best.get(each["system"], each["perplexity"]), each["perplexity"])
    lines = ["| system | at inference | experts per token | validation perplexity | more than its best |"]
    lines.append("|---" * 5 + "|")
    for each in rows:
        lost = 100 * (each["perplexity"] / best[each["system"]] - 1)
        cells = f"`{each['system']}` | {each['way']} | {each['experts']:.2f} | {each['perplexity']:.2f}"
        lines.append(f"| {cells} | {lost:.1f}% |")
    return "\n".join(lines) + "\n"


def make(plans: dict[str, Plan], settings: Settings) -> tuple[list[Job], Any]:
    """The jobs, and what makes the rows once they are done."""
    every = {name: jobs_of(plan, settings) for name, plan in plans.items()}

    def rows() -> list[dict[str, Any]]:
        return [row(plans[name], way, job) for name, ways in every.items() for way, job in ways.items()]

    return [job for ways in every.values() for job in ways.values()], rows
