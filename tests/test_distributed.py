"""Two processes on the CPU train what one process trains with twice the batch.

Run by torchrun as a script, this file is fairseq-train without the gate's noise, which keeps what each rank
ends with.  (fairseq seeds every rank alike, for its dropout and so for the noise of the gate, and two ranks
therefore draw the same noise twice where one process draws on: equality is one of everything but noise.)
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import fairseq
import pytest
import torch
from cli import LM, TRANSLATION, Result, assert_equal, call, command, flags
from fairseq.trainer import Trainer

from fairseq_evomoe.moe.routers import dts

TWO = {"cpu": True, "distributed_world_size": 2, "distributed_backend": "gloo"}
# eps: where a gradient is 0 but for rounding, as that of a key's bias, Adam would make a step of its sign
EXACT = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "moe_balance_weight": 0.1,
    "adam_eps": 1e-3,
    "save_interval_updates": 8,
}
# an odd number of batches: one rank ends the epoch with a dummy batch
SETTINGS = {
    "legacy_ddp": {**LM, **EXACT, "batch_size": 5, "moe_freq": 1},
    "pytorch_ddp": {**TRANSLATION, **EXACT, "batch_size": 5, "required_batch_size_multiple": 1},
}


def torchrun(script, *values, check=True, **options):
    """Run a script in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        launch + [str(script)] + flags(*values, **options),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout
    return Result(done.stdout, done.returncode)


def one_rank():
    """Run fairseq-train without noise and keep this rank's parameters."""
    from fairseq_cli import train

    # as fairseq_cli.train does it, which comes too late here
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        level="INFO",
        stream=sys.stdout,
        force=True,
    )
    trainers = []
    initialise = Trainer.__init__

    def keeping(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        trainers.append(self)

    Trainer.__init__ = keeping
    dts.gumbel = lambda like, context: torch.zeros_like(like)
    train.cli_main()
    folder = sys.argv[sys.argv.index("--save-dir") + 1]
    torch.save(trainers[0].model.state_dict(), "{}/rank{}.pt".format(folder, os.environ["RANK"]))


@pytest.fixture(params=["legacy_ddp", "pytorch_ddp"])
def backend(request):
    return request.param


@pytest.fixture
def data(backend, request):
    return request.getfixturevalue("lm_data" if backend == "legacy_ddp" else "translation_data")


def load(path):
    """A model's state, without fairseq's marker of a device, which is never initialised."""
    state = torch.load(path)
    state = state.get("model", state)
    return {name: value for name, value in state.items() if not name.endswith("_float_tensor")}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5, msg=lambda m, n=name: n + ": " + m)


def test_two_processes_are_one_with_twice_the_batch(backend, data, tmp_path, monkeypatch):
    settings = SETTINGS[backend]
    result = torchrun(__file__, data, **settings, **TWO, ddp_backend=backend, save_dir=tmp_path / "two")
    assert len(result.lines("spawned experts before update 6")) == 1
    ranks = [load(tmp_path / "two" / "rank{}.pt".format(rank)) for rank in (0, 1)]
    assert_equal(*ranks)

    monkeypatch.setattr(dts, "gumbel", lambda like, context: torch.zeros_like(like))
    one = call("fairseq-train", data, **settings, cpu=True, update_freq=2, save_dir=tmp_path / "one")
    assert_close(ranks[0], load(tmp_path / "one" / "checkpoint_last.pt"))

    statistics = [[_statistics(log) for log in run.log("train_inner")] for run in (result, one)]
    assert {log["moe_phase"] for log in statistics[0]} == {0, 1, 2}
    assert len(statistics[0]) == len(statistics[1]) == settings["max_update"]
    for two_processes, one_process in zip(*statistics):
        assert two_processes == pytest.approx(one_process, abs=2e-3)

    if backend == "pytorch_ddp":  # its wrapper is built around one expert and must be built again
        torchrun(
            __file__,
            data,
            **{**settings, "restore_file": next((tmp_path / "two").glob("checkpoint_*_8.pt"))},
            **TWO,
            ddp_backend=backend,
            save_dir=tmp_path / "resumed",
        )
        assert_close(*(load(tmp_path / folder / "rank1.pt") for folder in ("two", "resumed")))


def _statistics(log):
    names = ("epoch", "num_updates", "loss", "ppl", "lr", "gnorm")
    return {name: value for name, value in log.items() if name in names or name.startswith("moe_")}


@pytest.mark.skipif(fairseq.__version__ < "0.12.3", reason="0.12.2 takes the world size from torchrun")
def test_torchrun_without_world_size_is_refused(lm_data, tmp_path):
    result = torchrun(command("fairseq-train")[-1], lm_data, check=False, **LM, cpu=True, save_dir=tmp_path)
    assert result.returncode != 0
    assert result.lines(
        "ValueError: 2 processes were launched, but --distributed-world-size is 1, so each would train a "
        "model of its own into the same folder: add --distributed-world-size 2."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "init", [{}, {"distributed_port": 29871}, {"distributed_init_method": "tcp://localhost:29871"}]
)
def test_more_processes_than_gpus_without_torchrun_are_refused(lm_data, tmp_path, init, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="torchrun") as error:
        call("fairseq-train", lm_data, **LM, **TWO, **init, save_dir=tmp_path)
    assert "--distributed-world-size 2" in str(error.value)


if __name__ == "__main__":
    one_rank()
