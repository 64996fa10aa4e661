"""The data of the tasks, made by `examples/data/prepare.py`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from protocol import EXAMPLES


def prepared(corpora: Iterable[tuple[str, ...]], work: Path) -> dict[tuple[str, ...], Path]:
    """Make the data of some corpora; return the folder of each."""
    folders = {}
    for corpus in corpora:
        folder = work / "data" / "-".join(word for word in corpus if not word.startswith("--"))
        command = [sys.executable, str(EXAMPLES / "data" / "prepare.py"), corpus[0], str(folder), *corpus[1:]]
        subprocess.run(command, check=True)
        folders[corpus] = folder
    return folders


def prepared_small(corpora: Iterable[tuple[str, ...]], work: Path) -> dict[tuple[str, ...], Path]:
    """Instead of the corpora, make data of this repository's README files, which needs no network."""
    lines = []
    for path in sorted(EXAMPLES.parent.glob("**/README.md")):
        lines += [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if 4 <= len(line.split()) <= 40]
    folders = {}
    for corpus in corpora:
        pairs = "--target" in corpus
        folder = work / "data" / corpus[0]
        folder.mkdir(parents=True, exist_ok=True)
        splits = {"train": lines[:-80], "valid": lines[-80:-40], "test": lines[-40:]}
        command = [sys.executable, str(EXAMPLES / "data" / "prepare.py"), "bitext" if pairs else "text"]
        command += [str(folder), "--vocab-size", "300"]
        for split, rows in splits.items():
            text = folder / f"{split}.txt"
            if pairs:  # the translation is the sentence backwards
                source, target = "en", corpus[corpus.index("--target") + 1]
                backwards = [" ".join(reversed(row.split())) for row in rows]
                text.with_name(f"{text.name}.{source}").write_text("\n".join(rows) + "\n")
                text.with_name(f"{text.name}.{target}").write_text("\n".join(backwards) + "\n")
            else:
                text.write_text("\n".join(rows) + "\n")
            command += [f"--{split}", str(text)]
        command += ["--source", source, "--target", target] if pairs else []
        subprocess.run(command, check=True)
        folders[corpus] = folder
    return folders
