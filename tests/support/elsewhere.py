"""An environment with transformers, and with neither fairseq nor this package."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution


def make(folder, transformers="transformers"):
    """Install a transformers beside torch; returns what PYTHONPATH must be for ``run``."""
    libraries, own = folder / "libraries", folder / "transformers"
    libraries.mkdir()
    link("torch", libraries, set())
    packages = [transformers, "safetensors", "sentencepiece"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(own), *packages]
    done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return os.pathsep.join(map(str, (own, libraries)))


def link(name, folder, seen):
    """Links to what an installed package consists of, and to what it needs."""
    seen.add(name)
    try:
        package = distribution(name)
    except PackageNotFoundError:  # of another platform
        return
    for top in {file.parts[0] for file in package.files} - {".."}:
        (folder / top).exists() or (folder / top).symlink_to(package.locate_file(top))
    for requirement in package.requires or []:
        needed = re.match(r"[\w.-]+", requirement)[0]
        if needed not in seen and "extra ==" not in requirement:
            link(needed, folder, seen)


def run(path, script, *arguments, cwd):
    """What a script prints there: without ``site``, so that nothing else is found."""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "hf_home")}
    done = subprocess.run(
        [sys.executable, "-S", str(script), *map(str, arguments)],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
