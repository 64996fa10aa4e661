#!/usr/bin/env python3
"""Make all that the results say: `results.md`, the tables of README.md between its markers, and `plots/`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from pathlib import Path

import plots
from claims import claims_table
from growth import GROWTH
from growth_tables import verdict
from protocol import EXPERIMENTS, HERE
from records import differences, read, read_gap, read_steps
from results_page import page


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    add = result.add_argument
    add("--results", type=Path, default=HERE / "results", help="folder of the results (results, here)")
    add("--out", type=Path, default=HERE, help="folder of README.md, results.md and plots (here)")
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
    logging.disable(logging.INFO)  # fairseq lets matplotlib tell all it does
    known = read(args.results)
    if args.same:
        wrong = differences(known, read(args.same))
        print("\n".join(wrong) if wrong else "equal")
        sys.exit(1 if wrong else 0)
    (args.out / "results.md").write_text(page(args.results), encoding="utf-8")
    fill(args.out / "README.md", "claims", claims_table(known))
    fill(args.out / "README.md", "growth", verdict(known, read_steps(args.results / "2" / "steps")))
    for experiment in (*EXPERIMENTS.values(), *GROWTH.values()):
        plots.plot(experiment, known, args.out / "plots")
    plots.plot_gap(read_gap(args.results / "1" / "gap"), args.out / "plots")


if __name__ == "__main__":
    main()
