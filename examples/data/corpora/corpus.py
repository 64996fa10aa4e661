"""What every corpus says about itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Callable

from cleaning import SPLITS, Document, Row


class Kind(Enum):
    """What the corpus is for, and with it the layout of its files."""

    TEXT = "language model, masked language model"
    BITEXT = "translation"
    LABELLED = "sentence classification"


@dataclass(frozen=True)
class Extraction:
    """Rows of each split, and the names of their columns.

    Attributes: columns: file name suffix of each column; ``""`` for the only column of monolingual
        text. splits: rows of train, valid and perhaps test. In monolingual text, an empty line ends
        a document. extra: how many columns at the end are kept as raw text only (second
        references).
    """

    columns: tuple[str, ...]
    splits: dict[str, Iterable[Row]]
    extra: int = 0


@dataclass(frozen=True)
class Corpus:
    """A corpus that a package client downloads.

    Attributes:
        name: the command's name.
        kind: what it is for.
        title: one line for ``--help``.
        licence: of the text itself.
        packages: from target language ("" where there is none) to what is to be fetched.
        extract: from the fetched files and the target language to an Extraction.
        targets: target languages to choose from; empty for one language.
        vocabulary: default size of the dictionary.
    """

    name: str
    kind: Kind
    title: str
    licence: str
    packages: Callable[[str], Sequence]
    extract: Callable[[list[Path], str], Extraction]
    targets: tuple[str, ...] = ()
    vocabulary: int = 6000


def with_document_ends(splits: dict[str, list[Document]]) -> dict[str, list[Row]]:
    """Rows of each split, an empty line after each document: what ends one for fairseq."""
    return {split: [row for document in splits[split] for row in [*document.rows, ("",)]] for split in SPLITS}


def without_document_ends(splits: dict[str, list[Document]]) -> dict[str, list[Row]]:
    """Rows of each split, one document after the other."""
    return {split: [row for document in splits[split] for row in document.rows] for split in SPLITS}
