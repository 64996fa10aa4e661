#!/usr/bin/env python3
"""Train any of the systems on the same data, with the same seeds and sizes, and print one table of them.

Each is a run of `fairseq-train` with one thread. OUT receives a line for each finished run (records.jsonl),
and out of these lines alone table.md, table.csv and curves.svg; RUNS receives logs and checkpoints.
Interrupted, the same command goes on where it stopped. What has a record is not trained again, even if RUNS
is gone, unless its options have changed since, which is said; where the code of a router has, the row is
marked. What has none goes on from its last checkpoint. A system that fails is listed with its error, the
others go on, and the same command tries it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import densified
import finished
import inference
import jobs
import report
import step_times
from jobs import Job
from plan import plan
from report import Record, Row
from systems import DENSE, TASKS, Settings, System, UnknownSystem, read_all

from fairseq_evomoe.config.errors import ConfigError, as_flags

EPILOG = """\
examples:
  run.py data/shakespeare/bin --systems all --updates 1000 --jobs 2 --out results
  run.py data/bible/bin --task translation --systems dense evomoe my.yaml --seeds 1 2 3 --out translation
  run.py data/shakespeare/bin --systems evomoe base --out wide -- --decoder-ffn-embed-dim 512
  run.py --report --systems all --out results                        the table anew, without training
  run.py data/shakespeare/bin --systems all --times --out results    seconds an update
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
        help="length of each run, with which all phases scale (1000; with --times 40)",
    )
    add("--seeds", type=int, nargs="+", default=[1], help="seeds to train each system with (1)")
    add("--jobs", type=int, default=1, help="how many to train at a time (1)")
    add("--threads", type=int, default=1, help="threads of each (1)")
    add("--out", type=Path, default=Path("results"), help="folder of records and table (results)")
    add("--runs", type=Path, help="folder of logs and checkpoints (runs, in OUT)")
    add("--reference", default="switch", metavar="NAME", help="what the others are compared with (switch)")
    add("--fresh", action="store_true", help="train again what was made with other code of the router")
    # each makes something of its own
    instead = result.add_mutually_exclusive_group().add_argument
    instead("--report", action="store_true", help="make the table of OUT's records, and train nothing")
    instead(
        "--times",
        action="store_true",
        help="instead, time the systems side by side (times.json), for which the machine must be quiet",
    )
    instead(
        "--densified",
        action="store_true",
        help="instead, the share of the gain that is kept when checkpoints become dense (densified.md)",
    )
    instead(
        "--inference",
        action="store_true",
        help="instead, how good ds_moe and evomoe are with other experts at inference (inference.md)",
    )
    add("--refine", type=int, default=500, help="with --densified, updates of a densified model (500)")
    add("--rounds", type=int, default=3, help="with --times, how often each is trained (3)")
    return result


def usable(records: list[Record], asked: dict[str, Any], fresh: bool) -> Record | None:
    """The newest of some records that is of what is asked; why there is none although there are, is said.

    Args:
        records: of a system with a seed, the newest first.
        asked: what is asked, see `finished.described`.
        fresh: whether the code of its router must be that of today.
    """
    why = []
    for record in records:
        other = finished.differences(record, asked)
        if fresh and record["code"] != asked["code"]:
            other.append("the code of its router has changed")
        if not other:
            return record
        why.append("; ".join(other))
    if why:
        print(f"{asked['system']}, seed {records[0]['seed']}: its record is not of what is asked ({why[0]})")
    return None


def rows_of(
    systems: list[System], seeds: list[int], settings: Settings, out: Path, fresh: bool = False
) -> list[Row]:
    """What is known of each system: its records, and the seeds that have none."""
    records, rows = finished.read(out), []
    for system in systems:
        row = Row(system)
        rows.append(row)
        if settings.task in system.not_for:
            row.error = "not applicable: " + system.not_for[settings.task]
            continue
        try:
            asked = finished.described(system, settings)
        except ConfigError as error:
            row.error = "failed: " + as_flags(str(error))
            continue
        for seed in seeds:
            record = usable(finished.of(records, system.id, seed), asked, fresh)
            if record:
                row.records.append(record)
                row.older |= record["code"] != asked["code"]
            else:
                row.missing.append(seed)
    return rows


def train(rows: list[Row], settings: Settings, args: argparse.Namespace) -> None:
    """Train what has no record, each seed of all systems before the next, and note what fails."""
    out, known = args.out.resolve(), {}
    runs = (args.runs or out / "runs").resolve()
    plans = [
        (row, plan(row.system, seed, settings, runs, known))
        for seed in args.seeds
        for row in rows
        if seed in row.missing and not row.error
    ]
    last = {each.jobs[-1].log: each for _, each in plans}

    def record(job: Job) -> None:
        if job.log in last:
            finished.append(out, last[job.log].record())
            last[job.log].tidy()

    before = [job for _, each in plans for job in each.jobs[-1:] if job.done]
    for job in before:  # it was ended between the run's end and its record
        record(job)
    every = {job.log: job for _, each in plans for job in each.jobs}
    jobs.run(list(every.values()), args.jobs, args.threads, record)
    for row, each in plans:
        if each.failure:
            row.error = "failed: " + each.failure


