"""Whole programs by the console scripts: training steps and generation beside fairseq's own dense models."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

SCRIPTS = Path(sys.executable).parent
PLUGIN = Path(__file__).resolve().parents[2] / "fairseq_evomoe"
UPDATES, INTERVAL = 40, 10

COMMON = """
    --optimizer adam --lr 0.0005 --clip-norm 1.0 --log-format json --no-progress-bar --no-epoch-checkpoints
    --disable-validation --num-workers 0 --seed 1
""".split()
DECODER = """
    --decoder-layers 4 --decoder-embed-dim 256 --decoder-ffn-embed-dim 1024 --decoder-attention-heads 4
""".split()
ENCODER = """
    --encoder-layers 4 --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024 --encoder-attention-heads 4
""".split()
TEXT = "--tokens-per-sample 64 --sample-break-mode none --batch-size 16".split()
MODELS = {
    "language model": (
        "language_modeling transformer_lm cross_entropy evomoe_lm evomoe_cross_entropy",
        [*TEXT, *DECODER, "--decoder-input-dim", "256", "--decoder-output-dim", "256"],
    ),
    "masked language model": (
        "masked_lm roberta masked_lm evomoe_roberta evomoe_masked_lm",
        [*TEXT, *ENCODER, "--max-positions", "66"],
    ),
    "translation": (
        "translation transformer label_smoothed_cross_entropy"
        " evomoe_transformer evomoe_label_smoothed_cross_entropy",
        [*ENCODER, *DECODER, "--share-all-embeddings", "--label-smoothing", "0.1", "--batch-size", "24"],
    ),
}
BEFORE = "before the spawn"
PHASES = {  # name -> options of the MoE model, share of the dense model's speed to reach
    BEFORE: ("--moe-spawn-update {}", 0.97),
    "top-1": ("--moe-spawn-update 0 --moe-anneal-updates 0 --moe-hard-update 0", 0.80),
}


@dataclass
class Speed:
    """Of one run: work for each second of the clock, and for each second that the process computed."""

    wall: float
    cpu: float


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def command(script: str, arguments: list, threads: int) -> str:
    """Run a console script; its output.  Raises ``RuntimeError`` with the end of the output if it fails."""
    path = SCRIPTS / script
    module = "fairseq_cli." + script.replace("fairseq-", "").replace("-", "_")
    start = [str(path)] if path.exists() else [sys.executable, "-m", module]
    done = subprocess.run(
        [*start, *map(str, arguments)],
        # without the plugin, fairseq cannot read its own checkpoints with PyTorch 2.6 or newer
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def make_data(folder: Path) -> tuple[Path, Path]:
    """Random words, frequent ones first, binarised: a text, and pairs of two languages."""
    draw = random.Random(1)
    words = [f"w{i}" for i in range(4000)]
    weights = [1 / (i + 2) for i in range(4000)]
    for name, lines in (("train", 4000), ("valid", 200)):
        for lang in ("de", "en"):
            text = "".join(" ".join(draw.choices(words, weights, k=24)) + "\n" for _ in range(lines))
            (folder / f"{name}.{lang}").write_text(text)
    pref = ["--trainpref", folder / "train", "--validpref", folder / "valid", "--workers", 1]
    pairs = ["--source-lang", "de", "--target-lang", "en", "--joined-dictionary"]
    command("fairseq-preprocess", [*pairs, *pref, "--destdir", folder / "pairs"], 1)
    text = ["--only-source", "--trainpref", folder / "train.de", "--validpref", folder / "valid.de"]
    command("fairseq-preprocess", [*text, "--workers", 1, "--destdir", folder / "text"], 1)
    return folder / "text", folder / "pairs"


def moe_options(experts: int, options: str) -> list[str]:
    return ["--user-dir", str(PLUGIN), "--moe-experts", str(experts), *options.split()]


def train(model: str, phase: str | None, data: Path, save: Path | None, updates: int, threads: int) -> float:
    """Updates per second of ``fairseq-train``, without the first interval; dense if there is no phase."""
    names, options = MODELS[model]
    task, dense, dense_criterion, moe, moe_criterion = names.split()
    arguments = [data, "--task", task, *options, *COMMON, "--log-interval", INTERVAL]
    arguments += ["--save-dir", save] if save else ["--no-save"]
    if phase is None:
        arguments += ["--arch", dense, "--criterion", dense_criterion, "--max-update", updates]
    else:
        # one more: every run has to reach its spawn
        last = updates + 1 if phase == BEFORE else updates
        arguments += ["--arch", moe, "--criterion", moe_criterion, "--moe-freq", 2, "--max-update", last]
        arguments += moe_options(8, PHASES[phase][0].format(updates))
    output = command("fairseq-train", arguments, threads)
    rates = [
        float(json.loads(line)["ups"])
        for line in re.findall(r"\| train_inner \| (\{.*\})$", output, flags=re.MULTILINE)
    ]
    return statistics.harmonic_mean(rates[1:] or [1.0])


def generate(data: Path, checkpoint: Path, moe: bool, length: int, threads: int) -> float:
    """Tokens per second of ``fairseq-generate``, all hypotheses of one length."""
    options = f"--beam 4 --min-len {length} --max-len-a 0 --max-len-b {length} --batch-size 32".split()
    arguments = [data, "--path", checkpoint, *options, "--gen-subset", "valid", "--quiet"]
    arguments += ["--user-dir", str(PLUGIN)] if moe else []
    output = command("fairseq-generate", arguments, threads)
    return float(re.search(r"sentences/s, ([\d.]+) tokens/s", output).group(1))


def speeds(program: Callable[[int], float], long: int, short: int) -> Speed:
    """Of a program that does so much work; what a short run computes is start-up and does not count."""
    start = cpu_seconds()
    program(short)
    between = cpu_seconds()
    wall = program(long)
    return Speed(wall, (long - short) / (cpu_seconds() - between - (between - start)))


def row(name: str, unit: str, target: float, moe: list[Speed], dense: list[Speed]) -> dict:
    """Speeds of an MoE model beside those of the dense one."""
    clock = [[speed.wall for speed in runs] for runs in (moe, dense)]
    computed = [[speed.cpu for speed in runs] for runs in (moe, dense)]
    share = {
        "median": statistics.median(clock[0]) / statistics.median(clock[1]),
        "best": max(clock[0]) / max(clock[1]),
        "cpu": statistics.median(computed[0]) / statistics.median(computed[1]),
    }
    print(f"  {name}: { ({key: round(value, 2) for key, value in share.items()}) }", flush=True)
    return {
        "name": name,
        "unit": unit,
        "target": target,
        "share": share,
        "dense": statistics.median(clock[1]),
        "runs": {"moe": [vars(s) for s in moe], "dense": [vars(s) for s in dense]},
    }


def import_seconds(rounds: int) -> float:
    """What ``import fairseq_evomoe`` takes beyond ``import fairseq``, minima of processes of their own."""
    code = (
        "import time, fairseq; t = time.perf_counter(); import fairseq_evomoe; print(time.perf_counter() - t)"
    )
    path = os.pathsep.join([str(PLUGIN.parent), os.environ.get("PYTHONPATH", "")])
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout
        for _ in range(rounds + 1)
    ]
    return min(float(run.split()[-1]) for run in runs)


def spawn_seconds(data: Path, threads: int) -> float:
    """The spawn of 16 experts with 100 million parameters in all, optimizer state included."""
    sizes = "--decoder-layers 3 --decoder-embed-dim 512 --decoder-ffn-embed-dim 2048".split()
    sizes += "--decoder-input-dim 512 --decoder-output-dim 512 --decoder-attention-heads 8".split()
    arguments = [data, "--task", "language_modeling", *TEXT[:4], "--batch-size", 2, *sizes, *COMMON]
    arguments += ["--arch", "evomoe_lm", "--criterion", "evomoe_cross_entropy", "--no-save"]
    arguments += ["--max-update", 3, *moe_options(16, "--moe-freq 1 --moe-spawn-update 2")]
    output = command("fairseq-train", arguments, threads)
    return float(re.search(r"spawned experts .*, ([\d.]+) s$", output, flags=re.MULTILINE).group(1))


def run(out: Path | None, threads: int, rounds: int, text: Path | None, pairs: Path | None) -> dict:
    """Every program, dense and MoE in turn."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if text is None or pairs is None:
            made = make_data(folder)
            text, pairs = text or made[0], pairs or made[1]
        for model in MODELS:
            data = pairs if model == "translation" else text
            runs: dict[str | None, list[Speed]] = {phase: [] for phase in (None, *PHASES)}
            for _ in range(rounds):
                for phase, values in runs.items():
                    program = partial(train, model, phase, data, None, threads=threads)
                    values.append(speeds(program, UPDATES, 2))
            for phase, (_, target) in PHASES.items():
                rows.append(row(f"{model}, {phase}", "updates/s", target, runs[phase], runs[None]))
        generated: dict[bool, list[Speed]] = {False: [], True: []}
        for moe in generated:
            train("translation", "top-1" if moe else None, pairs, folder / str(moe), 2, threads)
        for _ in range(rounds):
            for moe, values in generated.items():
                checkpoint = folder / str(moe) / "checkpoint_last.pt"
                program = partial(generate, pairs, checkpoint, moe, threads=threads)
                values.append(speeds(program, 30, 2))
        rows.append(row("generation, top-1", "tokens/s", 0.85, generated[True], generated[False]))
        others = [
            {"name": "import, beyond fairseq's", "seconds": import_seconds(rounds), "target": 0.3},
            {
                "name": "spawn, E = 16, 100 M parameters",
                "seconds": spawn_seconds(text, threads),
                "target": 5.0,
            },
        ]
        print(f"  {others}", flush=True)
    note = f"{rounds} runs each, {UPDATES} updates, d = 256, 4 layers, every second one with 8 experts"
    return {"note": note, "rows": rows, "others": others}
