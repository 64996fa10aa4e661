#!/usr/bin/env python3
"""Watch EvoMoE train on Shakespeare, beside the dense model: all phases in a few minutes on two cores.

Downloads the plays, trains fairseq's dense `transformer_lm` and `evomoe_lm` of the same size side by side
with `fairseq-train` (one thread each), prints a table of both and evaluates both with `fairseq-eval-lm`.
The gate is a learned table of the vocabulary (`--moe-preset evomoe_table`), which sees no context: ours;
without that flag it is EvoMoE's as published.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parent / "fairseq_evomoe"
SCRIPTS = Path(sysconfig.get_path("scripts"))
PHASES = ["one expert", "soft", "top-1"]

MODEL = """
    --decoder-layers 4 --decoder-embed-dim 64 --decoder-input-dim 64 --decoder-output-dim 64
    --decoder-ffn-embed-dim 128 --decoder-attention-heads 4 --decoder-normalize-before
    --share-decoder-input-output-embed
""".split()


def training_command(name: str, out: Path, updates: int) -> list[str]:
    """The `fairseq-train` command of the dense model or of EvoMoE."""
    command = [str(SCRIPTS / "fairseq-train"), str(out / "data/bin"), "--task", "language_modeling"]
    command += MODEL
    command += "--tokens-per-sample 64 --batch-size 16 --batch-size-valid 64 --clip-norm 1.0".split()
    command += ["--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "0.003"]
    command += f"--lr-scheduler polynomial_decay --warmup-updates {updates // 20}".split()
    command += f"--total-num-update {updates} --max-update {updates}".split()
    command += ["--save-dir", str(out / name)]
    command += "--no-epoch-checkpoints --no-progress-bar --log-format json".split()
    command += f"--validate-interval-updates {updates // 9} --log-interval {max(updates // 90, 1)}".split()
    if name == "dense":
        return [*command, "--arch", "transformer_lm", "--criterion", "cross_entropy"]
    command += ["--user-dir", str(PLUGIN), "--arch", "evomoe_lm", "--criterion", "evomoe_cross_entropy"]
    command += "--moe-preset evomoe_table --moe-experts 8 --moe-freq 2".split()
    command += f"--moe-spawn-update {updates // 9}".split()
    command += f"--moe-anneal-updates {updates // 3} --moe-hard-update {updates * 4 // 9}".split()
    command += f"--save-interval-updates {updates // 9}".split()  # for evomoe report
    return command


def records(log: Path) -> list[dict]:
    """The JSON lines of a training log, each with its tag (`train_inner`, `valid`, ...)."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        parts = line.split(" | ", 3)
        if len(parts) == 4 and parts[3].startswith('{"') and parts[3].endswith("}"):
            found.append({"tag": parts[2], **json.loads(parts[3])})
    return found


def updates_done(log: Path) -> int:
    """The last update that a log tells of."""
    if not log.exists():
        return 0
    return max((int(r["num_updates"]) for r in records(log) if "num_updates" in r), default=0)


def train(out: Path, updates: int) -> None:
    """Train both models side by side, showing progress; stop with the log's end if one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = {}
    for name in ("dense", "evomoe"):
        for checkpoint in (out / name).glob("checkpoint*.pt"):  # of an earlier run, which would go on
            checkpoint.unlink()
        with open(out / f"{name}.log", "w") as log:
            command = training_command(name, out, updates)
            log.write(" ".join(command) + "\n")
            log.flush()
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    start = time.time()
    try:
        while any(process.poll() is None for process in running.values()):
            time.sleep(2)
            done = ", ".join(f"{name} {updates_done(out / f'{name}.log')}" for name in running)
            line = f"  update of {updates}: {done}  ({time.time() - start:.0f} s)"
            if sys.stdout.isatty():
                print(f"\r{line}", end="", flush=True)
            elif int(time.time() - start) % 20 < 2:
                print(line, flush=True)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
    print()
    for name, process in running.items():
        if process.returncode != 0:
            print("".join((out / f"{name}.log").read_text().splitlines(keepends=True)[-25:]))
            sys.exit(f"demo.py: training the {name} model failed; the whole log is {out / name}.log.")


def table(out: Path) -> str:
    """Validation perplexity of both models, and what the gate did, at each validation."""
    dense = {
        int(r["valid_num_updates"]): r["valid_ppl"] for r in records(out / "dense.log") if r["tag"] == "valid"
    }
    rows, train_row = [], {}
    for record in records(out / "evomoe.log"):
        if record["tag"] == "train_inner":
            train_row = record
        elif record["tag"] == "valid":
            update = int(record["valid_num_updates"])
            rows.append(
                "{:>6}  {:<10}  {:>17}  {:>11}  {:>10}  {:>9}".format(
                    update,
                    PHASES[round(float(train_row["moe_phase"]))],
                    f"{float(train_row['moe_experts']):.2f}",
                    f"{float(train_row['moe_temperature']):.2f}",
                    record["valid_ppl"],
                    dense.get(update, "-"),
                )
            )
    head = "                                                          validation perplexity\n"
    head += "update  phase       experts per token  temperature      EvoMoE      dense"
    return "\n".join([head, "-" * 73, *dict.fromkeys(rows)])


def evaluate(name: str, out: Path) -> str:
    """Test perplexity by `fairseq-eval-lm`."""
    command = [str(SCRIPTS / "fairseq-eval-lm"), str(out / "data/bin")]
    command += ["--path", str(out / name / "checkpoint_last.pt"), "--user-dir", str(PLUGIN)]
    command += "--gen-subset test --batch-size 64 --tokens-per-sample 64 --context-window 0".split()
    command += ["--required-batch-size-multiple", "1"]  # or else up to seven blocks are left out
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\ndemo.py: evaluating the {name} model failed.")
    line = next(x for x in result.stdout.splitlines() if "Perplexity:" in x)
    return line.rsplit("Perplexity:", 1)[1].strip()


def main() -> None:
    """Prepare, train, show, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("evomoe-demo"), help="folder to work in")
    parser.add_argument("--updates", type=int, default=900, help="updates of each model")
    parser.add_argument("--archive", help="the corpus, already downloaded (see examples/data)")
    args = parser.parse_args()
    if args.updates < 90:
        parser.error("--updates must be at least 90, so that every phase has some.")
    args.out.mkdir(parents=True, exist_ok=True)

    print("1. Shakespeare: 41,000 sentences", flush=True)
    prepare = [sys.executable, str(HERE / "data/prepare.py"), "shakespeare", str(args.out / "data")]
    prepare += ["--vocab-size", "2000"] + (["--archive", args.archive] if args.archive else [])
    if subprocess.run(prepare).returncode != 0:
        sys.exit(1)

    print(f"\n2. training (logs: {args.out}/dense.log, {args.out}/evomoe.log)", flush=True)
    train(args.out, args.updates)
    for record in (args.out / "evomoe.log").read_text().splitlines():
        if "spawned experts" in record:
            print("   " + record.rsplit(" | ", 1)[1])

    print("\n3. what happened\n")
    print(table(args.out))
    print("\nexperts per token is while training; validation always uses the best expert only")

    print("\n4. test set, by fairseq-eval-lm: ", end="", flush=True)
    print("perplexity {} (EvoMoE), {} (dense)".format(*(evaluate(n, args.out) for n in ("evomoe", "dense"))))


if __name__ == "__main__":
    main()
