"""What is installed: the package, the presets, the mark that it is typed, and the command."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_installed_has_all_that_is_read(tmp_path):
    pytest.importorskip("setuptools")
    source, built = tmp_path / "source", tmp_path / "built"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "fairseq_evomoe", source / "fairseq_evomoe", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(built)]
    done = subprocess.run(
        [*command, "--build-scripts", str(tmp_path / "bin")], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    package = ROOT / "fairseq_evomoe"
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    presets = {path.relative_to(package) for path in package.rglob("*.yaml")}
    assert len(presets) > 20
    found = {path.relative_to(built / "fairseq_evomoe") for path in built.rglob("*") if path.is_file()}
    assert modules | presets | {Path("py.typed")} <= found
    assert (tmp_path / "bin" / "evomoe").exists()


def test_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md")), ids=lambda p: p.stem
)
def test_issue_templates_have_a_name(path):
    head = yaml.safe_load(path.read_text(encoding="utf-8").split("---")[1])
    assert head["name"] and head["about"]


def test_the_image_has_the_torch_of_the_tests():
    """README's test line and ``examples/Dockerfile`` install one version."""
    found = {
        name: set(re.findall(r"torch==([\d.]+\d)", (ROOT / name).read_text(encoding="utf-8")))
        for name in ("README.md", "examples/Dockerfile")
    }
    assert len(found["examples/Dockerfile"]) == 1
    assert found["examples/Dockerfile"] <= found["README.md"]
