"""`evomoe`: what it needs, and that nothing that it writes is ever half there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fairseq_evomoe
from support.cli import LM, USER_DIR, call, evomoe

SCRIPT = USER_DIR / "bin" / "evomoe"


def run(*arguments, cwd=None, python=()):
    """The script in a process of its own, which finds the package by nothing but its own place."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *python, SCRIPT, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_folder_that_is_not_installed_will_do(tmp_path):
    done = run("user-dir", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{USER_DIR}\n"), done.stderr
    done = run("consolidate", "none.pt", "--out", "x.pt", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith(
        "evomoe consolidate: There is no checkpoint none.pt.\n"
    )


@pytest.mark.parametrize("command", ["presets", "user-dir"])
def test_who_reads_the_output_may_leave_early(command):
    """As head does."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, SCRIPT, command], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_version_is_told(tmp_path):
    assert run("--version", cwd=tmp_path).stdout == f"evomoe {fairseq_evomoe.__version__}\n"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["merge", "--help"], "--experts M"),
        (["densify", "--help"], "{sum,average,topk,svd}"),
        (["reshard", "--help"], "--parts N"),
        (["consolidate", "--help"], "--out FILE"),
        (["report", "--help"], "--domain NAME=FILE"),
        (["merge", "x.pt", "--experts", "many"], "invalid int value: 'many'"),
        (["presets", "--help"], "--ffn-dim D"),
        (["info", "--help"], "--json"),
        (["doctor", "--nothing"], "unrecognized arguments: --nothing"),
        (["info", "none.pt"], "evomoe info: There is no checkpoint none.pt."),
        (["--version"], "evomoe "),
        (["user-dir", "too", "much"], "unrecognized arguments: too much"),
        ([], "required"),
    ],
)
def test_arguments_are_parsed_without_torch(arguments, text, tmp_path):
    done = run(*arguments, cwd=tmp_path, python=["-X", "importtime"])
    assert text in done.stdout + done.stderr
    assert not re.search(r"\| +(torch|fairseq)\b", done.stderr)


@pytest.fixture(scope="module")
def lm(lm_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    call("fairseq-train", lm_data, save_dir=folder, **{**LM, "moe_spawn_update": 0, "max_update": 2})
    return folder / "checkpoint_last.pt"


def stop_at(monkeypatch, number, error=KeyboardInterrupt):
    """Let writing stop in the middle of a file, the first of which has number 0."""
    save, calls = torch.save, []

    def stopping_save(content, file, *args, **kwargs):
        calls.append(file)
        if len(calls) <= number:
            return save(content, file, *args, **kwargs)
        (Path(file).open("wb") if isinstance(file, (str, Path)) else file).write(b"half of it")
        raise error("stopped")

    monkeypatch.setattr(torch, "save", stopping_save)


COMMANDS = {
    "merge": (["--experts", 2], "small.pt"),
    "densify": (["--method", "topk"], "dense.pt"),
    "reshard": (["--parts", 2], "parts.pt"),
    "consolidate": ([], "whole.pt"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("there", [False, True], ids=["new", "over another"])
def test_a_command_that_is_stopped_leaves_no_half_file(command, there, lm, tmp_path, monkeypatch):
    source = lm
    if command == "consolidate":
        source = tmp_path / "source" / "parts.pt"
        source.parent.mkdir()
        evomoe("reshard", lm, "--parts", 2, "--out", source)
    arguments, name = COMMANDS[command]
    out = tmp_path / "out" / name
    out.parent.mkdir()
    if there:
        out.write_bytes(b"what was there before")
    stop_at(monkeypatch, 1 if command == "reshard" else 0)
    with pytest.raises(KeyboardInterrupt):
        evomoe(command, source, *arguments, "--out", out, "--force")
    assert out.read_bytes() == b"what was there before" if there else not out.exists()
    assert {path.name for path in out.parent.iterdir()} <= {name}


def test_a_full_disk_is_one_sentence(lm, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 0, OSError)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # fairseq waits before it tries again
    with pytest.raises(SystemExit) as stopped:
        evomoe("merge", lm, "--experts", 2, "--out", tmp_path / "small.pt")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert error == f"evomoe merge: The checkpoint cannot be written to {tmp_path / 'small.pt'}: stopped."
    assert not list(tmp_path.iterdir())


@pytest.fixture
def parts(lm, tmp_path):
    """The first of two files."""
    path = tmp_path / "source" / "parts.pt"
    path.parent.mkdir()
    evomoe("reshard", lm, "--parts", 2, "--out", path)
    return path


def is_refused(capsys, *arguments):
    """What a command says that refuses to do anything."""
    folder = Path(arguments[1]).parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        evomoe(*arguments)
    assert stopped.value.code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return capsys.readouterr().err.splitlines()[-1]


OUTPUTS = {
    "another file": (lambda path, first: path.write_bytes(b"x"), False, "give another name, or --force"),
    "a folder": (lambda path, first: path.mkdir(), True, "is a folder"),
    "a link to it": (lambda path, first: path.symlink_to(first), True, "which would be lost"),
    "a name of it": (lambda path, first: os.link(first, path), True, "which would be lost"),
    "a name of a part": (
        lambda path, first: os.link(f"{first.with_suffix('')}-experts1.pt", path),
        True,
        "which would be lost",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", OUTPUTS)
def test_an_output_that_is_there_is_not_lost(what, command, parts, capsys):
    make, force, text = OUTPUTS[what]
    arguments, name = COMMANDS[command]
    out = parts.parent / ("out-" + name)
    make(out, parts)
    options = ["--force"] if force else []
    assert text in is_refused(capsys, command, parts, *arguments, "--out", out, *options)


def test_no_part_of_an_output_is_lost(parts, capsys):
    other = parts.parent / "other-experts1.pt"
    other.write_bytes(b"x")
    reshard = ["reshard", parts, "--parts", 2, "--out", parts.parent / "other.pt"]
    assert f"{other} is there already" in is_refused(capsys, *reshard)
    evomoe(*reshard, "--force")
    # of this name, the input's second file is the second file too
    arguments = ["consolidate", parts, "--out", parts.with_suffix(""), "--force"]
    assert "which would be lost" in is_refused(capsys, *arguments)


def test_a_set_takes_the_place_of_one_with_more_files(parts):
    out = parts.parent / "out.pt"
    evomoe("reshard", parts, "--parts", 4, "--out", out)
    evomoe("reshard", parts, "--parts", 2, "--out", out, "--force")
    assert {path.name for path in parts.parent.glob("out*")} == {"out.pt", "out-experts1.pt"}
    evomoe("check", out)


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_whenever_reshard_is_killed_its_output_is_whole(renamed, parts, monkeypatch):
    out = parts.parent / "out.pt"
    evomoe("reshard", parts, "--parts", 3, "--out", out)
    before = torch.load(out)["moe_shards"]["name"]
    rename, calls = os.replace, []

    def dying(*names):
        calls.append(names)
        if len(calls) > renamed:
            raise KeyboardInterrupt
        rename(*names)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", dying)
        evomoe("reshard", parts, "--parts", 3, "--out", out, "--force")
    evomoe("check", out)
    assert (torch.load(out)["moe_shards"]["name"] == before) == (renamed == 0)
    assert len(list(out.parent.glob("*.tmp"))) == (0 if renamed == 0 else 3 - renamed)  # found there


def test_a_folder_that_cannot_be_written_to_is_one_sentence(parts, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    out = parts.parent / "whole.pt"
    assert "cannot be written to: give another" in is_refused(capsys, "consolidate", parts, "--out", out)


def test_a_router_of_somebody_else_s_is_merged(lm, tmp_path):
    """Its class says how; the command is told where it is."""
    state = torch.load(lm)
    state["cfg"]["model"]["moe_router"] = "nearest"  # which has a weight of the same shape
    torch.save(state, tmp_path / "nearest.pt")
    plugin = Path(__file__).parent.parent / "support" / "plugin_router"
    arguments = ["merge", tmp_path / "nearest.pt", "--out", tmp_path / "small.pt", "--experts"]
    done = run(*arguments, 2)
    assert done.returncode == 2 and "--user-dir" in done.stderr
    done = run(*arguments, 1, "--user-dir", plugin)  # whose weights for one expert are not 1
    assert done.returncode == 2 and "--moe-router nearest" in done.stderr
    done = run(*arguments, 2, "--user-dir", plugin)
    assert done.returncode == 0, done.stderr
    model = torch.load(tmp_path / "small.pt")["model"]
    assert model["decoder.layers.1.moe.router.weight"].shape == (2, 32)
