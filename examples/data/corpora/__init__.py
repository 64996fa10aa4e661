"""One file for each corpus; ``BUILT_IN`` lists those that are downloaded."""

from __future__ import annotations

from corpora import bible, domains, english, libreoffice_help, reviews, shakespeare, wikipedia
from corpora.corpus import Corpus

BUILT_IN: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        shakespeare.CORPUS,
        wikipedia.CORPUS,
        bible.CORPUS,
        english.CORPUS,
        domains.CORPUS,
        libreoffice_help.CORPUS,
        reviews.CORPUS,
    )
}
