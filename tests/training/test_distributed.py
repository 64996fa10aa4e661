"""Ways to start several processes that are refused; what those that start must do is in test_parallel.py."""

import fairseq
import pytest
import torch

from support.cli import LM, call, command, flags
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
