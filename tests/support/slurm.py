"""A job of SLURM on this machine, with stand-ins for ``srun`` and ``scontrol``.

``srun`` starts the tasks side by side with the variables that SLURM gives them, and ends them all when one
fails, as it does with ``--kill-on-bad-exit``.
"""

import os
import random
import re
import socket
import sys
from pathlib import Path

SRUN = """
import os, subprocess, sys, time

words = sys.argv[1:]
options = []
while words[0].startswith("--"):
    options.append(words.pop(0))
job, each = os.environ, int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = []
for rank in range(int(job["SLURM_NTASKS"])):
    own = {"PROCID": rank, "LOCALID": rank % each, "NODEID": rank // each}
    own["STEP_NODELIST"] = job["SLURM_JOB_NODELIST"]
    own = {"SLURM_" + name: str(value) for name, value in own.items()}
    tasks.append(subprocess.Popen(words, env={**job, **own}))
while any(task.poll() is None for task in tasks):
    if "--kill-on-bad-exit=1" in options and any(task.poll() for task in tasks):
        for task in tasks:
            task.kill()
    time.sleep(0.05)
sys.exit(max(abs(task.returncode) for task in tasks))
"""
SCONTROL = """
import os, sys

assert sys.argv[1:] == ["show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], sys.argv
print(os.environ["SLURM_JOB_NODELIST"])
"""


def directives(script):
    """What a job's file asks of ``sbatch``: ``{"nodes": "2", "requeue": "", ...}``."""
    lines = re.findall(r"^#SBATCH (.*)$", Path(script).read_text(), re.MULTILINE)
    pairs = [re.fullmatch(r"--([a-z-]+)(?:=(\S+))?", line) for line in lines]
    assert all(pairs), lines
    return {pair[1]: pair[2] or "" for pair in pairs}


def submit(script, arguments, folder, **given):
    """A command and the environment in which SLURM would run it; ``given`` are options of ``sbatch``."""
    options = {**directives(script), **{name.replace("_", "-"): str(value) for name, value in given.items()}}
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod(0o755)
    nodes, each = int(options["nodes"]), int(options["ntasks-per-node"])
    job = {
        "JOB_ID": _job_with_a_free_port(),
        "JOB_NODELIST": "127.0.0.1",
        "NNODES": nodes,
        "NTASKS": nodes * each,
        "NTASKS_PER_NODE": each,
    }
    path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {"SLURM_" + name: str(value) for name, value in job.items()}
    return ["bash", script, *arguments], {**environment, "PATH": os.pathsep.join(path)}


def _job_with_a_free_port():
    """The number of a job whose port, which follows from it, nobody uses."""
    while True:
        number = random.SystemRandom().randrange(10000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + number)) != 0:
                return number
