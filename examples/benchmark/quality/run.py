#!/usr/bin/env python3
"""Train and evaluate what the protocol says; `report.py` makes tables and plots of it.

Interrupted, the same command goes on where it stopped, and what is in the results is not trained again. Each
run has one thread.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "systems"))

import choosing
import jobs
from growth import GROWTH
from jobs import Job
from protocol import EXPERIMENTS as RIVALRY
from protocol import HERE, SEEDS, TASKS, UPDATES, Run
from records import read
from systems import Settings
from task_data import prepared, prepared_small

EXPERIMENTS = {**RIVALRY, **GROWTH}
EPILOG = """\
examples:
  run.py                                           everything: hours, on two cores
  run.py --experiments systems --tasks lm --jobs 4
  run.py --experiments gate_input --seeds 1
  run.py --experiments growth_switch --jobs 1
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    add("--labels", nargs="+", metavar="LABEL", help="only the rows with these labels")
    add("--seeds", type=int, nargs="+", help="instead of those of the protocol")
    add("--jobs", type=int, default=2, help="how many to train at a time (2)")
    add("--work", type=Path, default=Path("quality"), help="folder for data, logs and checkpoints (quality)")
    add("--results", type=Path, default=HERE / "results", help="folder of the results (results, here)")
    add("--smoke", action="store_true", help="a few updates of some systems on README.md's own text")
    add("--list", action="store_true", help="print what would be trained, and train nothing")
    return result


def chosen(args: argparse.Namespace, known: dict[str, dict]) -> dict[str, tuple[Run, Path]]:
    """The runs that are asked for, first seeds first, and the file that each is recorded in, by key."""
    if args.smoke:
        args.experiments, args.labels, args.seeds = ["systems"], args.labels or ["EvoMoE", "Switch"], [1]
    found: dict[str, tuple[Run, Path]] = {}
    updates = 20 if args.smoke else UPDATES
    for name in args.experiments:
        experiment = EXPERIMENTS[name]
        for seed in args.seeds or SEEDS:
            for task in (TASKS[task] for task in experiment.tasks if task in args.tasks):
                for variant in experiment.rows(task):
                    if not args.seeds and seed not in choosing.seeds(experiment, variant, task, known):
                        continue
                    if args.labels is None or variant.label in args.labels:
                        run = variant.run(task, seed, updates)
                        file = args.results / str(experiment.protocol) / f"{task.id}.jsonl"
                        found.setdefault(run.key, (run, file))
    return found


def plan(run: Run, data: Path, work: Path, file: Path) -> list[Job]:
    """The jobs of a run: to train, with translation to generate, and to evaluate into a file."""
    folder = work / "runs" / run.key
    title = f"{run.task.id}, {run.key}"
    result = [Job(title, run.command(data / "bin", folder), folder / "train.log", run.updates)]
    evaluate = [sys.executable, str(HERE / "evaluate.py"), str(folder), str(data)]
    evaluate += ["--results", str(file)]
    if run.task.translates:
        settings = Settings(data / "bin", run.task.kind, run.updates)
        generate = settings.generate(folder / "checkpoint_last.pt")
        result.append(Job(f"{title}: translation", generate, folder / "generate.log", needs=list(result)))
        evaluate += ["--references", str(data / "raw" / f"test.{run.task.corpus[2]}")]
    result.append(Job(f"{title}: test", evaluate, folder / "evaluate.log", needs=list(result)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(described(run), indent=1) + "\n")
    return result


def described(run: Run) -> dict:
    """What a run is, for its record."""
    return {
        "key": run.key,
        "task": run.task.id,
        "system": run.system.id,
        "seed": run.seed,
        "updates": run.updates,
        "corpus": run.task.corpus,
        "arguments": run.arguments,
    }


def main() -> int:
    """Train and evaluate; the exit status tells whether all went well."""
    args = parser().parse_args()
    args.work, args.results = args.work.resolve(), args.results.resolve()
    known = read(args.results)
    runs = [(run, file) for key, (run, file) in chosen(args, known).items() if key not in known]
    if args.list:
        print("\n".join(f"{run.task.id} {run.key} {' '.join(run.arguments)}" for run, _ in runs))
        return 0
    if not runs:
        print("run.py: the results have all of it already.")
        return 0
    make = prepared_small if args.smoke else prepared
    data = make({run.task.corpus: None for run, _ in runs}, args.work)
    every = [job for run, file in runs for job in plan(run, data[run.task.corpus], args.work, file)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running jobs are ended
    try:
        jobs.run(every, args.jobs, threads=1)
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; the same command goes on from here.")
    failed = {job.title: job.failure() for job in every if job.failure()}
    print("\n".join(f"{title} failed: {why}" for title, why in failed.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
