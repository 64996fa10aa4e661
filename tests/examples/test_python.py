"""``examples/python``: each script runs on a small checkpoint, and says what the model says."""

import contextlib
import io
import random
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import sentencepiece
import torch

from fairseq_evomoe.models.feed_forward import MoEModel
from support.cli import CLASSIFICATION, LM, MASKED_LM, TRANSLATION, call
from support.data import BAD, GOOD, OBJECTS, preprocess, sentences, write

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"max_update": 40, "save_interval": 99, "disable_validation": True, "lr": 0.02}
QUICK.update(moe_spawn_update=4, moe_anneal_updates=4, moe_hard_update=4)


@pytest.fixture(scope="module")
def pieces(translation_data, tmp_path_factory):
    """Folder with ``spm.model`` and, in ``bin``, English in its pieces and in translation's dictionary."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "spm.model").write_bytes((translation_data / "spm.model").read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    for name, number, seed in (("train", 64, 4), ("valid", 12, 5)):
        encoded = [" ".join(model.encode(line, out_type=str)) for line in sentences(number, seed)]
        write(folder / name, encoded)
    preprocess(
        only_source=True,
        srcdict=translation_data / "dict.en.txt",
        trainpref=folder / "train",
        validpref=folder / "valid",
        destdir=folder / "bin",
    )
    return folder


@pytest.fixture(scope="module")
def reviews(pieces, tmp_path_factory):
    """Folder with ``spm.model`` and, in ``bin``, sentences of two classes in the pieces' dictionary."""
    folder = tmp_path_factory.mktemp("reviews")
    (folder / "spm.model").write_bytes((pieces / "spm.model").read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    draw = random.Random(7)
    for name, number in (("train", 64), ("valid", 16)):
        labels = [draw.randrange(2) for _ in range(number)]
        text = [f"the king {draw.choice((BAD, GOOD)[y])} {draw.choice(OBJECTS)}" for y in labels]
        write(folder / f"{name}.input0", [" ".join(model.encode(line, out_type=str)) for line in text])
        write(folder / f"{name}.label", [("bad", "good")[y] for y in labels])
    for part, dictionary in (("input0", pieces / "bin" / "dict.txt"), ("label", None)):
        preprocess(
            only_source=True,
            trainpref=folder / f"train.{part}",
            validpref=folder / f"valid.{part}",
            srcdict=dictionary,
            destdir=folder / "bin" / part,
        )
    return folder


@pytest.fixture
def script(monkeypatch):
    """``script(name, *arguments)``: what a script prints, and its variables afterwards."""
    monkeypatch.chdir(ROOT)

    def run(name, *arguments):
        output = io.StringIO()
        with mock.patch.object(sys, "argv", [name, *map(str, arguments)]):
            with contextlib.redirect_stdout(output):
                names = runpy.run_path(f"examples/python/{name}.py", run_name="__main__")
        return output.getvalue(), names

    return run


def train(data, folder, **settings):
    call("fairseq-train", data, save_dir=folder, **settings)
    (folder / "checkpoint_last.pt").rename(folder / "checkpoint_best.pt")
    return folder


def test_language_model(script, pieces, tmp_path):
    folder = train(pieces / "bin", tmp_path, **{**LM, **QUICK})
    torch.manual_seed(1)
    output, names = script("language_model", folder, pieces, "the king loves")
    assert isinstance(names["lm"].models[0], MoEModel)
    text, perplexity = output.splitlines()
    assert text.startswith("the king loves") and len(text.split()) > 3
    scores = names["lm"].score("the king loves")["positional_scores"]
    assert float(perplexity.split()[1]) == pytest.approx(scores.mean().neg().exp().item(), abs=0.06)


def test_masked_lm(script, pieces, tmp_path):
    folder = train(pieces / "bin", tmp_path, **{**MASKED_LM, **QUICK})
    output, names = script("masked_lm", folder, pieces, "the king <mask> the crown")
    *filled, vectors = output.splitlines()
    assert isinstance(names["roberta"].model, MoEModel) and len(filled) == 3
    probabilities = [float(line.split()[0]) for line in filled]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1
    assert all(re.fullmatch(r"0\.\d+ the king ?.* the crown", line) for line in filled)
    tokens = names["roberta"].encode("the king <mask> the crown")
    assert vectors == f"vectors 1 {len(tokens)} 32"


def test_classification(script, reviews, tmp_path):
    settings = {**CLASSIFICATION, **QUICK, "init_token": 0, "separator_token": 2}
    folder = train(reviews / "bin", tmp_path, **settings)
    told = {}
    for verb in (GOOD[0], BAD[0]):
        output, names = script("classification", folder, reviews, f"the king {verb} the crown")
        told[verb] = re.fullmatch(r"(\w+), probability (0\.[5-9]\d|1\.00)\n", output).group(1)
    assert isinstance(names["roberta"].model, MoEModel)
    assert told == {GOOD[0]: "good", BAD[0]: "bad"}


def test_translation(script, translation_data, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "bin").symlink_to(translation_data)
    (data / "spm.model").symlink_to(translation_data / "spm.model")
    settings = {**TRANSLATION, **QUICK, "max_update": 120, "batch_size": 32, "lr": 0.005}
    folder = train(translation_data, tmp_path / "run", **settings)
    output, names = script("translation", folder, data, "eht gnik sevol eht nworc")
    translator = names["translator"]
    assert isinstance(translator.models[0], MoEModel)
    assert output.strip() == translator.translate("eht gnik sevol eht nworc", beam=5) != ""


def test_the_scripts_are_short():
    """Beside imports and arguments, a call and what is done with it."""
    for name in ("language_model", "masked_lm", "classification", "translation"):
        lines = (
            (ROOT / "examples" / "python" / f"{name}.py").read_text().split("sys.argv[1:]\n")[1].splitlines()
        )
        statements = [line for line in lines if line[:1] not in ("", " ", ")")]
        assert len(statements) <= 6, name
