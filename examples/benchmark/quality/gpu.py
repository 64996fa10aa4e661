#!/usr/bin/env python3
"""Train a dense model, Switch and EvoMoE side by side on one GPU, in a few minutes.

    python examples/benchmark/quality/gpu.py DATA --out FOLDER

DATA is what fairseq reads (examples/data/prepare.py makes it). All systems take turns, some updates each, so
that a run that is cut has curves of the same updates. Each figure is a JSON line of FOLDER/quality.jsonl as
soon as it is there, and FOLDER/quality.md a table of them; with --save the same command goes on where it was
cut. With --quick everything is small, also on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "systems"), str(HERE.parents[2])]

import torch  # noqa: E402
from fairseq import options, tasks  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402
from protocol import read  # noqa: E402
from systems import Settings, System  # noqa: E402

SPAWN = {"moe_spawn_update": "10%"}
# name -> file of the system, what is changed of it, and with how many experts it is trained
SYSTEMS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "dense": ("dense", {}, (1,)),
    "Switch": ("switch", {}, (16, 64)),
    "EvoMoE, one spawn at 10%": ("evomoe_confident", SPAWN, (16, 64)),
    "EvoMoE, published": ("evomoe_published", {}, (16, 64)),
}
MODEL = (
    "--decoder-layers 8 --decoder-embed-dim 512 --decoder-input-dim 512 --decoder-output-dim 512 "
    "--decoder-ffn-embed-dim 2048 --decoder-attention-heads 8 --dropout 0.1 "
    "--tokens-per-sample 128 --batch-size 64 --lr 0.0007"
)
SMALL = "--decoder-layers 2 --tokens-per-sample 16 --batch-size 4"
BATCHES: dict[tuple[str, int, int], list[Any]] = {}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("data", type=Path, help="folder that fairseq reads")
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


class Contestant:
    """A system in training, as `fairseq-train` would build it."""

    def __init__(self, label: str, system: System, args: argparse.Namespace, sizes: Sequence[str]) -> None:
        cuda = torch.cuda.is_available()
        settings = Settings(args.data, "lm", args.updates, (*sizes, *(() if cuda else ("--cpu",))))
        self.folder = args.out / "checkpoints" / "".join(c if c.isalnum() else "-" for c in label)
        flags = settings.train(system, args.seed, self.folder)[1:]
        known = options.parse_args_and_arch(options.get_training_parser(), input_args=flags)
        cfg = convert_namespace_to_omegaconf(known)
        cfg.common.bf16 = cuda  # the flag asks for a TPU, too
        self.label, self.updates_in_all, self.epoch = label, args.updates, 0
        torch.manual_seed(args.seed)
        self.cfg, self.task = cfg, tasks.setup_task(cfg.task)
        for split in ("train", "valid"):
            self.task.load_dataset(split)
        model, criterion = self.task.build_model(cfg.model), self.task.build_criterion(cfg.criterion)
        self.trainer = Trainer(cfg, self.task, model, criterion)
        self.seconds = 0.0
        self.valid = self._batches("valid", 1, args.batches)

    @property
    def updates(self) -> int:
        """How many there were."""
        return self.trainer.get_num_updates()

    def _batches(self, split: str, epoch: int, most: int) -> list[Any]:
        """The batches of an epoch, the same for all systems, which take them one from the other."""
        key = split, epoch, most
        if key not in BATCHES:
            iterator = self.task.get_batch_iterator(
                self.task.dataset(split),
                max_sentences=self.cfg.dataset.batch_size,
                seed=self.cfg.common.seed,
                epoch=epoch,
            )
            BATCHES[key] = list(itertools.islice(iterator.next_epoch_itr(shuffle=split == "train"), most))
        return BATCHES[key]

    def _batch(self, update: int) -> Any:
        per_epoch = len(self._batches("train", 1, self.updates_in_all))
        epoch = update // per_epoch + 1
        if epoch != self.epoch:
            self.epoch = epoch
            self.trainer.begin_epoch(epoch)
        return self._batches("train", epoch, self.updates_in_all)[update % per_epoch]

    def train(self, updates: int) -> float:
        """Make so many updates; the mean of the training loss, as the criterion logs it."""
        batches = [self._batch(self.updates + i) for i in range(updates)]
        found = []
        _wait()
        start = time.perf_counter()
        for batch in batches:
            output = self.trainer.train_step([batch])
            found.append(float((output or {}).get("loss", math.nan)))
        _wait()
        self.seconds += time.perf_counter() - start
        return sum(found) / max(len(found), 1)

    def validate(self) -> float:
        """Bits of each token of the valid part."""
        model, criterion = self.trainer.get_model(), self.trainer.get_criterion()
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

    def save(self) -> None:
        """Write a checkpoint, to go on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trainer.consolidate_optimizer()
        state = {"train_iterator": {"epoch": self.epoch}, "seconds": self.seconds}
        self.trainer.save_checkpoint(str(self.folder / "last.pt"), state)

    def load(self) -> None:
        """Go on from a checkpoint, if there is one."""
        path = self.folder / "last.pt"
        if path.exists():
            self.seconds = self.trainer.load_checkpoint(str(path))["seconds"]


def contestants(args: argparse.Namespace) -> list[Contestant]:
    """All systems, built and perhaps loaded."""
    made = []
    for name, (file, changes, sizes) in SYSTEMS.items():
        for experts in (4,) if args.quick else [size for size in sizes if size in (1, *args.experts)]:
            system = read(file)
            label = name if system.dense else "{}, {} experts".format(name, experts)
            more = {} if system.dense else {"moe_experts": experts}
            system = dataclasses.replace(system, options={**system.options, **changes, **more})
            start = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                made.append(Contestant(label, system, args, (SMALL if args.quick else MODEL).split()))
                made[-1].load()
            print("{}: built in {:.1f} s".format(label, time.monotonic() - start), flush=True)
    return made


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    text += ["", "| system | valid perplexity | against dense | seconds | of dense's |"]
    text += ["| --- | --: | --: | --: | --: |"]
    for label, of in points.items():
        point = of[last]
        text.append(
            "| {} | {:.2f} | {:+.1f}% | {:.1f} | {:.2f} |".format(
                *(label, 2 ** point["bits"], 100 * (2 ** (point["bits"] - dense["bits"]) - 1)),
                *(point["seconds"], point["seconds"] / dense["seconds"]),
            )
        )
    return "\n".join(text) + "\n"


def main() -> int:
    """Train in turn; 0 if all was trained or time was up."""
    args = parser().parse_args()
    if args.quick:
        args.updates, args.piece, args.batches = 20, 5, 2
    end = time.monotonic() + args.seconds
    logging.disable(logging.INFO)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "quality.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(line["label"], line["update"]) for line in lines if "label" in line}

    def add(line: dict) -> None:
        lines.append(line)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
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
            loss = system.train(update - system.updates)
            line = {"label": system.label, "update": update, "seconds": round(system.seconds, 3)}
            line.update(train_loss=round(loss, 4), bits=round(system.validate(), 5))
            if torch.cuda.is_available():
                line["mib"] = round(torch.cuda.memory_allocated() / 2**20)
            if (system.label, update) not in known:
                add(line)
        (args.out / "quality.md").write_text(table(lines))
    if args.save:
        for system in systems:
            system.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
