"""Small data sets, made and binarised once, for the tests that run fairseq's command lines."""

import os
import random
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():  # without a GPU, Triton's interpreter runs its kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

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
    from cli import call

    call("fairseq-preprocess", workers=1, **options)


@pytest.fixture(scope="session")
def lm_data(tmp_path_factory):
    """Folder of a monolingual corpus for ``language_modeling`` and ``masked_lm``."""
    folder = tmp_path_factory.mktemp("lm")
    for name, number, seed in (("train", 64, 1), ("valid", 12, 2), ("test", 12, 3)):
        write(folder / name, sentences(number, seed))
    preprocess(
        only_source=True,
        trainpref=folder / "train",
        validpref=folder / "valid",
        testpref=folder / "test",
        destdir=folder / "bin",
    )
    return folder / "bin"


@pytest.fixture(scope="session")
def translation_data(tmp_path_factory):
    """Folder of a parallel corpus de-en in pieces of the SentencePiece model ``spm.model`` in it."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("translation")
    splits = {
        name: sentences(number, seed)
        for name, number, seed in (("train", 64, 4), ("valid", 12, 5), ("test", 40, 6))
    }
    text = write(folder / "text", splits["train"] + [translated(line) for line in splits["train"]])
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spm"),
        vocab_size=90,
        minloglevel=2,
        hard_vocab_limit=False,
        num_threads=1,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    for name, lines in splits.items():
        write(folder / (name + ".raw.de"), [translated(line) for line in lines])
        write(folder / (name + ".raw.en"), lines)
        write(
            folder / (name + ".de"),
            [" ".join(model.encode(translated(line), out_type=str)) for line in lines],
        )
        write(folder / (name + ".en"), [" ".join(model.encode(line, out_type=str)) for line in lines])
    preprocess(
        source_lang="de",
        target_lang="en",
        joined_dictionary=True,
        trainpref=folder / "train",
        validpref=folder / "valid",
        testpref=folder / "test",
        destdir=folder / "bin",
    )
    (folder / "spm.model").rename(folder / "bin" / "spm.model")
    for split in ("valid", "test"):
        for lang in ("de", "en"):
            (folder / "{}.raw.{}".format(split, lang)).rename(folder / "bin" / "{}.{}".format(split, lang))
    return folder / "bin"


@pytest.fixture(scope="session")
def classification_data(tmp_path_factory, lm_data):
    """Folder of sentences with labels for ``sentence_prediction``, in the dictionary of ``lm_data``."""
    folder = tmp_path_factory.mktemp("classification")
    for name, number, seed in (("train", 64, 7), ("valid", 16, 8)):
        draw = random.Random(seed)
        labels = [draw.randrange(2) for _ in range(number)]
        text = ["the king {} {}".format(draw.choice((BAD, GOOD)[y]), draw.choice(OBJECTS)) for y in labels]
        write(folder / (name + ".input0"), text)
        write(folder / (name + ".label"), map(str, labels))
    for part, dictionary in (("input0", lm_data / "dict.txt"), ("label", None)):
        preprocess(
            only_source=True,
            trainpref=folder / ("train." + part),
            validpref=folder / ("valid." + part),
            srcdict=dictionary,
            destdir=folder / "bin" / part,
        )
    return folder / "bin"
