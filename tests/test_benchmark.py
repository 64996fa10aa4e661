"""The cost of the layer beside a dense one, in its quick form; ratios, never seconds."""

import subprocess
import sys
from pathlib import Path

LAYER = Path(__file__).resolve().parent.parent / "examples" / "benchmark" / "layer.py"


def test_ratios_are_near_their_targets():
    command = [sys.executable, str(LAYER), "--quick", "--threads", "1", "--repeats", "7", "--limit", "1.5"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("|\n") == 5
