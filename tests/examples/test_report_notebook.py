"""The notebook that trains the demo and shows its report, at toy size."""

import os
from pathlib import Path

import pytest

from support.data import preprocess, sentences, write

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "report" / "demo.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, lm_data, monkeypatch):
    for seed, name in enumerate(("train", "valid", "test")):
        write(tmp_path / name, sentences(200, seed))
    splits = {f"{name}pref": tmp_path / name for name in ("train", "valid", "test")}
    preprocess(only_source=True, srcdict=lm_data / "dict.txt", destdir=tmp_path / "demo/data/bin", **splits)
    for name, value in (("EVOMOE_ROOT", ROOT), ("EVOMOE_DEMO", tmp_path / "demo"), ("UPDATES", 18)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    cells = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    said = {name: "".join(output.get("text", "") for output in outputs) for name, outputs in cells.items()}
    assert "one expert" in said["train"] and "top-1" in said["train"]
    (shown,) = [output.data["text/html"] for output in cells["report"] if "data" in output]
    assert shown.startswith("<iframe srcdoc=") and "What the experts of evomoe do" in shown
    assert "expert 7" in said["numbers"] and "explained by the token 100%" in said["numbers"]
