"""English of three kinds: Shakespeare's plays, Wikipedia articles and the World English Bible.

Scenes, articles and chapters are held out as with each corpus of its own, so that every split has all three.
"""

from __future__ import annotations

from pathlib import Path

from cleaning import SPLITS, drop_recurring, hold_out

from corpora import bible, shakespeare, wikipedia
from corpora.corpus import Corpus, Extraction, Kind, with_document_ends


def extract(files: list[Path], target: str) -> Extraction:
    """The three corpora one after another; a line of any held-out part is in no part of train."""
    plays, articles, verses = files
    parts = [
        hold_out(shakespeare.scenes(plays), shakespeare.HELD_OUT_ROWS),
        hold_out(wikipedia.articles(articles), wikipedia.HELD_OUT_ROWS),
        hold_out(bible.english_chapters(verses), bible.HELD_OUT_ROWS),
    ]
    together = {split: [document for part in parts for document in part[split]] for split in SPLITS}
    return Extraction(("",), with_document_ends(drop_recurring(together, columns=(0,))))


CORPUS = Corpus(
    name="english",
    kind=Kind.TEXT,
    title="Shakespeare, Wikipedia articles and the World English Bible together, English",
    licence="public domain; Wikipedia's part CC BY-SA 3.0",
    packages=lambda target: [
        package for each in (shakespeare, wikipedia, bible) for package in each.CORPUS.packages(target)
    ],
    extract=extract,
    vocabulary=4000,
)
