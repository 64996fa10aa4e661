#!/usr/bin/env python3
"""Measure what the layer, the routers and other implementations cost on a GPU, and where the time goes.

    python examples/benchmark/gpu.py [PART ...] --out FOLDER

Each figure is a JSON line of FOLDER/gpu.jsonl as soon as it is there; the same command goes on where it was
cut, and makes FOLDER/gpu.md of what there is.  `step` trains on the text of --data, or on random words.  With
--quick everything is small, also on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "systems"), str(HERE.parents[1])]

import gpu_cases as cases  # noqa: E402
import torch  # noqa: E402
from gpu_measure import Results  # noqa: E402
from gpu_report import report  # noqa: E402
from layer import Size  # noqa: E402
from timing import machine  # noqa: E402

PARTS = {
    "layer": cases.measure_layer,
    "step": cases.measure_step,
    "routers": cases.measure_routers,
    "peers": cases.measure_peers,
    "profile": cases.measure_profile,
    "sizes": cases.measure_sizes,
    "compiled": cases.measure_compiled,
    "router-sizes": cases.measure_router_sizes,
}
"""In the order in which they are worth most, should time be up."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("parts", nargs="*", metavar="part", help="of " + ", ".join(PARTS))
    add("--out", type=Path, required=True, help="folder for gpu.jsonl and gpu.md")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", type=Path, help="folder that fairseq reads, for step; random words if not given")
    add("--repeats", type=int, default=20, help="timed runs of each function (20)")
    add("--seconds", type=float, default=300, help="begin nothing new after so long (300)")
    add("--quick", action="store_true", help="everything small, to see that it works")
    return result


def main() -> int:
    """Measure what is not known yet."""
    args = parser().parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser().error(f"there is no part {unknown[0]!r}, but {', '.join(PARTS)}")
    torch.manual_seed(0)
    gc.freeze()  # what the libraries have made stays, so that to look for it before each figure is in vain
    results = Results(args.out, args.seconds)
    size = Size(16384, 1024, 4096, args.device, "bfloat16")
    if args.quick:
        size, args.repeats = Size(64, 16, 32, args.device, "bfloat16"), 2
    results.measure("machine", "machine", lambda: {"machine": machine(torch.get_num_threads())})
    for part in args.parts or PARTS:
        PARTS[part](results, size, args)
        (args.out / "gpu.md").write_text(report(results.known))  # after each part, should there be a cut
    return 0


if __name__ == "__main__":
    sys.exit(main())
