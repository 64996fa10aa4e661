"""Rules that all corpora share: folding, sentence ends, filters, hold-out, near-duplicates."""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Row = tuple[str, ...]
"""One line in each column: ``(text,)``, ``(source, target)`` or ``(label, text)``."""

SPLITS = ("train", "valid", "test")

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(\s+)(?=[\"'(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|cf|ca|No|Vol|etc|e\.g|i\.e|U\.S|pp?)\.$")
_MARKUP_LEFT_OVER = re.compile(r"[{}|<>\[\]=\\]|https?:|%\(|\$\w")


@dataclass(frozen=True)
class Document:
    """Rows that stay together in one split: a scene, an article, a chapter.

    Attributes:
        name: identifies the document, and so decides its split.
        rows: its lines, in order.
    """

    name: str
    rows: list[Row]


def squeeze(text: str) -> str:
    """Every run of white space, of any kind, as one space; none at the ends."""
    return " ".join(text.split())


def fold(text: str) -> str:
    """``text`` without case, punctuation and spacing, for asking whether two lines say the same."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def fold_digits(text: str) -> str:
    """``fold``, and numbers count as punctuation: "Step 1" and "Step 2" say the same."""
    return re.sub(r"[\W\d]+", " ", text.lower()).strip()


def sentences(paragraph: str) -> Iterator[str]:
    """Cut English prose after ``.``, ``!`` or ``?`` and closing quotes, but not in "Dr. No"."""
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        sentence = paragraph[start : end.start(1)]
        if not _ABBREVIATION.search(sentence):
            yield sentence.strip()
            start = end.end()
    rest = paragraph[start:].strip()
    if rest:
        yield rest


def is_prose(text: str, letters: float) -> bool:
    """Whether the share of letters is at least ``letters``, and no markup is left over."""
    characters = text.replace(" ", "")
    enough = sum(map(str.isalpha, characters)) >= letters * len(characters)
    return bool(characters) and enough and not _MARKUP_LEFT_OVER.search(text)


def lengths_agree(source: str, target: str, least: int, most: int, ratio: float) -> bool:
    """Whether both have ``least`` to ``most`` words, neither over ``ratio`` times the other's."""
    shorter, longer = sorted((len(source.split()), len(target.split())))
    return least <= shorter and longer <= most and longer <= ratio * shorter


def hold_out(documents: Iterable[Document], rows: int) -> dict[str, list[Document]]:
    """Split whole documents: about ``rows`` rows for test, as many for valid, the rest for train.

    The order in which documents are drawn depends on their names alone, so that no document's split
    depends on the order of the archive or a random generator. Each split keeps the archive's order.
    """
    documents = list(documents)
    drawn = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    split_of: dict[str, str] = {}
    for split in ("test", "valid"):
        filled = 0
        while drawn and filled < rows:
            document = drawn.pop()
            split_of[document.name] = split
            filled += len(document.rows)
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        splits[split_of.get(document.name, "train")].append(document)
    return splits


def drop_recurring(splits: dict[str, list[Document]], columns: Sequence[int]) -> dict[str, list[Document]]:
    """Keep each row once, held-out splits first, so that train holds no line of valid or test.

    A row goes when any of its ``columns`` (case, punctuation and spacing aside) is in a split
    before its own, or when all of them together were already seen in its own.
    """
    before: set[tuple[int, str]] = set()
    kept: dict[str, list[Document]] = {}
    for split in reversed(SPLITS):
        here: set[tuple[tuple[int, str], ...]] = set()
        kept[split] = []
        for document in splits[split]:
            rows = []
            for row in document.rows:
                keys = tuple((column, fold(row[column])) for column in columns)
                if keys not in here and before.isdisjoint(keys):
                    here.add(keys)
                    rows.append(row)
            if rows:
                kept[split].append(Document(document.name, rows))
        before.update(key for keys in here for key in keys)
    return {split: kept[split] for split in SPLITS}


def _shingles(text: str) -> set[tuple[str, ...]]:
    """The word pairs and triples of ``text``, its two ends included."""
    words = ["^", *fold_digits(text).split(), "$"]
    return {tuple(words[i : i + n]) for n in (2, 3) for i in range(len(words) - n + 1)}


def near_duplicates(texts: Sequence[str], held_out: Sequence[str], threshold: float) -> set[int]:
    """Positions in ``texts`` that resemble a held-out text.

    Two texts resemble each other when the Jaccard overlap of their word pairs and triples (case,
    digits and punctuation aside) is at least ``threshold``. Such texts share at least that part of either's
    shingles, so that one of the rarest of a text is among those: only who holds these is compared with it.
    """
    held_shingles = [_shingles(text) for text in held_out]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, shingles in enumerate(held_shingles):
        for shingle in shingles:
            holders[shingle].append(index)
    near = set()
    for position, text in enumerate(texts):
        shingles = _shingles(text)
        rarest = sorted(shingles, key=lambda shingle: len(holders.get(shingle, ())))
        needed = len(shingles) - math.ceil(threshold * len(shingles)) + 1
        candidates = {index for shingle in rarest[:needed] for index in holders.get(shingle, ())}
        for index in candidates:
            common = len(shingles & held_shingles[index])
            if common >= threshold * (len(shingles) + len(held_shingles[index]) - common):
                near.add(position)
                break
    return near
