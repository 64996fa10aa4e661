#!/usr/bin/env python3
"""Train any of the systems on the same data, with the same seeds and sizes, and print one table of them.

Each is a run of `fairseq-train` with one thread. OUT receives table.md, table.csv, curves.svg and, in
runs/, the log and the checkpoints of each run. Interrupted, the same command goes on where it stopped: what
is finished is not trained again, and what is not goes on from its last checkpoint. A system that fails is
listed with its error, the others go on, and the same command tries it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from pathlib import Path

import jobs
import logs
import report
from jobs import Job
from systems import DENSE, TASKS, Settings, System, UnknownSystem, read_all, share

EPILOG = """\
examples:
  run.py data/shakespeare/bin --systems all --updates 1000 --jobs 2 --out results
  run.py data/bible/bin --task translation --systems dense evomoe my.yaml --seeds 1 2 3 --out translation
  run.py data/shakespeare/bin --systems evomoe base --out wide -- --decoder-ffn-embed-dim 512
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        usage="run.py [-h] DATA --systems NAME [NAME ...] [options] [-- flags of fairseq-train]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("data", type=Path, metavar="DATA", nargs="?", help="folder that fairseq-train reads")
    add(
        "--systems",
        nargs="+",
        metavar="NAME",
        help="presets by name or by the path of a YAML file, dense, or all",
    )
    add(
        "--list",
        action="store_true",
        help="print a table of the systems, and train nothing",
    )
    add("--task", choices=TASKS, default="lm", help="what to train (lm)")
    add(
        "--updates",
        type=int,
        default=1000,
        help="length of each run, with which all phases scale (1000)",
    )
    add("--seeds", type=int, nargs="+", default=[1], help="seeds to train each system with (1)")
    add("--jobs", type=int, default=1, help="how many to train at a time (1)")
    add("--threads", type=int, default=1, help="threads of each (1)")
    add("--out", type=Path, default=Path("results"), help="folder to write to (results)")
    return result


def plan(system: System, seed: int, settings: Settings, out: Path) -> list[Job]:
    """The jobs of a system with one seed, in order: a dense model if it needs one, training, translation."""
    folder = out / "runs" / f"{system.id}-{seed}"
    result, dense = [], None
    updates = settings.updates
    if system.dense_updates:
        first = share(system.dense_updates, updates)
        updates -= first
        short = Settings(settings.data, settings.task, first, settings.more)
        before = out / "runs" / f"dense-{first}-updates-{seed}"
        # another seed, for other batches than those that the experts then see
        command = short.train(DENSE, seed + 1000, before)
        result.append(Job(f"dense for {first} updates", command, before / "train.log", first))
        dense = before / "checkpoint_last.pt"
    command = settings.train(system, seed, folder, dense)
    result.append(Job(f"{system.id}, seed {seed}", command, folder / "train.log", updates, list(result)))
    if TASKS[settings.task].metric == "BLEU":
        command = settings.generate(folder / "checkpoint_last.pt")
        log = folder / "generate.log"
        result.append(Job(f"{system.id}, seed {seed}: translation", command, log, 0, list(result)))
    return result


def result_of(system: System, seed: int, task: str, plans: list[Job]) -> report.Result:
    """What came out of the jobs of a system."""
    if task in system.not_for:
        return report.Result(system, seed, "not applicable: " + system.not_for[task])
    error = plans[-1].failure()
    if error or not plans[-1].done:
        return report.Result(system, seed, "failed: " + error if error else "not finished")
    train = next(job for job in plans if job.log.parent.name == f"{system.id}-{seed}")
    validation = TASKS[task].validation
    return report.Result(
        system,
        seed,
        run=logs.read(train.log, validation),
        before=logs.read(plans[0].log, validation) if train is not plans[0] else None,
        peak_mib=train.state["peak_mib"],
        bleu=logs.bleu(plans[-1].log) if TASKS[task].metric == "BLEU" else None,
    )


def write_report(results: list[report.Result], task: str, out: Path) -> str:
    """Write the table and the plot; return the table."""
    metric = TASKS[task].metric
    table = report.markdown(results, metric)
    (out / "table.md").write_text(table)
    report.write_csv(out / "table.csv", results, metric)
    report.plot(out / "curves.svg", results)
    return table


def list_of(systems: list[System]) -> str:
    """A table of systems, with what differs from their papers."""
    lines = ["| preset | system | what differs from the paper |", "|---|---|---|"]
    for system in systems:
        lines.append(f"| `{system.id}` | {system.name} ({system.paper}) | {system.differs} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Train, evaluate, report; the exit status tells whether all went well."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parse = parser()
    args = parse.parse_args(arguments[:end])
    try:
        systems = read_all(args.systems or ["all"])
    except UnknownSystem as error:
        parse.error(str(error))
    if args.list:
        print(list_of(systems), end="")
        return 0
    if args.data is None or not args.systems:
        parse.error("DATA and --systems are needed")
    if importlib.util.find_spec("matplotlib") is None:
        parse.error(f"the plot needs matplotlib: install it into {sys.executable} first.")
    if args.updates < 4 or args.jobs < 1:
        parse.error("--updates must be at least 4 and --jobs at least 1")
    out, more = args.out.resolve(), tuple(arguments[end + 1 :])
    settings = Settings(args.data.resolve(), args.task, args.updates, more)
    runs = [(system, seed) for seed in args.seeds for system in systems]
    plans = {
        (system.id, seed): plan(system, seed, settings, out)
        for system, seed in runs
        if args.task not in system.not_for
    }
    unique = {job.log: job for jobs_of_one in plans.values() for job in jobs_of_one}
    for jobs_of_one in plans.values():  # systems that are made of one dense model wait for one job
        for job in jobs_of_one:
            job.needs = [unique[need.log] for need in job.needs]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running jobs are ended
    try:
        for job in unique.values():
            job.check()
        jobs.run(list(unique.values()), args.jobs, args.threads)
    except jobs.OtherSettings as error:
        sys.exit(f"run.py: {error}")
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; the same command goes on from here.")
    results = [result_of(s, seed, args.task, plans.get((s.id, seed), [])) for s, seed in runs]
    print("\n" + write_report(results, args.task, out))
    print("\n".join(str(path) for path in sorted(out.iterdir()) if path.is_file()))
    return 1 if any(result.error.startswith("failed") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
