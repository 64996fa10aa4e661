#!/usr/bin/env python3
"""Measure what fairseq_evomoe costs, and write it down as JSON and as a Markdown table.

    python examples/benchmark/run.py [layer] [routers] [peers] [scaling] [programs] [--out DIR]

Without names, all parts.  Everything that is compared runs in turn in one process (whole programs: one
after the other), so that a noisy machine hits all alike.  With --limit, exits with 1 if a case of the
layer costs more than so many times its target.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ["layer", "routers", "peers", "scaling", "programs"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="of " + ", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="folder for results.json, results.md and scaling.svg")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each function")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each whole program")
    parser.add_argument("--quick", action="store_true", help="three small cases of the layer: half a minute")
    for name, what in (("tokens", "a batch"), ("dim", "width of a token"), ("hidden", "of an expert")):
        parser.add_argument("--" + name, type=int, help=f"{what}, of the parts layer and routers")
    parser.add_argument("--device", help="of the parts layer and routers, such as cuda (cpu)")
    parser.add_argument("--dtype", help="of the parts layer and routers, such as bfloat16 (float32)")
    parser.add_argument("--limit", type=float, help="factor of a layer case's target that is still accepted")
    parser.add_argument("--lm-data", type=Path, help="binarised text for language models; made up if missing")
    parser.add_argument("--translation-data", type=Path, help="binarised pairs; made up if missing")
    args = parser.parse_args(arguments)
    for part in args.parts:
        if part not in PARTS:
            parser.error("there is no part {!r}, but {}".format(part, ", ".join(PARTS)))
    if args.limit and args.parts and "layer" not in args.parts and not args.quick:
        parser.error("--limit is of the part layer: name it, too, or leave --limit out")
    return args


def too_slow(rows: list[dict], limit: float) -> list[str]:
    """The cases of the layer that cost more than ``limit`` times their target by every measure.

    A busy machine spoils one measure or another, but not all of them.
    """
    return [r["case"] for r in rows if r["target"] and min(r["ratio"].values()) > limit * r["target"]]


def main() -> int:
    """Run the parts, write the results."""
    args = parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported, and for whole programs
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import torch
    from report import markdown
    from timing import machine

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    made = {"command": " ".join(sys.argv), "machine": machine(args.threads)}
    old = args.out / "results.json" if args.out else None
    # parts can be measured one at a time
    results = json.loads(old.read_text()) if old is not None and old.exists() else {}
    named = {name: getattr(args, name) for name in ("tokens", "dim", "hidden", "device", "dtype")}
    sizes = {name: value for name, value in named.items() if value is not None}
    for part in ["layer"] if args.quick else args.parts or PARTS:
        print(part, flush=True)
        if part == "layer":
            import layer

            results[part] = layer.run(args.quick, args.repeats, **sizes)
        elif part == "routers":
            import routers

            results[part] = routers.run(args.repeats, **sizes)
        elif part == "peers":
            import peers

            results[part] = peers.run(args.repeats)
        elif part == "scaling":
            import scaling

            results[part] = scaling.run(args.repeats)
        else:
            import programs

            results[part] = programs.run(
                args.out, args.threads, args.rounds, args.lm_data, args.translation_data
            )
        results[part]["made"] = made
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (args.out / "results.md").write_text(markdown(results))
            if part == "scaling":
                scaling.plot(results[part], args.out / "scaling.svg")
    print("\n" + markdown(results))
    slow = too_slow(results["layer"]["rows"], args.limit) if args.limit else []
    for case in slow:
        print(f"more than {args.limit:g} x its target: {case}")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
