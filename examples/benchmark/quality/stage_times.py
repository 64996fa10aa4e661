#!/usr/bin/env python3
"""Time an update with each number of experts that the experiments of growth have, side by side.

All numbers of an experiment take turns in one process, a few updates each, so that whatever else the machine
does slows all of them. What schedules of spawns cost is added up from these steps by `report.py`, so that
runs that were trained beside others, or on other machines, have seconds that can be compared. Then two ranks
share the experts for some updates, to see the bytes that a rank sends. Results have a line for each number
of experts; where there are several, the last one counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "systems"))

import finished
import json_lines
from costs import spawns
from growth import GROWTH
from protocol import HERE, TASKS, Experiment, Run, Task, Variant
from task_data import prepared, prepared_small

BLOCK = 5
"""Updates of one number of experts until it is the next one's turn."""
RANKS, UPDATES_ON_RANKS = 2, 200
"""Of which the second half counts: a gate that has learned nothing may send nearly all to one rank."""
LENGTH = 1_000_000
TIMED = ("growth_switch", "growth_context", "growth_many", "growth_narrow")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    add = result.add_argument
    add("--experiments", nargs="+", choices=TIMED, default=list(TIMED), metavar="NAME")
    add("--rounds", type=int, default=10, help=f"how often each makes {BLOCK} updates (10)")
    add("--work", type=Path, default=Path("quality"), help="folder for data (quality)")
    add(
        "--results",
        type=Path,
        default=HERE / "results" / "2" / "steps",
        help="folder of results (results/2/steps)",
    )
    add("--smoke", action="store_true", help="on README.md's own text")
    return result


def stages_of(experiment: Experiment, task: Task) -> dict[int, Run]:
    """A run that has each of the numbers of experts that the rows have, from its first update to its last."""
    found = {}
    for variant in experiment.variants:
        for _, experts in [(0, 1), *spawns(variant.run(task, 1))]:
            found.setdefault(experts, _in_stage(variant, experts).run(task, 1, LENGTH))
    return dict(sorted(found.items()))


def _in_stage(variant: Variant, experts: int) -> Variant:
    options = dict(variant.options)
    if experts == 1:
        return dataclasses.replace(variant, options={**options, "moe_spawn_update": LENGTH - 1})
    if "moe_total_ffn_dim" in options:  # as wide as with all of them
        options["moe_total_ffn_dim"] = options["moe_total_ffn_dim"] * experts // options["moe_experts"]
    return dataclasses.replace(variant, options={**options, "moe_experts": experts, "moe_spawn_update": 0})


def timed(runs: dict[int, Run], data: Path, rounds: int) -> dict[int, dict]:
    """Seconds an update, by number of experts, and how many parameters there are."""
    import torch

    from fairseq_evomoe.training.growth import count_parameters
    from fairseq_evomoe.training.in_process import Training

    torch.set_num_threads(1)
    trainings = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for experts, run in runs.items():
            command = [*run.command(data, Path(folder)), *([] if torch.cuda.is_available() else ["--cpu"])]
            trainings[experts] = Training(command[1:], load=False)
            trainings[experts].update(2)
    blocks: dict[int, list[float]] = {experts: [] for experts in runs}
    for _ in range(rounds):
        for experts, training in trainings.items():
            blocks[experts].append(training.update(BLOCK).seconds / BLOCK)
    return {
        experts: {
            "seconds": round(statistics.median(found), 5),
            "blocks": [round(seconds, 5) for seconds in found],
            "parameters": count_parameters(trainings[experts].model),
        }
        for experts, found in blocks.items()
    }


def sent(run: Run, data: Path) -> float:
    """MB that one of two ranks sends to the other in an update, once the gate has learned a little."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(RANKS), *run.command(data, Path(folder))]
        command += ["--cpu", "--distributed-world-size", str(RANKS), "--distributed-backend", "gloo"]
        command += ["--ddp-backend", "legacy_ddp", "--moe-expert-parallel", str(RANKS), "--no-save"]
        command += ["--log-interval", "1", "--stop-time-hours", "0", "--disable-validation"]
        command += ["--max-update", str(UPDATES_ON_RANKS), "--total-num-update", str(UPDATES_ON_RANKS)]
        command += ["--warmup-updates", "10"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    found = [float(number) for number in re.findall(r'"moe_a2a_mb": "([\d.]+)"', done.stdout)]
    if not found:
        raise SystemExit(f"stage_times.py: {' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return statistics.mean(found[len(found) // 2 :])


def main() -> None:
    """Time all, and append a line for each number of experts."""
    args = parser().parse_args()
    logging.disable(logging.INFO)
    for name in args.experiments:
        experiment = GROWTH[name]
        task = TASKS[experiment.tasks[0]]
        make = prepared_small if args.smoke else prepared
        data = make([task.corpus], args.work.resolve())[task.corpus] / "bin"
        runs = stages_of(experiment, task)
        for experts, line in timed(runs, data, args.rounds).items():
            mb = sent(runs[experts], data) if experts > 1 else 0.0
            line = {"experiment": name, "experts": experts, **line, "sent_mb": round(mb, 4)}
            line.update(finished.made_with())
            json_lines.append(args.results / f"{task.id}.jsonl", line)
            print(line, flush=True)


if __name__ == "__main__":
    main()
