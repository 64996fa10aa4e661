"""LibreOffice Help, English to another language, from Debian's packages.

There is one HTML page for each topic. Pages have the same path, and their paragraphs the same ids,
in every language. Paragraphs are cut in sentences where both sides have equally many. Help pages
repeat themselves, so training pairs that resemble a held-out one are dropped; without that, about
one test pair in seven has a near twin in train.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from cleaning import (
    Document,
    Row,
    drop_recurring,
    fold_digits,
    hold_out,
    is_prose,
    lengths_agree,
    near_duplicates,
    squeeze,
)
from fetch import DebianPackage, files_in

from corpora.corpus import Corpus, Extraction, Kind, without_document_ends

HELD_OUT_ROWS = 1000
NEAR = 0.4
LETTERS = 0.6
TARGETS = ("de", "fr", "es", "it")

_ROOT = "usr/share/libreoffice/help/"
_VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
_PARAGRAPH = frozenset("p h1 h2 h3 h4 h5 h6".split())
_SPACE_BEFORE_STOP = re.compile(r"\s+([,.;:!?])(?=\s|$)")
_SENTENCE_START = re.compile(r"(?<=[.!?:])\s+(?=[A-ZÀ-ÖØ-Þ\"„«(¿¡])")

_KNOWN = {  # 4:7.4.7-1+deb12u14
    "en-us": ("8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",),
    "de": ("00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f",),
}


class PageParser(HTMLParser):
    """Collects the text of each paragraph that has an id, in ``paragraphs``."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: dict[str, str] = {}
        self._open: list[tuple[str, bool]] = []
        self._id: str | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element; a paragraph's text starts afresh."""
        if tag in _VOID:
            self._text.append(" ")
            return
        attributes = dict(attrs)
        # The same key is named once for macOS and once for others: take the others.
        hidden = attributes.get("class") == "MAC" or tag in ("script", "style")
        self._open.append((tag, hidden))
        if tag in _PARAGRAPH:
            self._id, self._text = attributes.get("id"), []

    def handle_endtag(self, tag: str) -> None:
        """Close an element, and those inside it that were left open; keep a paragraph's text."""
        if all(tag != opened for opened, _ in self._open):
            return
        while self._open.pop()[0] != tag:
            pass
        if tag in _PARAGRAPH and self._id:
            text = _SPACE_BEFORE_STOP.sub(r"\1", squeeze("".join(self._text)))
            if text:
                self.paragraphs.setdefault(self._id, text)
            self._id = None

    def handle_data(self, data: str) -> None:
        """Collect text that is shown."""
        if not any(hidden for _, hidden in self._open):
            self._text.append(data)


def page_paragraphs(page: str) -> dict[str, str]:
    """Text of each paragraph in an HTML page, by its id."""
    parser = PageParser()
    parser.feed(page)
    parser.close()
    return parser.paragraphs


def read_pages(package: Path) -> dict[str, str]:
    """The HTML pages in a Debian package, by their path inside the language's folder."""
    pages = {}
    for path, text in files_in(package, f"^{_ROOT}.*\\.html$"):
        _, _, page = path[len(_ROOT) :].partition("/")
        pages[page] = text
    return pages


def aligned_sentences(source: dict[str, str], target: dict[str, str]) -> Iterator[Row]:
    """Sentence pairs of two pages' paragraphs; paragraph pairs where sentence counts differ."""
    for key, paragraph in source.items():
        if key not in target:
            continue
        left = _SENTENCE_START.split(paragraph)
        right = _SENTENCE_START.split(target[key])
        if len(left) == len(right):
            yield from zip(left, right)
        else:
            yield paragraph, target[key]


def sentence_pairs(source: dict[str, str], target: dict[str, str]) -> Iterator[Row]:
    """Pairs of all pages that are prose, agree in length and are translated; each text once."""
    seen_source, seen_target = set(), set()
    for page in sorted(source.keys() & target.keys()):
        for pair in aligned_sentences(page_paragraphs(source[page]), page_paragraphs(target[page])):
            left, right = map(fold_digits, pair)
            good = (
                left != right
                and lengths_agree(*pair, least=4, most=80, ratio=2.5)
                and all(is_prose(text, LETTERS) for text in pair)
            )
            if good and left not in seen_source and right not in seen_target:
                seen_source.add(left)
                seen_target.add(right)
                yield pair


def extract(files: list[Path], target: str) -> Extraction:
    """Sentence pairs, split one by one, train cleared of what resembles valid and test."""
    pairs = sentence_pairs(*map(read_pages, files))
    splits = drop_recurring(
        hold_out((Document("\t".join(pair), [pair]) for pair in pairs), HELD_OUT_ROWS), (0, 1)
    )
    rows = without_document_ends(splits)
    held_out = [row[0] for row in [*rows["valid"], *rows["test"]]]
    near = near_duplicates([row[0] for row in rows["train"]], held_out, NEAR)
    rows["train"] = [row for index, row in enumerate(rows["train"]) if index not in near]
    return Extraction(("en", target), rows)


CORPUS = Corpus(
    name="libreoffice",
    kind=Kind.BITEXT,
    title="LibreOffice Help, English to " + ", ".join(TARGETS) + " (needs Debian or Ubuntu)",
    licence="MPL-2.0, LibreOffice contributors",
    packages=lambda target: [
        DebianPackage(f"libreoffice-help-{language}", _KNOWN.get(language, ()))
        for language in ("en-us", target)
    ],
    extract=extract,
    targets=TARGETS,
)
