#!/usr/bin/env python3
"""Make all tables and plots of the results: in README.md between its markers, and in `plots/`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import plots
from protocol import EXPERIMENTS, HERE
from records import differences, read, read_gap, read_speed
from tables import gap_table, section, speed_table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    add = result.add_argument
    add("--results", type=Path, default=HERE / "results", help="folder of the results (results, here)")
    add("--out", type=Path, default=HERE, help="folder of README.md and plots (here)")
    add("--same", type=Path, metavar="RESULTS", help="instead, check that other results have equal numbers")
    return result


def fill(readme: Path, marker: str, text: str) -> None:
    """Replace what is between two markers of a file."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    old = readme.read_text(encoding="utf-8")
    if start not in old:
        raise SystemExit(f"report.py: {readme} has no {start}.")
    pattern = re.escape(start) + ".*?" + re.escape(end)
    readme.write_text(
        re.sub(pattern, lambda _: f"{start}\n{text}{end}", old, flags=re.DOTALL), encoding="utf-8"
    )


def main() -> None:
    """Write tables and plots, or compare."""
    args = parser().parse_args()
    known = read(args.results)
    if args.same:
        wrong = differences(known, read(args.same))
        print("\n".join(wrong) if wrong else "equal")
        sys.exit(1 if wrong else 0)
    for experiment in EXPERIMENTS.values():
        fill(args.out / "README.md", experiment.id, section(experiment, known))
        plots.plot(experiment, known, args.out / "plots")
    speed = read_speed(args.results / "speed")
    fill(args.out / "README.md", "speed", speed_table(speed, EXPERIMENTS["systems"], known))
    gap = read_gap(args.results / "gap")
    fill(args.out / "README.md", "gap", gap_table(gap))
    plots.plot_gap(gap, args.out / "plots")


if __name__ == "__main__":
    main()
