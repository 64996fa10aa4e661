"""The commands of the pages, run as they are written but smaller, by ``tests/docs.sh``.

What is changed in a command so that it ends in seconds is ``smaller``; what a page takes for granted is
``GIVEN``; what cannot be run on two cores without a GPU is ``CANNOT``.  Nothing else differs from what is
read.  This module imports the standard library alone.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 24
SECONDS = 1800
"""After which a command hangs."""

# those that make what others read come first; nothing is taken for granted by them
TASKS = [f"examples/{name}/README.md" for name in "language_modeling masked_lm translation ranks".split()]
FIRST = ["README.md", "examples/README.md", "examples/data/README.md", *TASKS]

MEASURES = "measures for minutes to hours; tests/examples runs its parts"
FORK = "another fairseq than this one"
CANNOT = {
    # page: beginnings of commands, and why
    "README.md": {
        "python3 -m venv .venv && . .venv/bin/activate && pip install torch==2.13.0 && pip install -e": "CI",
    },
    "examples/ranks/README.md": {
        "torchrun --nnodes 2": "two machines",
        "srun": "SLURM; tests/examples/test_job.py has a stand-in for it",
        "sbatch": "SLURM; tests/examples/test_job.py has a stand-in for it",
    },
    "examples/migrating.md": {
        "fairseq-train DATA --save-dir theirs": FORK,
        "python train.py": FORK,
        "MOE=2": FORK,
        "python -m torch.distributed.launch": FORK,
        "fairseq-train DATA --save-dir experts --distributed-world-size 8": "eight GPUs",
        "evomoe import": "a checkpoint of another fairseq; tests/checkpoints/test_foreign.py makes one",
        "evomoe info imported.pt": "the same",
        'fairseq-eval-lm DATA --user-dir "$(evomoe user-dir)" --path imported.pt': "the same",
    },
    "examples/troubleshooting.md": {"pip install": "for Python 3.13; tests/versions.sh types it"},
    "fairseq_evomoe/checkpoints/README.md": {
        "evomoe import": "a checkpoint of another fairseq; tests/checkpoints/test_foreign.py makes one",
    },
    "examples/benchmark/README.md": {"": MEASURES},
    "examples/benchmark/quality/README.md": {"": MEASURES},
}

OWN = "checkpoint.pt checkpoint_best.pt moe.pt checkpoints/checkpoint_last.pt"
GIVEN = {
    "examples/lm_eval/README.md": "rm -rf my_model",
    "examples/report/README.md": "rm -rf report checkpoints/logged; "
    "examples/language_modeling/train.sh data/shakespeare/bin checkpoints/logged > train.log",
    "examples/systems/README.md": "rm -rf examples/systems/results dense.pt",
    "fairseq_evomoe/README.md": "mkdir -p my_plugin; cp tests/support/plugin_router/__init__.py my_plugin",
    "fairseq_evomoe/checkpoints/README.md": "rm -rf my_model report small.pt dense.pt checkpoints/[pw]*.pt",
    "fairseq_evomoe/config/README.md": "mkdir -p my; cp fairseq_evomoe/config/presets/hash.yaml my/own.yaml",
}
CHECKPOINTS = f"for file in {OWN}; do cp checkpoints/lm/checkpoint_best.pt $file; done; "
CHECKPOINTS += "ln -sfn data/shakespeare/bin data-bin; cp data/shakespeare/spm.model ."


@dataclass(frozen=True)
class Command:
    """What a page says to type.

    Attributes:
        page: its path in the repository.
        text: the command, perhaps in several lines.
        language: ``bash`` or ``python``.
    """

    page: str
    text: str
    language: str = "bash"

    @property
    def why_not(self) -> str:
        """Why it cannot be run here; empty: it can."""
        for beginning, reason in CANNOT.get(self.page, {}).items():
            if self.text.startswith(beginning):
                return reason
        return ""

    @property
    def as_run(self) -> str:
        """What is run in its place."""
        return self.text if self.language == "python" else smaller(self.text)


def pages() -> List[str]:
    """All that a user reads, in the order in which they are run."""
    found = [ROOT / "README.md", *(ROOT / "examples").rglob("*.md"), *(ROOT / "fairseq_evomoe").rglob("*.md")]
    names = sorted(str(path.relative_to(ROOT)) for path in found)
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def commands(page: str) -> Iterator[Command]:
    """What is in the page's blocks of bash and Python."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for indent, language, block in re.findall(r"^( *)```(bash|python)\n(.*?)^ *```", text, re.S | re.M):
        block = re.sub(rf"^{indent}", "", block, flags=re.M)
        if language == "python":
            yield Command(page, block, language)
            continue
        for command in re.split(r"(?<!\\)\n", block):
            if command.strip() and not command.lstrip().startswith("#"):
                yield Command(page, command)


