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
    assert {line["part"] for line in found} == {"machine", "profile", "layer", "routers", "peers"}
    assert not [line for line in found if "error" in line and "grouped_mm" not in line["error"]]
    layer = next(line for line in found if line["key"] == "layer, T = 64, top-1, E = 8, balanced")
    assert layer["ratio"]["floor"]["median"] == 1 and layer["ratio"]["layer"]["median"] > 0
    assert {"one function", "looked up"} < layer["ratio"].keys()
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
    assert "## Layer" in page and "## Routers" in page and "## Profiles" in page

    quality = records(measured / "quality.jsonl")[1:]
    labels = {line["label"] for line in quality}
    assert len(labels) == 4 and {line["update"] for line in quality} == {5, 10, 15, 20}
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
