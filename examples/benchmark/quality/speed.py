#!/usr/bin/env python3
"""Time the systems beside each other: short runs in turn, several rounds, one thread.

Each run has all its stages, scaled to its length. Times of rounds differ when a machine has something else
to do; the ratios within a round differ less. `report.py` makes a table of the results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "systems"))

import json_lines
import logs
from evaluate import versions
from protocol import EXPERIMENTS, HERE, TASKS
from task_data import prepared


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    add = result.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=["lm"], metavar="TASK", help="lm, if not given")
    add("--labels", nargs="+", metavar="LABEL", help="only the systems with these labels")
    add("--rounds", type=int, default=5, help="how often each is timed (5)")
    add("--updates", type=int, default=200, help="length of a run (200)")
    add("--work", type=Path, default=Path("quality"), help="folder for data (quality)")
    add(
        "--results",
        type=Path,
        default=HERE / "results/1/speed",
        help="folder of results (results/1/speed)",
    )
    return result


def seconds_per_update(command: list[str], folder: Path) -> float:
    """The mean over a run, without its validations."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = folder / "train.log"
    log.write_bytes(done.stdout)
    if done.returncode:
        raise SystemExit(f"speed.py: {' '.join(command)} failed:\n{done.stdout.decode()[-2000:]}")
    curve = logs.read(log, "valid_loss").curve
    return curve[-1].seconds / curve[-1].update


def main() -> None:
    """Time all, and append a line for each run."""
    args = parser().parse_args()
    variants = [v for v in EXPERIMENTS["systems"].variants if args.labels is None or v.label in args.labels]
    variants = [v for v in variants if v.share == 1]
    for task in (TASKS[name] for name in args.tasks):
        data = prepared([task.corpus], args.work.resolve())[task.corpus]
        for i in range(args.rounds):
            for variant in variants:
                folder = Path(tempfile.mkdtemp())
                command = variant.run(task, 1, args.updates).command(data / "bin", folder)
                for option in ("--validate-interval-updates", "--save-interval-updates"):
                    command += [option, str(args.updates)]  # one validation, which is not timed
                seconds = seconds_per_update(command, folder)
                shutil.rmtree(folder)
                print(f"{task.id}, round {i + 1}, {variant.label}: {seconds:.4f} s an update", flush=True)
                line = {"label": variant.label, "round": i, "updates": args.updates}
                line.update(seconds_per_update=round(seconds, 5), versions=versions())
                json_lines.append(args.results / f"{task.id}.jsonl", line)


if __name__ == "__main__":
    main()
