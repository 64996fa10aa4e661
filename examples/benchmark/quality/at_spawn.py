#!/usr/bin/env python3
"""What a spawn does to what a model computes: the layer's output and the loss just before and just after.

A small causal LM has one expert for 200 updates, then 8, and from update 300 on 32, copies of their parents,
so that what changes is what the router makes of them. All is measured in evaluation, on valid. A table, and a
JSON line for each spawn; a minute for each system on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "systems"), str(HERE.parents[2])]

import json_lines  # noqa: E402
import torch  # noqa: E402
from tables import table  # noqa: E402
from task_data import prepared_small  # noqa: E402

from fairseq_evomoe.models.feed_forward import moe_layers  # noqa: E402
from fairseq_evomoe.moe import record  # noqa: E402
from fairseq_evomoe.training import growth  # noqa: E402
from fairseq_evomoe.training.in_process import Training  # noqa: E402

SPAWNS, AFTER = ((200, 8), (300, 32)), (20, 100)
SYSTEMS = {
    "hash": "--moe-router hash",
    "switch": "--moe-router switch",
    "switch, rescaled": "--moe-router switch --moe-spawn-rescale",
    "switch, straight-through": "--moe-router switch --moe-renormalize straight-through",
    "dts, soft": "--moe-router dts --moe-hard-update -1 --moe-eval-routing adaptive",
    "dts, top-1 at once": "--moe-router dts --moe-hard-update 0 --moe-gate-noise soft",
    "dts, top-1 at once, rescaled": (
        "--moe-router dts --moe-hard-update 0 --moe-gate-noise soft --moe-spawn-rescale"
    ),
    "evomoe_context, top-1 at once": "--moe-preset evomoe_context --moe-hard-update 0",
    "topk (Mixtral's weights)": "--moe-router topk",
    "topk, weights not divided": "--moe-router topk --moe-renormalize never",
    "top-p": "--moe-router top-p",
    "base": "--moe-router base",
    "stable": "--moe-router stable --moe-stable-update 390",
    "xmoe": "--moe-router xmoe",
    "dynmoe": "--moe-router dynmoe",
    "remoe": "--moe-router remoe",
}
MODEL = (
    "--task language_modeling --arch evomoe_lm --criterion evomoe_cross_entropy "
    "--share-decoder-input-output-embed --decoder-layers 2 --decoder-embed-dim 64 --decoder-input-dim 64 "
    "--decoder-output-dim 64 --decoder-ffn-embed-dim 128 --decoder-attention-heads 4 "
    "--decoder-normalize-before --dropout 0 --tokens-per-sample 32 --sample-break-mode none --batch-size 16 "
    "--optimizer adam --adam-betas (0.9,0.98) --clip-norm 1.0 --lr 0.004 --lr-scheduler inverse_sqrt "
    "--warmup-updates 20 --max-update 400 --num-workers 0 --data-buffer-size 0 --cpu --seed 1"
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    add = result.add_argument
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME")
    add("--work", type=Path, default=Path("quality"), help="folder for the data (quality)")
    add("--out", type=Path, help="file for the JSON lines; those that it has are not measured again")
    return result


@torch.no_grad()
def evaluated(training: Training) -> dict[str, float]:
    """Bits of a token of valid, and means of the layer's output and of what a token's experts weigh."""
    model, criterion = training.model, training.trainer.get_criterion()
    norms: list[float] = []
    weights: list[float] = []
    (layer,) = (layer for _, layer in moe_layers(model))
    handle = layer.moe.register_forward_hook(
        lambda module, given, output: norms.append(output.norm(dim=-1).mean().item())
    )
    bits = tokens = 0.0
    model.eval()
    valid = training.task.get_batch_iterator(training.task.dataset("valid"), max_sentences=64, seed=1)
    for sample in valid.next_epoch_itr(shuffle=False):
        with record() as routings:
            _, size, output = training.task.valid_step(sample, model, criterion)
        bits, tokens = bits + float(output["loss"]) / math.log(2), tokens + float(size)
        routing = routings[layer.moe]
        weights.append((routing.weight_N.sum() / max(routing.tokens, 1)).item())
    handle.remove()
    model.train()
    return {
        "bits": bits / tokens,
        "norm": sum(norms) / len(norms),
        "weight": sum(weights) / len(weights),
    }


def measured(name: str, data: Path) -> list[dict[str, Any]]:
    """A line for each spawn of a system."""
    spawns = ",".join(f"{update}:{experts}" for update, experts in SPAWNS)
    flags = [str(data), *MODEL.split(), "--user-dir", str(HERE.parents[2] / "fairseq_evomoe")]
    flags += ["--moe-spawn-update", spawns, "--moe-spawn-method", "copy", *SYSTEMS[name].split()]
    with contextlib.redirect_stdout(io.StringIO()):
        training = Training(flags, load=False)
        training.task.load_dataset("valid")
    found = []
    for update, experts in SPAWNS:
        training.update(update - training.updates)
        before = evaluated(training)
        growth.spawn(training.trainer)
        line = {"system": name, "experts": experts, "before": before, "after": evaluated(training)}
        for more in AFTER:
            training.update(update + more - training.updates)
            line[f"after {more}"] = evaluated(training)
        found.append(line)
    return found


def as_table(lines: list[dict[str, Any]]) -> str:
    """A row for each system and spawn."""

    def more(line: dict[str, Any], when: str) -> str:
        return f"{100 * (2 ** (line[when]['bits'] - line['before']['bits']) - 1):+.1f}%"

    heads = ["router", "experts from then on", "a token's experts weigh", "output", "perplexity at once"]
    heads += [f"{n} updates later" for n in AFTER]
    rows = []
    for line in lines:
        before, after = line["before"], line["after"]
        cells = [line["system"], str(line["experts"]), f"{before['weight']:.2f} to {after['weight']:.2f}"]
        cells += [f"x {after['norm'] / before['norm']:.2f}", more(line, "after")]
        rows.append([*cells, *(more(line, f"after {n}") for n in AFTER)])
    return table(heads, rows)


def main() -> None:
    """Measure what is missing, and print the table."""
    args = parser().parse_args()
    data = prepared_small([("english",)], args.work.resolve())[("english",)] / "bin"
    logging.disable(logging.WARNING)
    lines = json_lines.read(args.out) if args.out is not None else []
    known = {(line["system"], line["experts"]): line for line in lines}
    for name in args.systems:
        if not known.keys() >= {(name, experts) for _, experts in SPAWNS}:
            for line in measured(name, data):
                known[name, line["experts"]] = line
                if args.out is not None:
                    json_lines.append(args.out, line)
            print(f"{name} is measured", file=sys.stderr, flush=True)
    print(as_table([line for line in known.values() if line["system"] in args.systems]))


if __name__ == "__main__":
    main()
