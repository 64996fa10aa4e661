#!/usr/bin/env python3
"""From nothing, or from your own text, to a folder that fairseq-train reads."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from stages import PrepareError, Settings, building, is_finished, refuse_foreign, say

for _needed in ("sentencepiece", "tqdm", "fairseq_cli"):
    if importlib.util.find_spec(_needed) is None:
        sys.exit(f"prepare.py: this needs {_needed}; install it into {sys.executable} first.")

from binarize import Vocabulary, binarize, encode, text_file  # noqa: E402
from corpora import BUILT_IN, own  # noqa: E402
from corpora.corpus import Corpus, Extraction, Kind  # noqa: E402
from fetch import obtain  # noqa: E402

RECIPE = 2
"""Raised when a change to the code changes what is written: older folders are made again."""

OWN: dict[str, tuple[Kind, str]] = {
    "text": (Kind.TEXT, "your own text: one sentence a line, an empty line between documents"),
    "bitext": (Kind.BITEXT, "your own parallel text: PREFIX.en and PREFIX.de, line by line"),
    "labelled": (Kind.LABELLED, "your own classified sentences: label<TAB>text, one a line"),
}
DEFAULT_VOCABULARY = {Kind.TEXT: 8000, Kind.BITEXT: 6000, Kind.LABELLED: 4000}

EPILOG = """\
OUT receives raw/ (text), spm/ (pieces), spm.model and bin/, the folder to pass to fairseq-train.
A finished stage is not done again. `prepare.py COMMAND --help` shows a command's options.
"""


def parser() -> argparse.ArgumentParser:
    """The command line: one sub-command for each corpus and for each kind of own text."""
    result = argparse.ArgumentParser(
        prog="prepare.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for corpus in BUILT_IN.values():
        title = f"{corpus.title} ({corpus.kind.value}; {corpus.licence})"
        command = commands.add_parser(corpus.name, help=corpus.title, description=title)
        _add_common(command, corpus.vocabulary)
        if corpus.targets:
            command.add_argument("--target", choices=corpus.targets, required=True, help="target language")
        command.add_argument(
            "--archive",
            type=Path,
            action="append",
            default=[],
            metavar="PATH",
            help="use this downloaded file; where two are needed, give it twice, English first",
        )
        command.add_argument(
            "--no-checksum", action="store_true", help="accept an archive whose SHA-256 has changed"
        )
    for name, (kind, title) in OWN.items():
        command = commands.add_parser(
            name, help=title, description=f"{title[0].upper()}{title[1:]} ({kind.value})."
        )
        _add_common(command, DEFAULT_VOCABULARY[kind])
        what = "PREFIX" if kind is Kind.BITEXT else "FILE"
        for split in ("train", "valid", "test"):
            command.add_argument(
                f"--{split}",
                type=Path,
                required=split != "test",
                metavar=what,
                help=f"{split} text",
            )
        if kind is Kind.BITEXT:
            for side in ("source", "target"):
                command.add_argument(
                    f"--{side}", required=True, metavar="LANG", help=f"{side} language, a suffix"
                )
    return result


def _add_common(command: argparse.ArgumentParser, vocabulary: int) -> None:
    """Arguments of every sub-command."""
    command.add_argument("out", type=Path, metavar="OUT", help="folder to fill; made if need be")
    choice = command.add_mutually_exclusive_group()
    choice.add_argument(
        "--vocab-size",
        type=int,
        default=vocabulary,
        metavar="N",
        help=f"entries of fairseq's dictionary, its 4 special symbols too (default: {vocabulary})",
    )
    choice.add_argument(
        "--vocabulary-from",
        type=Path,
        metavar="DIR",
        help="use the vocabulary of DIR, another OUT of this command: what fine-tuning needs",
    )
    command.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes for fairseq-preprocess (default: %(default)s)",
    )


def own_paths(args: argparse.Namespace) -> list[Path]:
    """Files of the user's own text; PrepareError where one is missing."""
    paths = [path for path in (args.train, args.valid, args.test) if path]
    if args.command == "bitext":
        languages = (args.source, args.target)
        paths = [p.with_name(f"{p.name}.{language}") for p in paths for language in languages]
    for path in paths:
        if not path.is_file():
            raise PrepareError(f"{path} is not a file.")
    return paths


def raw_settings(args: argparse.Namespace) -> Settings:
    """Everything the raw text depends on."""
    settings: Settings = {"command": args.command, "recipe": RECIPE}
    if args.command in BUILT_IN:
        settings["target"] = getattr(args, "target", "")
        settings["checksum"] = not args.no_checksum
        return settings
    states = {str(path.resolve()): path.stat() for path in own_paths(args)}
    settings["files"] = [[path, s.st_size, s.st_mtime_ns] for path, s in states.items()]
    settings["languages"] = [args.source, args.target] if args.command == "bitext" else []
    return settings


