"""Small data sets, made and binarised once, for the tests that run fairseq's command lines."""

import os
import random
from pathlib import Path
from unittest import mock

import pytest

pytest.register_assert_rewrite("support")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
if not Path("/dev/nvidiactl").exists():  # without a GPU, Triton's interpreter runs its kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support.data import BAD, GOOD, OBJECTS, preprocess, sentences, translated, write  # noqa: E402


def pytest_configure(config):
    """Let pytest-xdist hand out files in the order below, not those with the most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that the last of them keeps no other process waiting."""
    long = {
        item.path for item in items if item.get_closest_marker("ranks") or item.get_closest_marker("slow")
    }
    items.sort(key=lambda item: item.path not in long)  # and else as they were


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
            (folder / f"{split}.raw.{lang}").rename(folder / "bin" / f"{split}.{lang}")
    return folder / "bin"


@pytest.fixture(scope="session")
def classification_data(tmp_path_factory, lm_data):
    """Folder of sentences with labels for ``sentence_prediction``, in the dictionary of ``lm_data``."""
    folder = tmp_path_factory.mktemp("classification")
    for name, number, seed in (("train", 64, 7), ("valid", 16, 8)):
        draw = random.Random(seed)
        labels = [draw.randrange(2) for _ in range(number)]
        text = [f"the king {draw.choice((BAD, GOOD)[y])} {draw.choice(OBJECTS)}" for y in labels]
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


@pytest.fixture(scope="session")
def trained(request, tmp_path_factory):
    """``trained(settings, **changes)``: a run that tests share, which is trained when the first asks for it.

    It has checkpoints of each third update.  Tests only read what is in its folder.
    """
    from support.cli import Run, call
    from support.tasks import DATA

    runs = {}

    def train(settings, **changes):
        settings = {"save_interval_updates": 3, **settings, **changes}
        key = repr(sorted(settings.items()))
        if key not in runs:
            folder = tmp_path_factory.mktemp("trained")
            data = request.getfixturevalue(DATA[settings["task"]])
            runs[key] = Run(folder, call("fairseq-train", data, save_dir=folder, **settings))
        return runs[key]

    return train


@pytest.fixture
def flat_fp16_on_cpu():
    """fp16_optimizer.py:43 files its one flat tensor under the current GPU; CPU tensors look for None."""
    with mock.patch("torch.cuda.current_device", return_value=None):
        yield