CAPS = {
    r"--tokens-per-sample": 64,
    r"--(?:max-tokens|batch-size)": 1024,
    r"--(?:en|de)coder-layers": 4,
    r"--(?:en|de)coder-embed-dim": 64,
    r"--(?:en|de)coder-ffn-embed-dim": 128,
    r"--(?:en|de)coder-attention-heads": 4,
    r"--(?:nproc_per_node|distributed-world-size|moe-expert-parallel)": 2,
    r"--updates": UPDATES,
    r"UPDATES": UPDATES,
}
LENGTHS = (
    r"(--(?:max-update|total-num-update|warmup-updates|log-interval|validate-interval-updates|moe-\w+-updates?"
    r"|(?:save-interval)-updates)[ =])(\d+)(?![\d%:])"
)
REPLACED = (
    (r"(fairseq-hydra-train .*)", rf"\1 optimization.max_update={UPDATES} lr_scheduler.warmup_updates=2"),
    ("/path/to/fairseq_evomoe", "fairseq_evomoe"),
    (r"examples/demo\.py", "examples/demo.py --updates 90"),
    # a small corpus instead of downloads, which demo.py has one of
    (
        r"prepare\.py (?:shakespeare|wiki|english) (\S+)(?!.*--archive)",
        r"prepare.py text \1 --train train.txt --valid valid.txt --test test.txt",
    ),
    (
        r"prepare\.py (?:libreoffice|bible) (\S+)",
        r"prepare.py bitext \1 --source en --train train --valid valid --test test",
    ),
    (
        r"prepare\.py reviews (\S+)",
        r"prepare.py labelled \1 --train train.tsv --valid valid.tsv --test test.tsv",
    ),
    (r"prepare\.py (\w+) OUT", r"prepare.py \1 data/own-\1"),
    (r"(?<=evomoe_)(lm|roberta|transformer)_(?:gpt|large)\w*", r"\1"),
    (r"--systems all", "--systems dense switch evomoe"),
    (r"--seeds [\d ]+", "--seeds 1 "),
)
LACKING = {
    "--user-dir": '"$(evomoe user-dir)"',
    "--arch": "evomoe_lm",
    "--criterion": "evomoe_cross_entropy",
    "--task": "language_modeling",
    "--optimizer": "adam",
    "--lr": "0.002",
    "--max-update": str(UPDATES),
    "--save-dir": "checkpoints/page",
}
# those of train.sh, whose checkpoints they go on from
LM = {
    "--tokens-per-sample": "64",
    "--batch-size": "16",
    "--decoder-normalize-before": "",
    "--share-decoder-input-output-embed": "",
    **{f"--decoder-{part}-dim": "64" for part in ("embed", "input", "output")},
}
TRANSLATION = {
    "--task": "translation",
    "--max-tokens": "1024",
    **{f"--{side}-embed-dim": "64" for side in ("encoder", "decoder")},
}
SIZES = {"layers": "4", "ffn-embed-dim": "128", "attention-heads": "4"}
LM.update({f"--decoder-{part}": value for part, value in SIZES.items()})
TRANSLATION.update({f"--{side}-{p}": v for side in ("encoder", "decoder") for p, v in SIZES.items()})


def smaller(text: str) -> str:
    """The command as it is run: fewer updates, smaller models, a small corpus, two ranks on CPUs.

    A part of a command (``--moe-preset NAME``) goes to the end of a training or an evaluation.
    """
    text = re.sub(r"\s+# .*$", "", text.replace("\\\n", " "), flags=re.M)
    if text.startswith("--moe"):
        text = "fairseq-train DATA " + text
    if text.startswith("--model-overrides"):
        text = (
            "fairseq-eval-lm data/shakespeare/bin --user-dir fairseq_evomoe "
            "--path checkpoints/lm/checkpoint_best.pt --gen-subset test --tokens-per-sample 64 " + text
        )
    if "fairseq-train" in text:
        text = _whole_training(text)
    for flag, most in CAPS.items():
        text = re.sub(
            rf"((?<![\w-]){flag}[ =])(\d+)", lambda m, most=most: m[1] + str(min(int(m[2]), most)), text
        )
    for pattern, by in REPLACED:
        text = re.sub(pattern, by, text)
    return re.sub(r" +", " ", text).strip()


