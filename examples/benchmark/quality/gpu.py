#!/usr/bin/env python3
"""Train dense, Switch and EvoMoE, from the start and in stages, side by side on one GPU in eight minutes.

    python examples/data/prepare.py domains data/domains
    python examples/benchmark/quality/gpu.py data/domains/bin --out FOLDER

All systems take turns, some updates each, so that a run that is cut has curves of the same updates, and the
seconds of all are of the same minutes. Each figure is a JSON line of FOLDER/quality.jsonl as soon as it is
there, and FOLDER/quality.md a table of them; with --save the same command goes on where it was cut. With
--quick everything is small, also on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "systems"), str(HERE.parents[2])]

import json_lines  # noqa: E402
import torch  # noqa: E402
from growth import START, as_the_preset, stages  # noqa: E402
from protocol import BOTH, read  # noqa: E402
from systems import Settings, System  # noqa: E402

from fairseq_evomoe.training.growth import count_parameters  # noqa: E402
from fairseq_evomoe.training.in_process import Training  # noqa: E402

Changes = Callable[[int], dict[str, Any]]
"""Options of a system that are changed, by its number of experts."""


def _in_stages(experts: int) -> dict[str, Any]:
    return next(way for name, way in stages(experts).items() if name.startswith("stages"))


# name -> file of the system, and what is changed of it; each with every number of experts, but dense
SYSTEMS: dict[str, tuple[str, Changes]] = {
    "dense": ("dense", lambda experts: {}),
    "Switch from the start": ("switch", lambda experts: START),
    "Switch in stages": ("switch", _in_stages),
    "EvoMoE, published": ("evomoe_published", lambda experts: {}),
    "context from the start": ("evomoe_confident", lambda experts: {**BOTH, **START}),
    "context, one spawn at 10%": ("evomoe_confident", lambda experts: {**BOTH, "moe_spawn_update": "10%"}),
    "context in stages": ("evomoe_confident", as_the_preset),
}
"""``context`` is the preset ``evomoe_context`` at top-1 from the spawn on, in stages ``evomoe_stages``."""
MODEL = (
    "--decoder-layers 8 --decoder-embed-dim 512 --decoder-input-dim 512 --decoder-output-dim 512 "
    "--decoder-ffn-embed-dim 2048 --decoder-attention-heads 8 --dropout 0.1 "
    "--tokens-per-sample 128 --batch-size 64 --lr 0.0007"
)
SMALL = "--decoder-layers 2 --tokens-per-sample 16 --batch-size 4"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("data", type=Path, help="folder that fairseq reads: domains")
    add("--out", type=Path, required=True, help="folder for quality.jsonl and quality.md")
    add("--updates", type=int, default=500, help="length of each run (500)")
    add("--piece", type=int, default=50, help="updates of one system before it is the next one's turn (50)")
    add("--experts", type=int, nargs="+", default=[16, 64], help="of how many of each system (16 64)")
    add("--batches", type=int, default=10, help="how many batches of the valid part are looked at (10)")
    add("--seconds", type=float, default=440, help="stop after so long (440)")
    add("--stop", type=int, help="stop after this update, whatever the time is")
    add("--seed", type=int, default=1)
    add("--save", action="store_true", help="save all models when time is up, to go on from there")
    add("--quick", action="store_true", help="everything small, to see that it works")
    return result


class Contestant(Training):
    """A system in training, as `fairseq-train` would build it.

    Attributes:
        label: what to call it.
        seconds: of its updates, spawns among them.
        valid: the batches that it is validated with.
    """

    def __init__(self, label: str, system: System, args: argparse.Namespace, sizes: Sequence[str]) -> None:
        cuda = torch.cuda.is_available()
        settings = Settings(args.data, "lm", args.updates, (*sizes, *(() if cuda else ("--cpu",))))
        folder = args.out / "checkpoints" / "".join(c if c.isalnum() else "-" for c in label)
        self.label, self.path = label, folder / "checkpoint_last.pt"
        flags = settings.train(system, args.seed, folder)[1:]
        super().__init__(flags, common={"bf16": cuda})  # whose flag asks for a TPU, too
        self.seconds = float(self.restored.get("seconds", 0.0))
        self.task.load_dataset("valid")
        valid = self.task.get_batch_iterator(
            self.task.dataset("valid"), max_sentences=self.cfg.dataset.batch_size, seed=args.seed
        )
        self.valid = list(itertools.islice(valid.next_epoch_itr(shuffle=False), args.batches))

    def train(self, updates: int) -> float:
        """Make so many updates; the mean of the training loss, as the criterion logs it."""
        made = self.update(updates)
        self.seconds += made.seconds
        losses = [float(log.get("loss", math.nan)) for log in made.logs]
        return sum(losses) / max(len(losses), 1)

    def validate(self) -> float:
        """Bits of each token of the valid part."""
        model, criterion = self.model, self.trainer.get_criterion()
        model.eval()
        bits = tokens = 0.0
        with torch.no_grad():
            for sample in self.valid:
                sample, _ = self.trainer._prepare_sample(sample)
                _, size, output = self.task.valid_step(sample, model, criterion)
                bits += float(output.get("nll_loss", output["loss"])) / math.log(2)
                tokens += float(size)
        model.train()
        return bits / tokens

    def line(self, update: int, train_loss: float) -> dict[str, Any]:
        """What is known of it at an update."""
        return {
            "label": self.label,
            "update": update,
            "seconds": round(self.seconds, 3),
            "train_loss": round(train_loss, 4),
            "bits": round(self.validate(), 5),
            "parameters": count_parameters(self.model),
        }


def contestants(args: argparse.Namespace) -> list[Contestant]:
    """All systems, built and perhaps loaded."""
    made = []
    for name, (file, changes) in SYSTEMS.items():
        base = read(file)
        for experts in args.experts[:1] if base.dense else args.experts:
            label = name if base.dense else "{}, {} experts".format(name, experts)
            more = {} if base.dense else {"moe_experts": experts, **changes(experts)}
            system = dataclasses.replace(base, options={**base.options, **more})
            start = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                made.append(Contestant(label, system, args, (SMALL if args.quick else MODEL).split()))
            print("{}: built in {:.1f} s".format(label, time.monotonic() - start), flush=True)
    return made


def table(lines: list[dict]) -> str:
    """The last update that all systems have reached, as Markdown."""
    points: dict[str, dict[int, dict]] = {}
    for line in lines:
        if "label" in line:
            points.setdefault(line["label"], {})[line["update"]] = line
    common = set.intersection(*(set(of) for of in points.values())) if points else set()
    if not common:
        return "No update has been reached by all systems yet.\n"
    last = max(common)
    dense = next(of[last] for label, of in points.items() if label.startswith("dense"))
    header = next((line for line in lines if "machine" in line), {})
    text = [
        "After {} updates of {} ({}); one seed.".format(last, header.get("updates"), header.get("machine"))
    ]
    text += [
        "",
        "| system | valid perplexity | against dense | seconds | of dense's | memory x time, of dense's |",
    ]
    text += ["| --- | --: | --: | --: | --: | --: |"]
    used = {label: memory_seconds(points[label], last) for label in points}
    dense_used = next(value for label, value in used.items() if label.startswith("dense"))
    for label, of in points.items():
        point = of[last]
        text.append(
            "| {} | {:.2f} | {:+.1f}% | {:.1f} | {:.2f} | {:.2f} |".format(
                *(label, 2 ** point["bits"], 100 * (2 ** (point["bits"] - dense["bits"]) - 1)),
                *(point["seconds"], point["seconds"] / dense["seconds"], used[label] / dense_used),
            )
        )
    return "\n".join(text) + "\n"


def memory_seconds(points: dict[int, dict], last: int) -> float:
    """Parameters times the seconds for which they were there, up to an update."""
    total = before = 0.0
    for _, point in sorted((update, point) for update, point in points.items() if update <= last):
        total += point["parameters"] * (point["seconds"] - before)
        before = point["seconds"]
    return total


def main() -> int:
    """Train in turn; 0 if all was trained or time was up."""
    args = parser().parse_args()
    if args.quick:
        args.updates, args.piece, args.batches, args.experts = 20, 5, 2, [8]
    end = time.monotonic() + args.seconds
    logging.disable(logging.INFO)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "quality.jsonl"
    lines = json_lines.read(path)
    known = {(line["label"], line["update"]) for line in lines if "label" in line}

    def add(line: dict) -> None:
        lines.append(line)
        json_lines.append(path, line)
        print(line, flush=True)

    if not lines:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        sizes = SMALL if args.quick else MODEL
        add({"machine": gpu, "torch": torch.__version__, "updates": args.updates, "sizes": sizes})
    systems = contestants(args)
    for update in range(args.piece, (args.stop or args.updates) + 1, args.piece):
        for system in systems:
            if system.updates >= update or time.monotonic() > end:
                continue
            line = system.line(update, system.train(update - system.updates))
            if (system.label, update) not in known:
                add(line)
        (args.out / "quality.md").write_text(table(lines))
    if args.save:
        for system in systems:
            system.save(system.path, seconds=system.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
