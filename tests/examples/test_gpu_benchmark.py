"""``examples/benchmark/gpu.sh`` in small, on whatever there is: a GPU is at hand for minutes only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmark"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="a shell script")]


def run(folder, **environment):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(FOLDER / "gpu.sh"), str(folder), "--quick"],
        env={**os.environ, "PATH": path, "LIMIT": "1500", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(folder):
    """The lines of a training that do not depend on the machine."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in records(folder / "quality.jsonl")]


@pytest.fixture(scope="module")
def measured(lm_data, tmp_path_factory):
    """The folder of a whole run; what is in it may be changed by the test that cuts it."""
    folder = tmp_path_factory.mktemp("measured")
    done = run(folder, DATA=str(lm_data))
    assert done.returncode == 0, done.stdout
    return folder


def test_all_of_it_in_small(measured):
    found = records(measured / "gpu.jsonl")
    assert {line["part"] for line in found} == {
        *("machine", "profile", "layer", "routers", "router sizes", "peers"),
    }
    assert not [line for line in found if "error" in line and "grouped_mm" not in line["error"]]
    layer = next(line for line in found if line["key"] == "layer, T = 64, top-1, E = 8, balanced")
    assert layer["ratio"]["floor"]["median"] == 1 and layer["ratio"]["layer"]["median"] > 0
    assert {"one function", "looked up", "no biases"} < layer["ratio"].keys()
    base = next(line for line in found if line["key"] == "router, base")
    assert base["ratio"].keys() == {"router", "in training", "on device", "floor"}
    peers = [line["rows"] for line in found if line["part"] == "peers"]
    assert all(rows[-1]["name"] == "torch's grouped_mm, bare" for rows in peers)
    update = next(line for line in found if "whole update" in line["key"])
    assert update["ratio"]["layer"]["median"] > 0 and update["profiles"].keys() == {
        "layer",
        "looked up",
        "floor",
    }
    profile = next(line for line in found if line["part"] == "profile")
    assert profile["launches"] > 10 and 0 < profile["busy_us"] <= profile["span_us"]
    assert (
        "passed" in (measured / "tests.txt").read_text() or "skipped" in (measured / "tests.txt").read_text()
    )
    page = (measured / "gpu.md").read_text()
    titles = ("Targets", "Layer", "Routers", "Routers by size", "Profiles")
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == list(titles)
    assert "**missed**" in page and "| memory, of the floor's, the most of them | 1.20 |" in page

    quality = records(measured / "quality.jsonl")[1:]
    labels = {line["label"] for line in quality}
    assert len(labels) == 7 and {line["update"] for line in quality} == {5, 10, 15, 20}
    dense = [line["bits"] for line in quality if line["label"] == "dense"]
    assert dense[-1] < dense[0]
    assert "| dense |" in (measured / "quality.md").read_text()

    # cut: what is there is not measured again, and what is missing is
    kept = [line for line in found if line["part"] != "routers"]
    (measured / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    again = run(measured)
    assert again.returncode == 0, again.stdout
    assert records(measured / "gpu.jsonl")[: len(kept)] == kept
    assert [line["key"] for line in records(measured / "gpu.jsonl")[len(kept) :]] == [
        line["key"] for line in found if line["part"] == "routers"
    ]


def test_training_goes_on_from_its_checkpoints(measured, lm_data, tmp_path):
    """The same numbers as without a cut."""
    folder = tmp_path / "cut"

    def train(*flags):
        command = [sys.executable, str(FOLDER / "quality" / "gpu.py"), str(lm_data), "--out", str(folder)]
        done = subprocess.run(
            [*command, "--quick", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout
        return without_times(folder)

    whole = without_times(measured)
    assert train("--save", "--stop", "10") == [line for line in whole if line.get("update", 0) <= 10]
    assert train("--save") == whole


def test_tests_that_fail_are_run_again(tmp_path):
    """Until they pass; all else is left out here."""
    commands, folder = tmp_path / "commands", tmp_path / "out"
    commands.mkdir()
    python = commands / "python3"

    def again(status):
        python.write_text(
            f'#!/bin/sh\ncase "$*" in *"-m pytest"*) echo tests: {status}; exit {status};; esac\n'
        )
        python.chmod(0o755)
        done = run(folder, PATH=os.pathsep.join([str(commands), os.environ["PATH"]]))
        return done.returncode, done.stdout

    for status in (1, 124):  # failed, cut
        code, said = again(status)
        assert code == 1 and said.startswith(f"tests: {status}\n") and "runs them again" in said
    assert again(0) == (0, "tests: 0\n")
    assert (folder / "tests.txt").read_text() == "tests: 0\n"
    assert again(1) == (0, "")  # they have passed


def test_the_page_tells_which_targets_are_met(monkeypatch):
    """The figures that an H200 gave."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_report

    known = {line["key"]: line for line in records(FOLDER / "gpu_results" / "h200.jsonl")}
    page = gpu_report.report(known).split("## Layer")[0]
    assert "| T = 16384, top-1, E = 8, balanced | 1.20 | 1.69 | **missed** |" in page
    assert "| T = 16384, single expert | 1.03 | 1.02 | met |" in page
    assert "| memory, of the floor's, the most of them | 1.20 | 1.00 | met |" in page
    assert "| peers, top-1 of 8, fairseq_evomoe, ReLU | 1.00 | 0.26 | ahead |" in page


def test_a_line_that_a_cut_has_left_half_written_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_measure

    (tmp_path / "gpu.jsonl").write_text('{"key": "a", "part": "layer"}\n{"key": "b", "pa')
    results = gpu_measure.Results(tmp_path, 60)
    assert list(results.known) == ["a"]
    results.measure("b", "layer", lambda: {"ms": 1})
    assert list(gpu_measure.Results(tmp_path, 60).known) == ["a", "b"]
