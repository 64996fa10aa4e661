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


def test_the_version_is_told(tmp_path):
    assert run("--version", cwd=tmp_path).stdout == f"evomoe {fairseq_evomoe.__version__}\n"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["merge", "--help"], "--experts M"),
        (["reshard", "--help"], "--parts N"),
        (["consolidate", "--help"], "--out FILE"),
        (["merge", "x.pt", "--experts", "many"], "invalid int value: 'many'"),
        (["presets", "--help"], "--ffn-dim D"),
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
