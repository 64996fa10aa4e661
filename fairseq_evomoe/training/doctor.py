"""``evomoe doctor``: whether everything that a training needs is there and works, in lines for a bug report.

This module imports the standard library alone, so that it can tell what is wrong where torch or fairseq are
missing or broken.  What needs them is ``doctor_steps.py``, in a process of its own, which may die.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

PACKAGE = Path(__file__).resolve().parents[1]
# what has been tried: from, up to below; and the two of fairseq
TORCH, HYDRA, FAIRSEQ = ("1.12", "2.16"), ("1.0.7", "1.4"), ("0.12.2", "0.12.3")
"""The versions that setup.py allows, from the first to before the second; of fairseq, the two."""
OPTIONAL = {"sentencepiece": "--bpe sentencepiece", "sacrebleu": "--scoring sacrebleu"}
LIMIT = 300
"""Seconds after which what has not answered hangs."""

OK, WARN, FAIL = "OK", "WARN", "FAIL"


@dataclass(frozen=True)
class Line:
    """What was found.

    Attributes:
        status: ``OK``, ``WARN`` or ``FAIL``.
        what: a word.
        text: what is there and, unless it is fine, the way out.
    """

    status: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:<5} {self.what:<12} {self.text}"


def run(args: argparse.Namespace) -> None:
    """``evomoe doctor``.

    Raises:
        SystemExit: with status 2 if anything is ``FAIL``.
    """
    failed = 0
    print(f"evomoe doctor, fairseq_evomoe {_own_version()}")
    for line in lines(args.user_dir, args.save_dir):
        print(_private(str(line)), flush=True)
        failed += line.status == FAIL
    print("Something is wrong: see FAIL." if failed else "A training works here.")
    if failed:
        raise SystemExit(2)


def lines(user_dir: Optional[str] = None, save_dir: str = "checkpoints") -> Iterator[Line]:
    """Everything that is looked at, in the order in which it is needed."""
    yield _python()
    yield from _packages()
    yield _copies(user_dir)
    yield _writable(save_dir)
    found: Dict[str, Dict[str, Any]] = {}
    for step in _steps(Path(user_dir).absolute() if user_dir else PACKAGE):
        found[step["step"]] = step
        yield from _told(step)
    if "training" not in found:
        yield Line(FAIL, "training", "was not tried, since what it needs is missing: see above.")


def _python() -> Line:
    version = platform.python_version()
    text = f"{version}, {platform.system()} {platform.machine()}"
    return (
        Line(OK, "python", text) if _parts(version) >= (3, 9) else Line(FAIL, "python", f"{text}: take 3.9")
    )


def _packages() -> Iterator[Line]:
    """What can be told without importing anything."""
    for name, (least, below) in {"hydra-core": HYDRA, "omegaconf": ("2.0", "3"), "numpy": ("1", "3")}.items():
        version = _version(name)
        if version is None:
            yield Line(FAIL, name, f"is missing: pip install {name}")
        elif not _parts(least) <= _parts(version) < _parts(below):
            yield Line(WARN, name, f"{version} has not been tried: pip install '{name}>={least},<{below}'")
        else:
            yield Line(OK, name, version)
    missing = {name: use for name, use in OPTIONAL.items() if _version(name) is None}
    for name, use in missing.items():
        yield Line(WARN, name, f"is missing, which {use} needs: pip install {name}")


def _copies(user_dir: Optional[str]) -> Line:
    """Whether ``--user-dir``, ``import fairseq_evomoe`` and this command mean the same folder."""
    if user_dir is not None:
        folder = Path(user_dir).resolve()
        if not (folder / "__init__.py").is_file():
            return Line(FAIL, "user-dir", f"{user_dir} is no package: give the folder {PACKAGE}")
        if folder == PACKAGE:
            return Line(OK, "user-dir", "is this copy")
        if (folder / "moe").is_dir():
            version = _own_version(folder)
            return Line(
                WARN,
                "user-dir",
                f"{folder} is another copy ({version}): give {PACKAGE}, or use its own evomoe.",
            )
        return Line(OK, "user-dir", "is a plugin, which must import fairseq_evomoe")
    outside = _importable()
    if outside is not None and outside != PACKAGE:
        return Line(
            WARN,
            "copies",
            f"`import fairseq_evomoe` gives another copy, {outside} ({_own_version(outside)}), and this "
            f"command is of {PACKAGE}: uninstall the one that you do not mean.",
        )
    installed = "installed" if outside == PACKAGE else "not installed: give --user-dir $(evomoe user-dir)"
    return Line(OK, "user-dir", f"this copy, {installed}")


def _importable() -> Optional[Path]:
    """The package that a Python of this environment imports, started elsewhere."""
    code = "import importlib.util as u; s = u.find_spec('fairseq_evomoe'); print(s.origin if s else '')"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    path = done.stdout.strip()
    return Path(path).resolve().parent if path else None


def _environment() -> Dict[str, str]:
    """That of a process in another folder, which finds the same modules as one that is started here."""
    paths = os.environ.get("PYTHONPATH")
    if not paths:
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))}


def _writable(save_dir: str) -> Line:
    """Whether checkpoints can be written."""
    folder = Path(save_dir).resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Line(FAIL, "save-dir", f"{save_dir} cannot be written to: give another --save-dir.")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        return Line(FAIL, "save-dir", f"{save_dir} cannot be written to ({error.strerror}): give another.")
    free = shutil.disk_usage(there).free / 1e9
    if free < 1:
        return Line(
            WARN, "save-dir", f"{free:.1f} GB are free, few for checkpoints: give another --save-dir."
        )
    return Line(OK, "save-dir", f"can be written to, {free:.0f} GB are free")


def _steps(user_dir: Path) -> Iterator[Dict[str, Any]]:
    """What ``doctor_steps.py`` tells, step by step; a step that it dies in has an ``error``."""
    environment = {"OMP_NUM_THREADS": "1", **_environment()}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, str(Path(__file__).with_name("doctor_steps.py")), str(user_dir), folder]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        begun = "python"
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        for line in output.splitlines():
            if line.startswith("{"):
                step = json.loads(line)
                begun = step["step"]
                if not step.get("begins"):
                    yield step
        if process.returncode != 0:
            errors.seek(0)
            yield {"step": begun, "error": _end_of(process.returncode, errors.read())}


def _end_of(status: int, errors: str) -> str:
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    end = f" ({said[-1][:300]})" if said else ""
    if status == -signal.SIGKILL:
        return f"it hangs, or the system has killed it{end}"
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}{end}"
    return f"the process ended with status {status}{end}"


def _told(step: Dict[str, Any]) -> Iterator[Line]:
    """The lines of a step."""
    name, error = step["step"], step.get("error")
    if error is not None:
        yield Line(FAIL, name, f"{' '.join(error.split())}{_way_out(name, error)}")
    else:
        yield from {
            "torch": _torch,
            "gpu": _gpu,
            "ranks": _ranks,
            "fairseq": _fairseq,
            "plugin": _plugin,
            "training": _training,
        }[name](step)


_WAYS_OUT = {
    "torch": ": pip install torch (choose the build on pytorch.org)",
    "fairseq": ": pip install ve-fairseq==0.12.3, or fairseq==0.12.2 below Python 3.11",
    "plugin": ": give this report with the whole command that you use",
    "ranks": ": trainings in one process work all the same",
    "gpu": ": look at nvidia-smi; --cpu trains without it",
    "training": ": give this report with the whole command that you use",
}


def _way_out(step: str, error: str) -> str:
    page = "see 'Which fairseq' in examples/troubleshooting.md"
    if step == "fairseq" and "None is not callable" in error:
        return f": Python 3.14 needs a line of fairseq changed: {page}"
    if step == "fairseq" and sys.version_info >= (3, 13):
        return f": no fairseq has wheels for this Python: {page}"
    if step == "fairseq" and "mutable default" in error:
        return ": fairseq 0.12.2 is for Python below 3.11: pip install ve-fairseq==0.12.3"
    if "NumPy" in error and step == "torch":
        return ": torch was built for an older numpy: pip install 'numpy<2', or a newer torch"
    return _WAYS_OUT.get(step, "")


def _torch(step: Dict[str, Any]) -> Iterator[Line]:
    version = step["version"]
    least, below = TORCH
    if _parts(least) <= _parts(version) < _parts(below):
        yield Line(OK, "torch", f"{version}, {step['threads']} threads")
    else:
        yield Line(WARN, "torch", f"{version} has not been tried: {least} up to below {below} have.")


def _gpu(step: Dict[str, Any]) -> Iterator[Line]:
    for device in step["devices"]:
        yield Line(
            OK, "gpu", f"{device['name']}, {device['gigabytes']:.0f} GB, capability {device['capability']}"
        )
    if not step["devices"]:
        built = step["built"]
        why = (
            "torch is a build for CPUs"
            if built is None
            else f"torch is built for CUDA {built}, and finds no GPU"
        )
        yield Line(WARN, "gpu", f"none ({why}): trainings are on CPUs, with --cpu.")


def _ranks(step: Dict[str, Any]) -> Iterator[Line]:
    backends = ", ".join(step["backends"]) or "none"
    if "gloo" not in step["backends"]:
        yield Line(WARN, "ranks", f"backends: {backends}; without gloo there is one process on CPUs.")
    elif "nccl" not in step["backends"] and step["gpus"] > 1:
        yield Line(
            WARN, "ranks", f"backends: {backends}; several GPUs need NCCL: take a build of torch with it."
        )
    else:
        yield Line(OK, "ranks", f"backends: {backends}; a group of gloo works")


def _fairseq(step: Dict[str, Any]) -> Iterator[Line]:
    names = [name for name in ("fairseq", "ve-fairseq", "fairseq-fixed") if _version(name) is not None]
    where = "in site-packages" if "site-packages" in step["folder"] else f"in {step['folder']}"
    text = f"{step['version']} ({' and '.join(names) or 'not installed by pip'}, {where})"
    if len(names) > 1:
        yield Line(
            WARN, "fairseq", f"{text}: two that overwrite each other: uninstall both, and install one."
        )
    elif not any(step["version"].startswith(tried) for tried in FAIRSEQ):
        yield Line(WARN, "fairseq", f"{text} has not been tried: {' and '.join(FAIRSEQ)} have.")
    else:
        yield Line(OK, "fairseq", text)


def _plugin(step: Dict[str, Any]) -> Iterator[Line]:
    yield Line(OK, "plugin", f"{len(step['models'])} models, {len(step['routers'])} routers; {step['way']}")
    mended = " ".join(step["mended"])
    yield Line(OK, "mended", f"{len(step['mended'])} faults of fairseq (compat.py): {mended or 'none'}")


def _training(step: Dict[str, Any]) -> Iterator[Line]:
    where = f"{step['updates']} updates on the {step['device']} in {step['seconds']:.1f} s"
    yield Line(OK, "training", f"{where}: spawned, saved and resumed")


def _version(distribution: str) -> Optional[str]:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _parts(version: str) -> Tuple[int, ...]:
    """The numbers of a version, without what is behind a plus: those of 2.13.0+cpu are 2, 13 and 0."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _own_version(package: Path = PACKAGE) -> str:
    found = re.search(r'__version__ = "(.+?)"', (package / "__init__.py").read_text(encoding="utf-8"))
    return found.group(1) if found else "of an unknown version"


def _private(text: str) -> str:
    """Without the name of whoever asks."""
    home = os.path.expanduser("~")
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text


__all__: List[str] = ["Line", "lines", "run"]
