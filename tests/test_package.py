"""What is installed: the package, the presets, the mark that it is typed, and the command."""

import re
import runpy
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
    data = {
        path.relative_to(package)
        for path in package.rglob("*")
        if path.suffix not in (".py", ".md", ".pyc") and path.is_file() and path.name != "evomoe"
    }
    assert {Path("py.typed"), Path("report/template/page.html"), Path("config/presets/evomoe.yaml")} <= data
    found = {path.relative_to(built / "fairseq_evomoe") for path in built.rglob("*") if path.is_file()}
    assert modules | data <= found
    assert (tmp_path / "bin" / "evomoe").exists()


def metadata(monkeypatch, url):
    """What ``setup.py`` tells of the package that is at home at ``url``."""
    told = {}
    monkeypatch.setenv("EVOMOE_URL", url)
    monkeypatch.setattr("setuptools.setup", told.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return told


def test_links_of_the_description_lead_somewhere_from_an_index(monkeypatch):
    pytest.importorskip("setuptools")
    told = metadata(monkeypatch, "https://host/evomoe/")
    text = told["long_description"]
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("#")]
    assert all(target.startswith("https://") for target in targets)
    own = rf"https://host/evomoe/(blob|raw)/v{re.escape(told['version'])}/([^#]+)"
    paths = [match[2] for match in map(re.compile(own).match, targets) if match]
    assert paths and all((ROOT / path).exists() for path in paths)
    assert told["url"] == "https://host/evomoe"
    assert metadata(monkeypatch, "")["long_description"] == (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_extra_is_in_the_table(monkeypatch):
    pytest.importorskip("setuptools")
    page = (ROOT / "fairseq_evomoe" / "checkpoints" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z]+)` \|", page.split("## `evomoe doctor`")[0], re.MULTILINE)
    assert sorted(rows) == sorted(metadata(monkeypatch, "")["extras_require"])


def test_the_release_is_published_only_after_what_was_built_is_checked():
    pages = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    publish = pages["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    steps = str(pages["jobs"]["build"]["steps"])
    assert "twine check --strict" in steps and "evomoe doctor" in steps


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
