"""About a hundred articles of the English Wikipedia: the test data in the ``gensim`` wheel.

The articles are wiki markup; paragraphs of running text are kept, tables, lists, templates and
references are not. Whole articles are held out.
"""

from __future__ import annotations

import bz2
import html
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cleaning import Document, drop_recurring, hold_out, is_prose, sentences, squeeze
from fetch import PythonPackage

from corpora.corpus import Corpus, Extraction, Kind, with_document_ends

HELD_OUT_ROWS = 800
LETTERS = 0.7
SHORTEST, LONGEST = 4, 150

_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_PAGE = re.compile(r"<page>.*?</page>", re.S)
_TITLE_AND_TEXT = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.S)
_INVISIBLE = re.compile(
    r"<!--.*?-->|<ref[^>]*/>|<ref[^>]*>.*?</ref>|<math.*?</math>|<gallery.*?</gallery>", re.S
)
_INNERMOST_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}")
_TABLE = re.compile(r"\n\{\|.*?\n\|\}", re.S)
_FILE_OR_CATEGORY = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]")
_LINK = re.compile(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]")
_WEB_LINK = re.compile(r"\[https?:\S+ ?([^\]]*)\]")
_TAG_OR_QUOTES = re.compile(r"<[^>]+>|'{2,}")
_NOT_A_PARAGRAPH = tuple("*#:;=|!{} ")


def plain_paragraphs(markup: str) -> Iterator[str]:
    """Paragraphs of running text in an article's wiki markup."""
    text = _INVISIBLE.sub("", markup)
    found = 1
    while found:  # templates nest: take the innermost out until none is left
        text, found = _INNERMOST_TEMPLATE.subn("", text)
    text = _FILE_OR_CATEGORY.sub("", _TABLE.sub("", text))
    text = _WEB_LINK.sub(r"\1", _LINK.sub(r"\1", text))
    for line in _TAG_OR_QUOTES.sub("", text).split("\n"):
        if line and not line.startswith(_NOT_A_PARAGRAPH):
            yield squeeze(line)


def articles(wheel: Path) -> Iterator[Document]:
    """Each article with running text in it; redirects are none."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(_DUMP))
        dump = bz2.decompress(archive.read(name)).decode("utf-8")
    for page in _PAGE.findall(dump):
        found = _TITLE_AND_TEXT.search(page)
        if not found or "#REDIRECT" in found[2][:40].upper():
            continue
        # Escaped once for the dump's XML, and once more by authors who wrote &nbsp; themselves.
        markup = html.unescape(html.unescape(found[2]))
        rows = [
            (line,)
            for paragraph in plain_paragraphs(markup)
            for line in sentences(paragraph)
            if SHORTEST <= len(line.split()) <= LONGEST and is_prose(line, LETTERS)
        ]
        if rows:
            yield Document(found[1], rows)


def extract(files: list[Path], target: str) -> Extraction:
    """The articles, split by article."""
    splits = drop_recurring(hold_out(articles(files[0]), HELD_OUT_ROWS), columns=(0,))
    return Extraction(("",), with_document_ends(splits))


CORPUS = Corpus(
    name="wiki",
    kind=Kind.TEXT,
    title="about a hundred Wikipedia articles, English",
    licence="CC BY-SA 3.0, Wikipedia's authors",
    packages=lambda target: [
        PythonPackage("gensim==4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8")
    ],
    extract=extract,
)
