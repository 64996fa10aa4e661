#!/usr/bin/env python3
"""Evaluate a finished run on the test set and append what came out of it to a file, as one JSON line.

The line has the run's flags, versions, curve and costs, and the test set's losses in chunks, which the
bootstrap draws from: it is all that tables and plots are made of.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
from pathlib import Path
from typing import Any

import fairseq
import sacrebleu
import torch
from fairseq import checkpoint_utils, metrics
from fairseq import utils as fairseq_utils
from torch import nn

import fairseq_evomoe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "systems"))

import json_lines
import logs

CHUNK = 16
"""Sentences or blocks of text in a chunk."""

STATISTICS = ("moe_experts", "moe_active_params", "moe_load_entropy", "moe_load_max", "moe_gate_entropy")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    add = result.add_argument
    add("run", type=Path, help="folder of the run: run.json, train.log, train.json, checkpoint_last.pt")
    add("data", type=Path, help="folder that prepare.py has made")
    add("--results", type=Path, required=True, help="file to append to")
    add("--references", type=Path, help="with translation: what its generate.log is compared with")
    return result


def load(checkpoint: Path, data: Path, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Model, criterion and task of a checkpoint, with some options of the model replaced."""
    # masks of a masked LM depend on the seed: the same for all runs
    overrides = {"data": str(data), "seed": 1, **options}
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], overrides)
    return models[0].eval(), task.build_criterion(cfg.criterion).eval(), task


def batches(task: Any, model: nn.Module, split: str) -> Any:
    """The batches of a part of the data, always the same."""
    task.load_dataset(split)
    return task.get_batch_iterator(
        task.dataset(split),
        max_sentences=CHUNK,
        max_positions=fairseq_utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        seed=1,
    ).next_epoch_itr(shuffle=False)


def bits_and_tokens(output: dict[str, Any]) -> tuple[float, int]:
    """The sum of the losses in bits, and over how many tokens, of what a criterion has logged."""
    loss = float(output.get("nll_loss", output["loss"])) / math.log(2)
    return loss, int(output["sample_size"])


def losses(checkpoint: Path, data: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Losses and routing on the test set.

    Args:
        checkpoint: of the model.
        data: folder that fairseq reads.
        options: of the model, to replace its own.

    Returns:
        `chunks`: for each chunk the sum of the losses in bits and the number of tokens; `loss`, their mean;
        means of the routing's statistics; `looked_up`, see `looked_up_parameters`.
    """
    model, criterion, task = load(checkpoint, data, options)
    outputs, chunks = [], []
    for sample in batches(task, model, "test"):
        with torch.no_grad():
            _, _, output = task.valid_step(sample, model, criterion)
        outputs.append(output)
        loss, tokens = bits_and_tokens(output)
        chunks.append([round(loss, 4), tokens])
    with metrics.aggregate(new_root=True) as found:
        task.reduce_metrics(outputs, criterion)
    values = found.get_smoothed_values()
    bits, tokens = (sum(part) for part in zip(*chunks))
    result = {name: float(values[name]) for name in STATISTICS if name in values}
    return {
        "loss": bits / tokens,
        "chunks": chunks,
        **result,
        "looked_up": looked_up_parameters(model),
    }


def looked_up_parameters(model: nn.Module) -> int:
    """Number of parameters among ``moe_active_params`` that are looked up and multiplied with nothing.

    These are embeddings that are not the output's weights too.  What a router has for each entry of the
    vocabulary, such as the table of ``--moe-gate-input table``, is not among them.
    """
    tables, multiplied = {}, set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tables[id(module.weight)] = module.weight
        else:  # which may have the weights of a table as its own
            multiplied.update(map(id, module.parameters(recurse=False)))
    return sum(p.numel() for key, p in tables.items() if key not in multiplied)


def bleu(generated: Path, references: Path) -> dict[str, Any]:
    """BLEU of what `fairseq-generate` has written, with the sums of each chunk that it is made of."""
    found = re.findall(r"^D-(\d+)\t\S+\t(.*)$", generated.read_text(encoding="utf-8"), flags=re.MULTILINE)
    hypotheses = [text for _, text in sorted((int(number), text) for number, text in found)]
    lines = references.read_text(encoding="utf-8").splitlines()
    if len(hypotheses) != len(lines):
        raise SystemExit(
            f"evaluate.py: {generated} has {len(hypotheses)} translations, {references} {len(lines)}."
        )
    metric = sacrebleu.metrics.BLEU()
    score = metric.corpus_score(hypotheses, [lines])
    chunks = []
    for start in range(0, len(lines), CHUNK):
        part = metric.corpus_score(hypotheses[start : start + CHUNK], [lines[start : start + CHUNK]])
        chunks.append([*part.counts, *part.totals, part.sys_len, part.ref_len])
    return {"bleu": score.score, "bleu_chunks": chunks, "signature": str(metric.get_signature())}


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "fairseq_evomoe": fairseq_evomoe.__version__,
        "sacrebleu": sacrebleu.__version__,
    }


def evaluate(folder: Path, data: Path, references: Path | None = None) -> dict[str, Any]:
    """All there is to know of a finished run."""
    run = json.loads((folder / "run.json").read_text())
    checkpoint = folder / "checkpoint_last.pt"
    test = losses(checkpoint, data / "bin", {})
    looked_up = test.pop("looked_up")
    log = logs.read(folder / "train.log", "valid_nll_loss" if references else "valid_loss", looked_up)
    record = {
        **run,
        "versions": versions(),
        "parameters": log.parameters,
        "active_parameters": log.active_parameters - looked_up,
        "looked_up_parameters": looked_up,
        "seconds": round(log.seconds, 2),
        "seconds_per_update": round(log.seconds_per_update, 5),
        "flops": log.flops,
        "peak_mib": json.loads((folder / "train.json").read_text())["peak_mib"],
        "curve": [[p.update, round(p.seconds, 2), p.flops, p.loss] for p in log.curve],
        "valid_loss": log.curve[-1].loss,
        "drift": log.drift,
        "rises": log.rises,
        "test": test,
    }
    if "--moe-router dts" in " ".join(run["arguments"]):
        adaptive = losses(checkpoint, data / "bin", {"moe_eval_routing": "adaptive"})
        record["adaptive"] = {name: adaptive[name] for name in ("loss", "moe_experts")}
    if references:
        record["test"].update(bleu(folder / "generate.log", references))
    return record


def main() -> None:
    """Evaluate, append, and delete the checkpoints."""
    args = parser().parse_args()
    json_lines.append(args.results, evaluate(args.run, args.data, args.references))
    for checkpoint in args.run.glob("*.pt"):
        checkpoint.unlink()


if __name__ == "__main__":
    main()
