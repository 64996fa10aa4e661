"""Snippets of film reviews that twenty people rated, from the ``vaderSentiment`` package.

The mean rating lies between -4 and 4: ``pos`` from 0.5 up, ``neg`` from -0.5 down, what is between
is left out.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from cleaning import Document, drop_recurring, fold, hold_out, squeeze
from fetch import PythonPackage

from corpora.corpus import Corpus, Extraction, Kind, without_document_ends

HELD_OUT_ROWS = 1000
CLEAR = 0.5
SHORTEST = 3

_INNER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def read_ratings(sdist: Path) -> str:
    """The file of ratings, inside an archive inside the archive."""
    with tarfile.open(sdist) as outer:
        name = next(name for name in outer.getnames() if name.endswith("/" + _INNER_ARCHIVE))
        content = outer.extractfile(name).read()
    with tarfile.open(fileobj=io.BytesIO(content)) as inner:
        return inner.extractfile(_RATINGS).read().decode("utf-8")


def snippets(ratings: str) -> Iterator[Document]:
    """Each snippet with a clear rating, as a document of its own."""
    for line in ratings.splitlines():
        _, rating, text = line.split("\t", 2)
        text = squeeze(text.replace("''", '"'))
        if abs(float(rating)) >= CLEAR and len(fold(text).split()) >= SHORTEST:
            yield Document(text, [("pos" if float(rating) > 0 else "neg", text)])


def extract(files: list[Path], target: str) -> Extraction:
    """Snippets, split one by one."""
    splits = drop_recurring(hold_out(snippets(read_ratings(files[0])), HELD_OUT_ROWS), columns=(1,))
    return Extraction(("label", "input0"), without_document_ends(splits))


CORPUS = Corpus(
    name="reviews",
    kind=Kind.LABELLED,
    title="film review snippets, positive or negative, English",
    licence="MIT (the package); the snippets quote published reviews",
    packages=lambda target: [
        PythonPackage(
            "vaderSentiment==3.3.2",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            wheel=False,
        )
    ],
    extract=extract,
    vocabulary=4000,
)