def _whole_training(text: str) -> str:
    """What a page leaves out, and a length of ``UPDATES``."""
    length = re.search(r"--max-update[ =](\d+)", text)
    of = int(length[1]) if length else 20000
    text = re.sub(LENGTHS, lambda m: m[1] + str(-(-int(m[2]) * UPDATES // of)), text)
    translates = "translation" in text or "evomoe_transformer" in text
    lacking = {**LACKING, **(TRANSLATION if translates else LM)}
    text = re.sub(r"\bDATA\b", f"data/{'libreoffice' if translates else 'shakespeare'}/bin", text).replace(
        " ...", " "
    )
    if "--distributed-world-size" in text and "gloo" not in text:
        text += " --cpu --distributed-backend gloo"
    if " --arch transformer" in text:
        lacking = {flag: value for flag, value in lacking.items() if flag != "--user-dir"}
    text += "".join(f" {flag} {value}" for flag, value in lacking.items() if flag not in text.split())
    folder = re.search(r"--save-dir (\S+)", text)[1]
    return f"rm -rf {folder}; {text}" if "evomoe plan" not in text else text


def write_own_text(folder: Path) -> None:
    """``train.txt``, ``train.en``, ``train.de``, ``train.tsv`` and so on: sentences of a made-up grammar."""
    draw = random.Random(1)
    subjects, verbs, objects = ([f"{stem}{i}" for i in range(30)] for stem in ("king", "love", "sword"))
    for split, number in (("train", 600), ("valid", 60), ("test", 60)):
        lines = [
            " ".join(("the", draw.choice(subjects), draw.choice(verbs), "the", draw.choice(objects)))
            for _ in range(number)
        ]
        german = [" ".join(word[::-1] for word in line.split()) for line in lines]
        classes = [f"{('neg', 'pos')[len(line) % 2]}\t{line}" for line in lines]
        if split == "train":
            (folder / "my.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for suffix, content in ((".txt", lines), (".en", lines), (".de", german), (".tsv", classes)):
            (folder / (split + suffix)).write_text("\n".join(content) + "\n", encoding="utf-8")


def run(command: Command, folder: Path, log: Path) -> Dict[str, object]:
    """Run one command in the checkout of ``folder``; what is printed goes to a file."""
    checkout = folder / "checkout"
    text = command.as_run
    words = (
        ["python", "-c", text] if command.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UPDATES": str(UPDATES)}
    environment["PATH"] = f"{checkout}/.venv/bin:{os.environ['PATH']}"
    environment.pop("PYTHONPATH", None)
    start = time.time()
    with open(log, "w", encoding="utf-8") as output:
        output.write(text + "\n\n")
        output.flush()
        try:
            done = subprocess.run(
                words,
                cwd=checkout,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=SECONDS,
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = 124
    return {
        "page": command.page,
        "text": command.text,
        "run": text,
        "status": status,
        "seconds": round(time.time() - start, 1),
    }


def table(results: List[Dict[str, object]]) -> str:
    """A row for each page."""
    rows = ["| page | commands | passed | not run here | seconds |", "|---|--:|--:|--:|--:|"]
    total = [0, 0, 0, 0.0]
    for page in pages():
        found = list(commands(page))
        if not found:
            continue
        of_page = {r["text"]: r for r in results if r["page"] == page}
        of_page = [of_page[c.text] for c in found if c.text in of_page]
        numbers = [
            len(found),
            sum(r["status"] == 0 for r in of_page),
            sum(bool(c.why_not) for c in found),
            sum(r["seconds"] for r in of_page),
        ]
        total = [a + b for a, b in zip(total, numbers)]
        rows.append("| {} | {} | {} | {} | {:.0f} |".format(page, *numbers))
    rows.append("| all | {} | {} | {} | {:.0f} |".format(*total))
    return "\n".join(rows)


def main(folder: Path, chosen: List[str]) -> int:
    """Run what has not passed yet, page by page; the number of commands that fail."""
    file = folder / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines]
    (folder / "logs").mkdir(exist_ok=True)
    write_own_text(folder / "checkout")
    visits = [(page, None) for page in pages() if not chosen or page in chosen]
    if (
        visits[0][0] == "README.md"
    ):  # its first command makes the environment, and others what its second reads
        visits = [("README.md", 1), *visits[1:], ("README.md", None)]
    for page, most in visits:
        passed = {(r["page"], r["run"]) for r in results if r["status"] == 0}
        todo = [c for c in commands(page) if not c.why_not]
        if all((page, c.as_run) in passed for c in todo):
            continue
        if page not in FIRST:
            run(
                Command(page, CHECKPOINTS + "; " + GIVEN.get(page, "true")),
                folder,
                folder / "logs" / "given.log",
            )
        for number, command in enumerate(todo[:most]):
            if page in FIRST and (page, command.as_run) in passed:
                continue
            log = folder / "logs" / f"{page.replace('/', '_')[:-3]}-{number}.log"
            result = run(command, folder, log)
            results.append(result)
            with open(file, "a", encoding="utf-8") as lines_out:
                lines_out.write(json.dumps(result) + "\n")
            mark = "ok    " if result["status"] == 0 else "FAILED"
            print(f"{mark} {result['seconds']:6.1f} s  {page}: {command.text.splitlines()[0]}", flush=True)
            if result["status"] != 0:
                print("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-6:]), flush=True)
    (folder / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))
    for page, reasons in CANNOT.items():
        for beginning, reason in reasons.items():
            print(f"not run here: {page}: {beginning or 'all'} ({reason})")
    last = {(r["page"], r["run"]): r["status"] for r in results}
    return sum(status != 0 for status in last.values())


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1]).resolve(), sys.argv[2:]) else 0)
