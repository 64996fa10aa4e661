"""A small grammar, and sentences of it binarised as fairseq does."""

import random

SUBJECTS = "the king|my lord|the fool|a servant|the queen|his daughter".split("|")
VERBS = "loves|fears|follows|forgets|answers|remembers|betrays".split("|")
OBJECTS = "the crown|her brother|a storm|the castle|an old song|the night|his sword".split("|")
ENDS = "at dawn|in silence|with great joy|for ever|without reason".split("|")
GOOD, BAD = "loves remembers answers".split(), "fears forgets betrays".split()


def sentences(number, seed):
    """Lines of one to three clauses from a small grammar, of very different lengths."""
    draw = random.Random(seed)
    clauses = lambda: " ".join(map(draw.choice, (SUBJECTS, VERBS, OBJECTS, ENDS)))  # noqa: E731
    return [" and ".join(clauses() for _ in range(draw.choice((1, 1, 2, 3)))) for _ in range(number)]


def translated(sentence):
    """Another language: each word backwards."""
    return " ".join(word[::-1] for word in sentence.split())


def write(path, lines):
    """Write lines to a text file."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def preprocess(**options):
    """Run fairseq-preprocess."""
    from support.cli import call  # fairseq takes seconds to import, and tests of moe/ need none of it

    call("fairseq-preprocess", workers=1, **options)
