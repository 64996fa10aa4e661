"""fairseq's commands in processes that know no plugin."""

import os
import subprocess
import sys

# fairseq's own command, with the names that numpy has removed since, which the plugin mends where it is used
STOCK = """
import sys
import numpy as np
np.int = int
if not hasattr(np, "compat"):
    np.compat = type("compat", (), {"long": int})
import argparse
import torch
if hasattr(torch.serialization, "add_safe_globals"):  # the options of a model such as roberta
    torch.serialization.add_safe_globals([argparse.Namespace])
from importlib import import_module
import_module("fairseq_cli." + sys.argv.pop(1)).cli_main()
assert "fairseq_evomoe" not in sys.modules
"""
EVALUATION = ["--batch-size", "8", "--num-workers", "0"]


def stock(script, *arguments, cwd):
    """What a command of fairseq's prints in a process that knows no plugin."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, script, *map(str, arguments), *EVALUATION],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
