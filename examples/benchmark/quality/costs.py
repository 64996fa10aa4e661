"""What a run costs, of what an update costs with each number of experts (`stage_times.py`)."""

from __future__ import annotations

from protocol import Run
from systems import share

from fairseq_evomoe.evolution import budget, stages
from fairseq_evomoe.evolution.budget import Cost, Stage, Step
from fairseq_evomoe.evolution.cost import BYTES_OF_PARAMETER

Steps = dict[int, dict]
"""By number of experts: `seconds` of an update, `parameters`, `sent_mb` of a rank of two."""


def spawns(run: Run) -> list[tuple[int, int]]:
    """The updates before which experts spawn, and how many there are from then on.

    Raises:
        ValueError: a run whose experts wait for a plateau.
    """
    value, experts = run.system.options["moe_spawn_update"], run.system.options["moe_experts"]
    if stages.is_list(value):
        value = stages.counted(value, lambda moment: _update(moment, run), experts)
    else:
        value = _update(str(value), run)
    found = stages.read(value, experts)
    if any(stage.update is None for stage in found):
        raise ValueError(f"{run.key} waits for a plateau, whose update its options do not tell.")
    return [(stage.update, stage.experts) for stage in found if stage.update is not None]


def _update(moment: str, run: Run) -> int:
    return share(moment, run.updates) if moment.endswith("%") else int(moment)


def cost(run: Run, steps: Steps) -> Cost | None:
    """Seconds, memory and bytes of a run without a soft stage; `None`: not all of its stages were timed.

    Memory is that of weights, gradients and Adam's statistics.
    """
    if not run.system.options.get("moe_experts"):
        return None
    found = budget.stages(spawns(run), run.updates)
    if any(stage.experts not in steps for stage in found):
        return None

    def step(stage: Stage) -> Step:
        of = steps[stage.experts]
        return Step(of["seconds"], BYTES_OF_PARAMETER * of["parameters"], of["sent_mb"] * 1e6)

    return budget.cost(found, step)