def write_report(rows: list[Row], reference: str, out: Path) -> str:
    """Write the table and the plot; return the table."""
    times = step_times.read(out)
    table = report.markdown(rows, reference, times)
    (out / "table.md").write_text(table, encoding="utf-8")
    report.write_csv(out / "table.csv", rows, times)
    report.plot(out / "curves.svg", rows)
    return table


def list_of(systems: list[System]) -> str:
    """A table of systems, with what differs from their papers."""
    lines = ["| preset | system | what differs from the paper |", "|---|---|---|"]
    for system in systems:
        lines.append(f"| `{system.id}` | {system.name} ({system.paper}) | {system.differs} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Train, evaluate, report; the exit status tells whether all went well."""
    logging.getLogger().setLevel(logging.WARNING)  # fairseq, when it is imported, lets all others say all
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
    if importlib.util.find_spec("matplotlib") is None:
        parse.error(f"the plot needs matplotlib: install it into {sys.executable} first.")
    if args.report:
        settings = kept_settings(args, parse)
    else:
        if args.data is None or not args.systems:
            parse.error("DATA and --systems are needed")
        if not any(args.data.glob("dict*.txt")):
            parse.error(f"{args.data} has no dict*.txt: DATA must be a folder like prepare.py's bin/")
        updates = args.updates or (40 if args.times else 1000)
        if updates < 4 or args.jobs < 1 or args.rounds < 1:
            parse.error("--updates must be at least 4, --jobs and --rounds at least 1")
        if args.inference and not inference.WAYS.keys() >= {system.id for system in systems}:
            parse.error(f"with --inference, --systems must be of {' and '.join(inference.WAYS)}")
        settings = Settings(args.data.resolve(), args.task, updates, tuple(arguments[end + 1 :]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running jobs are ended
    try:
        if args.times:
            return time_all(systems, settings, args)
        if not args.report:
            finished.keep_settings(args.out, finished.settings_of(settings))
        further = args.densified or args.inference
        return make_further(systems, settings, args) if further else make(systems, settings, args)
    except (finished.OtherSettings, ConfigError) as error:
        sys.exit(f"run.py: {error}")
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted" + ("." if args.times else "; the same command goes on from here."))


def make_further(systems: list[System], settings: Settings, args: argparse.Namespace) -> int:
    """Make the table of what becomes of finished runs; those that are not there are trained."""
    out, known = args.out.resolve(), {}
    runs = (args.runs or out / "runs").resolve()
    module, length = (densified, max(args.refine, 4)) if args.densified else (inference, settings.updates)
    if module is densified and DENSE not in systems:
        systems = [DENSE, *systems]
    plans = {system.id: plan(system, args.seeds[0], settings, runs, known) for system in systems}
    short = dataclasses.replace(settings, updates=length)
    more, rows = module.make(plans, short)
    jobs.run([*(job for each in plans.values() for job in each.jobs), *more], args.jobs, args.threads)
    failed = {job.title: job.failure() for job in more if not job.done}
    if failed:
        sys.exit("run.py: " + "; ".join(f"{title}: {why}" for title, why in failed.items()))
    found = rows()
    (out / f"{module.__name__}.json").write_text(
        json.dumps({"rows": found, **finished.made_with()}, indent=1) + "\n"
    )
    table = module.markdown(found)
    (out / f"{module.__name__}.md").write_text(table, encoding="utf-8")
    print("\n" + table)
    return 0


def time_all(systems: list[System], settings: Settings, args: argparse.Namespace) -> int:
    """Time the systems; `--report` then makes the table with their times."""
    common = finished.settings_of(settings)
    del common["updates"]  # times are of shorter runs
    finished.check_settings(args.out, common)
    found = step_times.measure(systems, settings, args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / step_times.TIMES
    path.write_text(json.dumps(found, indent=1) + "\n")
    for name, seconds in sorted(found["seconds"].items(), key=lambda pair: pair[1]):
        print(f"{name:24} {seconds:.4f} s an update")
    print(path)
    return 0


def kept_settings(args: argparse.Namespace, parse: argparse.ArgumentParser) -> Settings:
    """The settings that the records of a folder have."""
    path = args.out / finished.SETTINGS
    if not path.exists():
        parse.error(f"--report needs the records of a former run, and {args.out} has no {path.name}")
    kept = json.loads(path.read_text())
    return Settings(Path("data"), kept["task"], kept["updates"], tuple(kept["flags"]))


def make(systems: list[System], settings: Settings, args: argparse.Namespace) -> int:
    """Train if that is asked for, and make the table; return the exit status."""
    out = args.out.resolve()
    rows = rows_of(systems, args.seeds, settings, out, args.fresh)
    if not args.report:
        train(rows, settings, args)
        failed = {row.system.id: row.error for row in rows if row.error}
        rows = rows_of(systems, args.seeds, settings, out, args.fresh)
        for row in rows:
            row.error = failed.get(row.system.id, "")
    print("\n" + write_report(rows, args.reference, out))
    print("\n".join(str(path) for path in sorted(out.iterdir()) if path.is_file()))
    return 1 if any(row.error.startswith("failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
