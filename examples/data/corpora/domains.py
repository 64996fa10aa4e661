"""English of nine clearly different domains, each one of Debian's documentation packages.

What a model's experts specialise in can only be seen where the text has parts that differ and are known: a
dictionary, political writing, and manuals of a kernel, three programming languages, a database and two C++
libraries. Whole pages are held out from each domain, so that test is also there for each of them alone
(``test_kernel``, ...).
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from cleaning import (
    SPLITS,
    Document,
    Row,
    drop_recurring,
    hold_out,
    is_prose,
    near_duplicates,
    sentences,
    squeeze,
)
from fetch import DebianPackage, files_in

from corpora.corpus import Corpus, Extraction, Kind, with_document_ends

HELD_OUT_ROWS = 800
"""Of each domain, in valid and in test each."""
NEAR = 0.5
LETTERS = 0.75
SHORTEST, LONGEST = 5, 100

_HTML_PARAGRAPH = re.compile(r"<p\b[^>]*>(.*?)(?=</p>|<p\b|</?(?:div|dl|ul|ol|table|pre)\b)", re.S | re.I)
_TAG = re.compile(r"<[^>]*>")
_POD_CODE = re.compile(r"[A-Z](?:<<+ (.*?) >>+|<([^<>]*)>)", re.S)
_SPACE_BEFORE_STOP = re.compile(r"\s+([,.;:!?)])")
_SENTENCE_CLOSE = (".", "!", "?", '."', ".)", ":")

_HEADWORD = re.compile(r"^(\w[^\\\n]*?) \\", re.M)
_DICTIONARY_NOTE = re.compile(
    r"\[[^\]]*\]|--\s?[A-Z][\w. ]*|[{}]|^\s*(?:\d+|\([a-z]\))\.?\s|\s(?:Syn|Note):", re.M
)


def html_paragraphs(page: str) -> Iterator[str]:
    """The text of a page's paragraphs, without markup; listings and tables are none."""
    for inside in _HTML_PARAGRAPH.findall(page):
        yield html.unescape(_TAG.sub("", inside)).replace("¶", "")


def pod_paragraphs(page: str) -> Iterator[str]:
    """The running text of Perl's plain old documentation: what is not indented and is no command."""
    for paragraph in page.split("\n\n"):
        if paragraph and not paragraph.startswith((" ", "\t", "=")):
            found = 1
            while found:  # codes nest: take the innermost out until none is left
                paragraph, found = _POD_CODE.subn(r"\1\2", paragraph)
            yield paragraph


def dictionary_paragraphs(entry: str) -> Iterator[str]:
    """The definitions of a dictionary's entries, without their numbers, sources and references."""
    for paragraph in entry.split("\n\n"):
        _, _, definition = paragraph.partition("\n") if "\\" in paragraph else ("", "", paragraph)
        yield _DICTIONARY_NOTE.sub(" ", definition)


def pages_of_dictionary(text: str) -> Iterator[tuple[str, str]]:
    """A dictionary cut into pages: the entries whose headwords begin with the same three letters."""
    starts = [found.start() for found in _HEADWORD.finditer(text)]
    entries = (text[start:end] for start, end in zip(starts, [*starts[1:], len(text)]))
    for letters, group in itertools.groupby(entries, key=lambda entry: entry[:3].lower()):
        yield letters, "".join(group)


@dataclass(frozen=True)
class Domain:
    """A part of the corpus.

    Attributes:
        name: of its test set, ``test_NAME``.
        package: Debian's package.
        pages: which of the package's files are read.
        paragraphs: from a file's text to its paragraphs.
        latest: whether ``package`` only depends on the package of a version, which has the files.
    """

    name: str
    package: str
    pages: str
    paragraphs: Callable[[str], Iterator[str]] = html_paragraphs
    latest: bool = False

    def documents(self, package: Path) -> Iterator[Document]:
        """The sentences of each page that are prose."""
        for path, text in files_in(package, self.pages):
            for name, page in pages_of_dictionary(text) if path.endswith(".dz") else [(path, text)]:
                rows = list(_rows(self.paragraphs(page)))
                if rows:
                    yield Document(f"{self.name}:{name}", rows)


def _rows(paragraphs: Iterator[str]) -> Iterator[Row]:
    """The sentences of paragraphs that are whole, prose, and neither very short nor very long."""
    for paragraph in paragraphs:
        for sentence in sentences(_SPACE_BEFORE_STOP.sub(r"\1", squeeze(paragraph))):
            words = len(sentence.split())
            whole = sentence[:1].isupper() and sentence.endswith(_SENTENCE_CLOSE)
            readable = "\ufffd" not in sentence
            if whole and readable and SHORTEST <= words <= LONGEST and is_prose(sentence, LETTERS):
                yield (sentence,)


DOMAINS = (
    Domain("dictionary", "dict-gcide", r"gcide\.dict\.dz$", dictionary_paragraphs),
    Domain("kernel", "linux-doc", r"/html/(?!_sources|translations).*\.html$", latest=True),
    Domain("perl", "perl-doc", r"\.pod$", pod_paragraphs),
    Domain("politics", "anarchism", r"\.html$"),
    Domain("python", "python3-doc", r"/html/(?!_sources).*\.html$", latest=True),
    Domain("database", "postgresql-doc", r"/html/.*\.html$", latest=True),
    Domain("qt", "qtbase5-doc-html", r"\.html$"),
    # core and alloc say again what std says; src is code
    Domain("rust", "rust-doc", r"/html/(?!core/|alloc/|src/|implementors/).*\.html$"),
    Domain("boost", "libboost-doc", r"\.html$", latest=True),
)


def clear_of_near_duplicates(splits: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Without the sentences of train that resemble one of valid or test, since manuals repeat themselves."""
    held_out = [row[0] for split in SPLITS[1:] for document in splits[split] for row in document.rows]
    texts = [row[0] for document in splits["train"] for row in document.rows]
    near = near_duplicates(texts, held_out, NEAR)
    position, train = itertools.count(), []
    for document in splits["train"]:
        rows = [row for row in document.rows if next(position) not in near]
        if rows:
            train.append(Document(document.name, rows))
    return {**splits, "train": train}


def _held_out(documents: Iterator[Document]) -> dict[str, list[Document]]:
    """A domain's splits; a page that would fill most of a held-out set by itself stays in train."""
    short, long = [], []
    for document in documents:
        (long if len(document.rows) > HELD_OUT_ROWS // 4 else short).append(document)
    splits = hold_out(short, HELD_OUT_ROWS)
    return {**splits, "train": splits["train"] + long}


def extract(files: list[Path], target: str) -> Extraction:
    """The domains one after another, and a test set for each beside that of all."""
    parts = {domain.name: _held_out(domain.documents(file)) for domain, file in zip(DOMAINS, files)}
    together = {split: [document for part in parts.values() for document in part[split]] for split in SPLITS}
    splits = clear_of_near_duplicates(drop_recurring(together, columns=(0,)))
    rows = with_document_ends(splits)
    for name in parts:
        own = [document for document in splits["test"] if document.name.startswith(f"{name}:")]
        rows[f"test_{name}"] = with_document_ends({**splits, "test": own})["test"]
    return Extraction(("",), rows)


CORPUS = Corpus(
    name="domains",
    kind=Kind.TEXT,
    title="nine domains: a dictionary, political writing and seven manuals, English",
    licence="each package's own, all free: see its file `copyright`",
    packages=lambda target: [DebianPackage(domain.package, latest=domain.latest) for domain in DOMAINS],
    extract=extract,
    vocabulary=8000,
)
