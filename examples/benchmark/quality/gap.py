#!/usr/bin/env python3
"""Follow a causal LM through its soft stage: its loss with the routing of training and of evaluation.

While training, the gate has noise and a token several experts; in evaluation it has no noise and a token one
expert, or, with adaptive routing, those over the threshold. Each checkpoint is evaluated in all three ways.
Interrupted, the same command goes on where it stopped. `report.py` makes a table and a plot of the results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "systems"))

import json_lines
from evaluate import batches, bits_and_tokens, load, versions
from protocol import GAP, HERE, TASKS, UPDATES, Run, Variant
from records import read_gap
from task_data import prepared

POINTS = 20
"""Number of checkpoints of a run."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    add = result.add_argument
    add("--labels", nargs="+", metavar="LABEL", help="only the systems with these labels")
    add("--updates", type=int, default=UPDATES, help=f"length of a run ({UPDATES})")
    add("--work", type=Path, default=Path("quality"), help="folder for data, logs and checkpoints (quality)")
    add(
        "--results",
        type=Path,
        default=HERE / "results/1/gap",
        help="folder of results (results/1/gap)",
    )
    return result


def train(run: Run, data: Path, folder: Path) -> None:
    """Train, and keep a checkpoint of each of the points."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    every = ["--save-interval-updates", str(max(run.updates // POINTS, 1)), "--keep-interval-updates", "-1"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.log").open("a") as log:
        done = subprocess.run([*run.command(data, folder), *every], env=environment, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"gap.py: training failed, see {folder / 'train.log'}.")


@torch.no_grad()
def loss(checkpoint: Path, data: Path, update: int, routing: str) -> tuple[float, float]:
    """Loss on valid in bits per token, and experts of a token.

    Args:
        checkpoint: of the model.
        data: folder that fairseq reads.
        update: that the checkpoint was saved at.
        routing: `training`, `adaptive` or `top1`.
    """
    options = {} if routing == "training" else {"moe_eval_routing": routing}
    model, criterion, task = load(checkpoint, data, options)
    model.set_num_updates(update)
    model.train(routing == "training")
    bits = tokens = 0.0
    assignments = routed = 0.0
    for sample in batches(task, model, "valid"):
        _, _, output = criterion(model, sample)
        found = bits_and_tokens(output)
        bits, tokens = bits + found[0], tokens + found[1]
        assignments += float(output["moe_assignments"])
        routed += float(output["moe_tokens"])
    return bits / tokens, assignments / routed


def points(variant: Variant, run: Run, data: Path, folder: Path, known: set[int]) -> Iterator[dict[str, Any]]:
    """Evaluate each checkpoint that is not known yet; yield a record for each."""
    for path in sorted(folder.glob("checkpoint_*_*.pt"), key=lambda path: int(path.stem.split("_")[2])):
        update = int(path.stem.split("_")[2])
        if update in known:
            continue
        record = {"label": variant.label, "update": update, "updates": run.updates, "seed": run.seed}
        for routing in ("training", "adaptive", "top1"):
            bits, experts = loss(path, data, update, routing)
            record[routing] = {"loss": round(bits, 5), "moe_experts": round(experts, 3)}
        yield {**record, "arguments": run.arguments, "versions": versions()}


def main() -> None:
    """Train, evaluate and append a line for each checkpoint."""
    args = parser().parse_args()
    task = TASKS["lm"]
    data = prepared([task.corpus], args.work.resolve())[task.corpus] / "bin"
    for variant in GAP:
        if args.labels is not None and variant.label not in args.labels:
            continue
        run = variant.run(task, 1, args.updates)
        known = {record["update"] for record in read_gap(args.results).get(variant.label, [])}
        if args.updates in known:
            continue
        folder = args.work.resolve() / "gap" / run.key
        train(run, data, folder)
        for record in points(variant, run, data, folder, known):
            json_lines.append(args.results / f"{task.id}.jsonl", record)
            print(
                json.dumps({key: record[key] for key in ("label", "update", "training", "top1")}), flush=True
            )


if __name__ == "__main__":
    main()
