"""``evomoe doctor``: what is wrong is told in a line with the way out, even where nothing can be imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_evomoe.training import doctor
from support.cli import USER_DIR

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path, *arguments, modules=None):
    """Output and exit status of the command, in an environment with other modules in place of those there."""
    first = tmp_path / "modules"
    first.mkdir()
    for name, text in (modules or {}).items():
        (first / f"{name}.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(first), "HOME": str(tmp_path / "home")}
    command = [sys.executable, USER_DIR / "bin" / "evomoe", "doctor", *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return done.stdout, done.returncode


def statuses(output):
    """Status of each thing that was looked at."""
    found = re.findall(r"^(OK|WARN|FAIL) +(\S+)", output, flags=re.M)
    return {what: status for status, what in found}


def line_of(what, output):
    (line,) = re.findall(rf"^(?:OK|WARN|FAIL) +{what} .*$", output, flags=re.M)
    return line


def test_all_is_well_here(tmp_path):
    output, status = run(tmp_path)
    found = statuses(output)
    assert status == 0, output
    assert "FAIL" not in found.values()
    for what in (
        "python",
        "numpy",
        "user-dir",
        "save-dir",
        "torch",
        "gpu",
        "ranks",
        "fairseq",
        "plugin",
        "training",
    ):
        assert what in found, output
    assert "keep_experts_out_of_buffer" in line_of("mended", output)
    assert "spawned, saved and resumed" in line_of("training", output)
    assert str(tmp_path) not in output  # nobody's folders
    assert not [path for path in tmp_path.iterdir() if path.name != "modules"]


def test_relative_paths_are_those_of_the_folder_that_it_is_called_in(tmp_path):
    """As in a training, though each step is tried in a folder of its own."""
    plugin = tmp_path / "plugins" / "mine"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("import beside, fairseq_evomoe\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "beside.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["lib", str(ROOT)])}
    command = [sys.executable, USER_DIR / "bin" / "evomoe", "doctor", "--user-dir", "plugins/mine"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert line_of("training", done.stdout).startswith("OK")


def test_another_copy_on_a_relative_path_is_told(no_steps, monkeypatch, tmp_path):
    copy = tmp_path / "lib" / "fairseq_evomoe"
    copy.mkdir(parents=True)
    (copy / "__init__.py").write_text('__version__ = "0.1.0"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib")
    assert told("copies").status == "WARN"


@pytest.mark.parametrize(
    "modules, what, text",
    [
        ({"torch": "raise ImportError('libcudart.so.12: no such file')"}, "torch", "libcudart.so.12"),
        ({"torch": "import os; os.abort()"}, "torch", "died of SIGABRT"),
        ({"torch": "raise SystemExit(3)"}, "torch", "pip install torch (choose"),
        (
            {"fairseq": "raise ValueError('mutable default <class X> for field common is not allowed')"},
            "fairseq",
            "fairseq 0.12.2 is for Python below 3.11",
        ),
        (
            {"fairseq": "raise ModuleNotFoundError(\"No module named 'fairseq'\")"},
            "fairseq",
            "pip install ve-fairseq",
        ),
    ],
    ids=["no library", "dies", "exits", "old fairseq", "no fairseq"],
)
def test_what_is_broken_is_named(modules, what, text, tmp_path):
    output, status = run(tmp_path, modules=modules)
    assert status == 2
    assert line_of(what, output).startswith("FAIL") and text in line_of(what, output)
    assert line_of("training", output).startswith("FAIL  training     was not tried")
    assert "Traceback" not in output and output.endswith("Something is wrong: see FAIL.\n")
    assert statuses(output)["save-dir"] == "OK"  # the rest is looked at


def test_what_hangs_is_ended(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "LIMIT", 2)
    lines = list(doctor.lines())
    (line,) = [line for line in lines if line.what == "torch"]
    assert line.status == "FAIL" and "hangs" in line.text


@pytest.fixture
def no_steps(monkeypatch):
    """Without the process that takes seconds."""
    monkeypatch.setattr(doctor, "_steps", lambda user_dir: iter(()))


def told(what, **options):
    (line,) = [line for line in doctor.lines(**options) if line.what == what]
    return line


def test_the_user_dir_is_this_copy_or_another(no_steps, tmp_path):
    assert told("user-dir", user_dir=str(USER_DIR)).status == "OK"
    link = tmp_path / "link"
    link.symlink_to(USER_DIR)
    assert told("user-dir", user_dir=str(link)).status == "OK"
    assert told("user-dir", user_dir=str(tmp_path)).status == "FAIL"
    plugin = told("user-dir", user_dir=str(ROOT / "tests" / "support" / "plugin_router"))
    assert plugin.status == "OK" and "plugin" in plugin.text
    copy = tmp_path / "fairseq_evomoe"
    (copy / "moe").mkdir(parents=True)
    (copy / "__init__.py").write_text('__version__ = "0.1.0"\n')
    other = told("user-dir", user_dir=str(copy))
    assert other.status == "WARN" and "another copy (0.1.0)" in other.text


def test_another_copy_that_python_finds_is_told(no_steps, monkeypatch, tmp_path):
    copy = tmp_path / "fairseq_evomoe"
    copy.mkdir()
    (copy / "__init__.py").write_text('__version__ = "0.1.0"\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = told("copies")
    assert line.status == "WARN" and "0.1.0" in line.text and "uninstall" in line.text


def test_a_folder_that_cannot_be_written_to_is_told(no_steps, monkeypatch, tmp_path):
    assert told("save-dir", save_dir=str(tmp_path / "new" / "one")).status == "OK"
    (tmp_path / "file").write_text("")
    assert told("save-dir", save_dir=str(tmp_path / "file" / "x")).status == "FAIL"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("usage", (), {"free": 5e8}))
    assert told("save-dir", save_dir=str(tmp_path)).status == "WARN"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert told("save-dir", save_dir=str(tmp_path)).status == "FAIL"


def test_packages_that_are_missing_or_untried_are_told(no_steps, monkeypatch):
    there = {"hydra-core": "1.5.0", "numpy": "2.4.6"}
    monkeypatch.setattr(doctor, "_version", there.get)
    assert (
        told("hydra-core").status == "WARN"
        and "pip install 'hydra-core>=1.0.7,<1.4'" in told("hydra-core").text
    )
    assert told("omegaconf").status == "FAIL" and told("numpy").status == "OK"
    assert told("sentencepiece").status == "WARN"


@pytest.mark.parametrize(
    "step, status, text",
    [
        ({"step": "torch", "version": "2.16.0+cu132", "threads": 1}, "WARN", "has not been tried"),
        ({"step": "torch", "version": "1.12.1+cu113", "threads": 1}, "OK", "1.12.1+cu113"),
        ({"step": "gpu", "devices": [], "built": "12.8"}, "WARN", "built for CUDA 12.8, and finds no GPU"),
        (
            {
                "step": "gpu",
                "built": "12",
                "devices": [{"name": "H", "gigabytes": 139.6, "capability": "9.0"}],
            },
            "OK",
            "H, 140 GB, capability 9.0",
        ),
        ({"step": "ranks", "backends": ["gloo"], "gpus": 2}, "WARN", "need NCCL"),
        ({"step": "ranks", "backends": [], "gpus": 0}, "WARN", "none; without gloo"),
        ({"step": "fairseq", "version": "0.10.1", "folder": "/x/fairseq"}, "WARN", "has not been tried"),
        (
            {"step": "training", "error": "RuntimeError: no\n  disk"},
            "FAIL",
            "RuntimeError: no disk: give this report",
        ),
    ],
    ids=str,
)
def test_what_steps_have_found(step, status, text, monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"fairseq": "0.10.1"}.get)
    (line,) = doctor._told(step)
    assert line.status == status and text in str(line)


@pytest.mark.parametrize(
    "python, error, text",
    [
        ((3, 14, 0), "TypeError: str | None is not callable", "needs a line of fairseq changed"),
        ((3, 13, 0), "No module named 'fairseq'", "no fairseq has wheels for this Python"),
        ((3, 12, 0), "No module named 'fairseq'", "pip install ve-fairseq==0.12.3"),
    ],
    ids=["3.14", "3.13", "3.12"],
)
def test_each_python_has_its_own_way_to_fairseq(python, error, text, monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", python)
    way = doctor._way_out("fairseq", error)
    monkeypatch.undo()
    assert text in way
    assert python < (3, 13) or "### Which fairseq" in (ROOT / "examples" / "troubleshooting.md").read_text()


def test_versions_are_those_of_setup_py():
    text = (ROOT / "setup.py").read_text()
    assert f'"torch>={doctor.TORCH[0]}"' in text
    assert f'"hydra-core>={doctor.HYDRA[0]}"' in text
    assert all(f"=={version}" in text for version in doctor.FAIRSEQ)


def test_names_of_people_are_left_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert doctor._private("in /home/ada/src/fairseq") == "in ~/src/fairseq"