def extraction_of(args: argparse.Namespace, out: Path) -> Extraction:
    """Fetch and extract the corpus, or open the user's own text."""
    if args.command in BUILT_IN:
        corpus: Corpus = BUILT_IN[args.command]
        target = getattr(args, "target", "")
        files = obtain(corpus.packages(target), args.archive, out / "download", not args.no_checksum)
        return corpus.extract(files, target)
    paths = {split: getattr(args, split) for split in ("train", "valid", "test")}
    paths = {split: path for split, path in paths.items() if path}
    if args.command == "bitext":
        return own.parallel(paths, args.source, args.target)
    return own.monolingual(paths) if args.command == "text" else own.labelled(paths)


def write_raw(extraction: Extraction, folder: Path) -> dict[str, Any]:
    """Write each column of each split to a file.

    Returns: what was written: ``columns``, and for each split the number of ``lines`` (not empty)
        and of ``words`` in each column.
    """
    columns = extraction.columns
    kept = columns[: len(columns) - extraction.extra]
    numbers: dict[str, Any] = {"columns": kept, "splits": {}}
    for split, rows in extraction.splits.items():
        lines, words = 0, [0] * len(columns)
        paths = [text_file(folder, split, column) for column in columns]
        files = [path.open("w", encoding="utf-8", newline="\n") for path in paths]
        try:
            for row in rows:
                lines += any(row)
                for index, (file, text) in enumerate(zip(files, row)):
                    file.write(text + "\n")
                    words[index] += len(text.split())
        finally:
            for file in files:
                file.close()
        if not lines:
            raise PrepareError(f"There is no text for {split}.")
        numbers["splits"][split] = {"lines": lines, "words": dict(zip(kept, words))}
    (folder / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")
    return numbers


def extract(args: argparse.Namespace, out: Path, settings: Settings) -> dict[str, Any]:
    """The stage from an archive or the user's own files to raw text; ``write_raw``'s numbers."""
    folder = out / "raw"
    if is_finished(folder, settings):
        say("[1/3] raw text: already done")
    else:
        say("[1/3] raw text")
        with building(folder, settings) as partial:
            write_raw(extraction_of(args, out), partial)
        shutil.rmtree(out / "download", ignore_errors=True)
    return json.loads((folder / "numbers.json").read_text(encoding="utf-8"))


def prepare(args: argparse.Namespace) -> None:
    """Carry out all stages, each where its settings have changed."""
    out = args.out.resolve()
    borrowed: Vocabulary | None = None
    if args.vocabulary_from:
        borrowed = Vocabulary(args.vocabulary_from.resolve() / "spm")
    settings = raw_settings(args)
    kind = BUILT_IN[args.command].kind if args.command in BUILT_IN else OWN[args.command][0]
    for stage in ("raw", "spm", "bin"):
        refuse_foreign(out / stage)
    numbers = extract(args, out, settings)
    splits, columns = list(numbers["splits"]), numbers["columns"]
    texts = [column for column in columns if column != "label"]

    origin = {"borrowed": borrowed.fingerprint()} if borrowed else {"size": args.vocab_size}
    settings = {"raw": settings, "vocabulary": origin}
    vocabulary = encode(out / "raw", out / "spm", splits, texts, args.vocab_size, borrowed, settings)
    copied = out / "spm.model.partial"
    shutil.copyfile(vocabulary.model, copied)
    os.replace(copied, out / "spm.model")

    binarize(kind, out / "raw", out / "spm", out / "bin", splits, columns, args.workers, settings)
    report(numbers, vocabulary, args)


def report(numbers: dict[str, Any], vocabulary: Vocabulary, args: argparse.Namespace) -> None:
    """Print what there is now, and where."""
    for split, counted in numbers["splits"].items():
        words = ", ".join(
            f"{number:,} {column} words".replace("  ", " ")
            for column, number in counted["words"].items()
            if column != "label"
        )
        say(f"{split:>6}: {counted['lines']:,} lines, {words}")
    say(f"vocabulary: {len(vocabulary):,} entries")
    if args.command in BUILT_IN:
        say(f"licence: {BUILT_IN[args.command].licence}")
    say(f"pass to fairseq-train: {args.out / 'bin'}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when all is done, 1 after an error that one sentence explains."""
    args = parser().parse_args(arguments)
    try:
        prepare(args)
    except PrepareError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
