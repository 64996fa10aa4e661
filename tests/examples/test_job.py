"""``examples/ranks/job.sbatch`` with stand-ins for SLURM's commands."""

import subprocess
from pathlib import Path

import pytest

from support.cli import EVOLUTION, USER_DIR, flags
from support.processes import run_side_by_side
from support.rank_jobs import CPU_RANKS
from support.slurm import directives, submit

JOB = Path(__file__).resolve().parents[2] / "examples" / "ranks" / "job.sbatch"
# of sbatch's manual
KNOWN = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time requeue signal open-mode".split()


def test_the_directives_are_some_and_come_before_the_commands():
    text = JOB.read_text()
    assert set(directives(JOB)) <= set(KNOWN)
    commands = text.index("\nset -euo pipefail")
    assert commands > text.rindex("#SBATCH")  # sbatch reads no further than the first command
    assert subprocess.run(["bash", "-n", str(JOB)]).returncode == 0


@pytest.mark.ranks
def test_the_tasks_of_the_job_share_the_experts(lm_data, tmp_path):
    small = {"arch": "evomoe_lm_tiny", "tokens_per_sample": 16, "num_workers": 0, "log_interval": 1}
    more = flags(**{**small, **EVOLUTION, **CPU_RANKS}, max_update=8, disable_validation=True)
    command, environment = submit(
        JOB, [lm_data, tmp_path / "run", *more], tmp_path / "bin", nodes=1, ntasks_per_node=2
    )
    environment["EVOMOE_USER_DIR"] = str(USER_DIR)
    (result,) = run_side_by_side([(command, environment)], tmp_path, time_limit=600)
    assert result.returncode == 0, result.output
    log = result.log("train_inner")
    assert len(log) == 8 and log[-1]["moe_a2a_mb"] > 0  # of one rank alone: the other prints nothing
    assert len(result.lines("spawned experts")) == 1
    assert (tmp_path / "run" / "checkpoint_last.pt").exists()
