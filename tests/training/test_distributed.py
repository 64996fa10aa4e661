"""Ways to start several processes that are refused; what those that start must do is in test_parallel.py."""

import os

import fairseq
import pytest
import torch

from support.cli import LM, call, command, flags
from support.processes import free_port, run_side_by_side
from support.rank_jobs import CPU_RANKS, launch


@pytest.mark.ranks
@pytest.mark.skipif(fairseq.__version__ < "0.12.3", reason="0.12.2 takes the world size from torchrun")
def test_torchrun_without_world_size_is_refused(lm_data, tmp_path):
    arguments = flags(lm_data, **LM, cpu=True, save_dir=tmp_path)
    result = launch(2, command("fairseq-train")[-1], *arguments)
    assert result.returncode != 0
    assert result.lines(
        "ConfigError: 2 processes were launched, but --distributed-world-size is 1, so each would train a "
        "model of its own into the same folder: add --distributed-world-size 2."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "init", [{}, {"distributed_port": 29871}, {"distributed_init_method": "tcp://localhost:29871"}]
)
def test_more_processes_than_gpus_without_torchrun_are_refused(lm_data, tmp_path, init, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="torchrun") as error:
        call("fairseq-train", lm_data, **LM, **CPU_RANKS, distributed_world_size=2, **init, save_dir=tmp_path)
    assert "--distributed-world-size 2" in str(error.value)


@pytest.mark.ranks
def test_the_ranks_of_a_slurm_job_find_each_other(lm_data, tmp_path):
    """With a stand-in for scontrol, of which fairseq asks where the first rank is."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho 127.0.0.1\n")
    scontrol.chmod(0o755)
    settings = {**LM, "max_update": 8, "moe_expert_parallel": 2, "ddp_backend": "legacy_ddp"}
    arguments = flags(
        lm_data,
        **{**settings, **CPU_RANKS},
        distributed_world_size=2,
        distributed_port=free_port(),
        save_dir=tmp_path / "run",
    )
    job = {
        "PATH": "{}:{}".format(scontrol.parent, os.environ["PATH"]),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    results = run_side_by_side(
        [(command("fairseq-train") + arguments, task) for task in tasks], tmp_path, time_limit=600
    )
    assert [result.returncode for result in results] == [0, 0], results[0].output
    log = results[0].log("train_inner")
    assert len(log) == 8 and log[-1]["moe_a2a_mb"] > 0
    assert not results[1].log("train_inner")
