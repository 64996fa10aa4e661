"""The user's own text: white space is tidied, and nothing else is changed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Callable

from cleaning import Row, squeeze
from stages import PrepareError, say

from corpora.corpus import Extraction


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file; a byte order mark is no text."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except UnicodeDecodeError:
        raise PrepareError(f"{path} is not UTF-8; convert it first, for instance with iconv.") from None


def monolingual(files: dict[str, Path]) -> Extraction:
    """Text of one language: one sentence a line, an empty line between documents.

    Args:
        files: the file of each split.
    """

    def rows(path: Path) -> Iterator[Row]:
        return ((squeeze(line),) for line in read_lines(path))

    return Extraction(("",), _for_each_split(rows, files))


def parallel(prefixes: dict[str, Path], source: str, target: str) -> Extraction:
    """Parallel text: ``PREFIX.source`` and ``PREFIX.target`` with equally many lines.

    Args:
        prefixes: the prefix of each split.
        source: source language, the first file's suffix.
        target: target language, the second file's suffix.
    """

    def rows(prefix: Path) -> Iterator[Row]:
        paths = [prefix.with_name(f"{prefix.name}.{language}") for language in (source, target)]
        empty = 0
        for pair in zip_longest(*map(read_lines, paths)):
            if None in pair:
                first, second = (sum(1 for _ in read_lines(path)) for path in paths)
                raise PrepareError(
                    f"{paths[0]} has {first} lines but {paths[1]} has {second}; "
                    f"line N of one must translate line N of the other."
                )
            left, right = map(squeeze, pair)
            if left and right:
                yield left, right
            else:
                empty += 1
        if empty:
            say(f"  {prefix}: {empty} pairs with an empty side left out")

    return Extraction((source, target), _for_each_split(rows, prefixes))


def labelled(files: dict[str, Path]) -> Extraction:
    """Classified sentences: ``label<TAB>text``, one a line; empty lines are left out.

    Args:
        files: the file of each split.
    """

    def rows(path: Path) -> Iterator[Row]:
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            label, _, text = line.partition("\t")
            label, text = squeeze(label), squeeze(text)
            if not label or " " in label or not text:
                raise PrepareError(
                    f"{path}, line {number}: expected a label without spaces, a tab and a text."
                )
            yield label, text

    return Extraction(("label", "input0"), _for_each_split(rows, files))


def _for_each_split(
    rows: Callable[[Path], Iterator[Row]], paths: dict[str, Path]
) -> dict[str, Iterator[Row]]:
    return {split: rows(path) for split, path in paths.items()}
