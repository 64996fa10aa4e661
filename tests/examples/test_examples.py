"""The commands and YAML files of ``examples/``, scaled down."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import USER_DIR, Result, call_hydra
from support.data import preprocess, sentences, write

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
UPDATES = 24


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, lm_data):
    """A corpus with enough blocks of 64 tokens, in the dictionary of ``lm_data``."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, name in enumerate(("train", "valid", "test")):
        write(folder / name, sentences(150, seed))
    preprocess(
        only_source=True,
        srcdict=lm_data / "dict.txt",
        trainpref=folder / "train",
        validpref=folder / "valid",
        testpref=folder / "test",
        destdir=folder / "bin",
    )
    return folder / "bin"


def shell(script, *arguments, **environment):
    """Run one of the shell commands with the scripts of this interpreter's environment."""
    scripts = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["sh", str(EXAMPLES / script), *map(str, arguments)],
        env={
            **os.environ,
            "PATH": scripts + os.pathsep + os.environ["PATH"],
            "EVOMOE_USER_DIR": str(USER_DIR),
            "OMP_NUM_THREADS": "1",
            "UPDATES": str(UPDATES),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return Result(done.stdout)


def closing(result):
    """The last lines: a word, and what it tells."""
    told = dict(
        re.split(r" {2,}", line, maxsplit=1) for line in result.output.rsplit("\n\n", 1)[1].splitlines()
    )
    assert Path(told["checkpoint"]).exists() and re.fullmatch(r"\d+ min \d+ s", told["time"])
    assert re.search(r"(dense gate|top-1 routing), temperature", told["stage"])
    return told


def check_phases(result):
    """All phases were passed, in order."""
    phases = [log["moe_phase"] for log in result.log("train_inner")]
    assert phases[0] == 0 and phases[-1] == 2 and phases == sorted(phases)
    assert len(result.lines("spawned experts")) == 1


def test_language_modeling(corpus, tmp_path):
    result = shell("language_modeling/train.sh", corpus, tmp_path)
    check_phases(result)
    told = closing(result)
    perplexity = float(re.fullmatch(r"perplexity ([\d.]+)", told["test"])[1])
    assert told["next"] == f"evomoe info {told['checkpoint']}"  # the data have no SentencePiece model
    best = min(log["valid_ppl"] for log in result.log("valid"))
    assert perplexity == pytest.approx(best, rel=0.3)  # another split of the same grammar


def test_masked_lm_and_fine_tuning(corpus, classification_data, tmp_path):
    result = shell("masked_lm/train.sh", corpus, tmp_path / "pretrained")
    check_phases(result)
    assert re.fullmatch(r"perplexity [\d.]+", closing(result)["test"])
    pretrained = tmp_path / "pretrained" / "checkpoint_best.pt"
    result = shell(
        "masked_lm/finetune.sh",
        classification_data,
        pretrained,
        tmp_path / "tuned",
        UPDATES="60",
        SUBSET="valid",
    )
    assert result.lines("loading pretrained model from")
    assert all(log["moe_phase"] == 2 for log in result.log("train_inner"))
    accuracies = [float(x) for x in re.findall(r'accuracy": "([\d.]+)"', result.output)]
    assert re.fullmatch(r"accuracy [\d.]+", closing(result)["valid"])
    assert max(accuracies[-3:]) > 80  # two lists of verbs tell the classes apart


def test_translation(translation_data, tmp_path):
    result = shell("translation/train.sh", translation_data, tmp_path)
    check_phases(result)
    assert re.match(r"BLEU\D* = [\d.]+", closing(result)["test"])


@pytest.fixture
def stand_ins(tmp_path):
    """Commands that print what they are given, and a checkpoint that `evomoe info` has nothing to say of."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in ("train", "validate", "generate", "eval-lm"):
        (folder / f"fairseq-{name}").write_text('#!/bin/sh\necho "$0 $*"\n')
    (folder / "evomoe").write_text("#!/bin/sh\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    (tmp_path / "saved").mkdir()
    return {"PATH": str(folder) + os.pathsep + os.environ["PATH"]}


SCRIPTS = {
    "language_modeling/train.sh": ["data"],
    "masked_lm/train.sh": ["data"],
    "masked_lm/finetune.sh": ["data", "checkpoint_last.pt"],
    "translation/train.sh": ["data"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_three_updates_have_intervals_and_a_warm_up(script, stand_ins, tmp_path):
    """Fairseq divides by them."""
    result = shell(script, *SCRIPTS[script], tmp_path / "saved", UPDATES="3", **stand_ins)
    given = re.findall(r"--(?:log-interval|warmup-updates|validate-interval-updates) (\d+)", result.output)
    assert len(given) >= 2 and set(given) == {"1"}


def test_the_closing_lines_do_without_those_of_the_checkpoint(stand_ins, tmp_path):
    result = shell("masked_lm/train.sh", "data", tmp_path / "saved", **stand_ins)
    told = [line.split()[0] for line in result.output.rsplit("\n\n", 1)[1].splitlines()]
    assert told == ["checkpoint", "valid", "time", "next"]


@pytest.mark.parametrize(
    "task, data", [("language_modeling", "lm"), ("masked_lm", "lm"), ("translation", "")]
)
def test_yaml(task, data, corpus, translation_data, tmp_path):
    result = call_hydra(
        EXAMPLES / task / "evomoe.yaml",
        f"common.user_dir={USER_DIR}",
        f"task.data={corpus if data else translation_data}",
        f"checkpoint.save_dir={tmp_path}",
        "common.log_interval=5",
        "optimization.max_update=16",
        "model.moe_spawn_update=4",
        "model.moe_anneal_updates=6",
        "model.moe_hard_update=8",
    )
    assert len(result.lines("spawned experts before update 4")) == 1
    assert (tmp_path / "checkpoint_last.pt").exists()


def test_a_path_with_a_space_is_one_argument_of_the_demo(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="Perplexity: 7.5")

    plugin, out = tmp_path / "my code" / "fairseq_evomoe", tmp_path / "my demo"
    monkeypatch.setattr(demo, "PLUGIN", plugin)
    monkeypatch.setattr(demo.subprocess, "run", run)
    commands = [demo.training_command("evomoe", out, 900)]
    assert demo.evaluate("evomoe", out) == "7.5"
    assert {str(plugin), str(out / "evomoe")} < set(commands[0])
    assert {str(plugin), str(out / "evomoe" / "checkpoint_last.pt")} < set(commands[1])


@pytest.mark.network
@pytest.mark.skipif(not os.environ.get("EVOMOE_NETWORK_TESTS"), reason="EVOMOE_NETWORK_TESTS is not set")
def test_demo(tmp_path):
    """The first command of README.md, with a tenth of the updates."""
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--out", str(tmp_path), "--updates", "90"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s+\d+  ", line)]
    assert [int(row[0]) for row in rows] == list(range(10, 91, 10))
    assert rows[0][1] == "one" and rows[-1][1] == "top-1"
    assert rows[0][-1] == rows[0][-2]  # the dense model and EvoMoE are one model before the spawn
    assert "perplexity" in done.stdout.splitlines()[-1]
