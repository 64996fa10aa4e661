"""Ranks wait for one another as long as --moe-timeout says, and name the one that does not come."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

from fairseq_evomoe.training import waiting
from support import failing_rank
from support.cli import LM, flags
from support.processes import PATH, free_port
from support.rank_jobs import CPU_RANKS

TIMEOUT = 3
SETTINGS = {**LM, "batch_size": 4, "moe_freq": 1, "moe_spawn_update": 6, "moe_hard_update": 9}
SETTINGS.update(moe_expert_parallel=2, moe_timeout=TIMEOUT, distributed_world_size=2)


@pytest.fixture
def stopped(lm_data, tmp_path):
    """Function that trains two ranks, one of which is stopped, until the other has ended."""
    processes = []

    def train(rank):
        marker = tmp_path / "failed"
        program = [sys.executable, "-m", failing_rank.__name__, "stop", str(rank), str(marker)]
        arguments = flags(lm_data, **SETTINGS, **CPU_RANKS, save_dir=tmp_path)
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for i in range(2):
            env = {**os.environ, **common, "RANK": str(i), "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
            with (tmp_path / f"{i}.log").open("w") as log:
                command = program + arguments
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        code = processes[1 - rank].wait(timeout=300)
        seconds = time.time() - marker.stat().st_mtime
        return code, seconds, (tmp_path / f"{1 - rank}.log").read_text(), processes[rank].pid

    yield train
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.ranks
def test_a_rank_that_is_stopped_is_named(stopped):
    code, seconds, output, process = stopped(1)
    assert code == 1 and seconds < TIMEOUT + 60
    assert f"no answer from rank 1 (process {process} on " in output
    assert f"(--moe-timeout {TIMEOUT})" in output


@pytest.mark.ranks
def test_the_rank_that_keeps_the_store_is_named(stopped):
    code, seconds, output, _ = stopped(0)
    assert code == 1 and seconds < TIMEOUT + 60
    assert "no answer from rank 0, or whoever keeps the store of all ranks, (--moe-timeout" in output


class Store:
    """One that all ranks of this process have, of which some are silent."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def wait(self, keys, timeout):
        if not all(key in self.values for key in keys):
            raise RuntimeError("wait timeout")


def test_of_many_ranks_the_silent_ones_are_named(monkeypatch):
    """Whoever waits in vain, and is not stopped himself, is not to blame."""
    monkeypatch.setattr(waiting, "BEAT", 0.01)
    monkeypatch.setattr(waiting, "SILENCE", 0.5)
    store = Store()
    beat = waiting.Pulse._beat
    with mock.patch.object(waiting.Pulse, "_beat", lambda self: beat(self) if self.rank < 3 else None):
        pulses = [waiting.Pulse(store, rank, 5) for rank in range(4)]
    assert [name[:8] for name in pulses[0].silent()] == ["rank 3 (", "rank 4"]  # and 4 has never come
    pulses[0].end()
    assert not pulses[0]._thread.is_alive() and pulses[1]._thread.is_alive()
    pulses[1].end(), pulses[2].end()
    store.values.clear()
    assert pulses[0].silent() == ["rank 0, or whoever keeps the store of all ranks,"]


@pytest.mark.parametrize("text", ["out of luck", "CUDA out of memory"])
def test_an_error_of_a_rank_s_own_stays_as_it_is(text):
    pulse = mock.Mock()
    with pytest.raises(RuntimeError) as error:
        with waiting.naming_the_absent(pulse, 5):
            raise RuntimeError(text)
    assert type(error.value) is RuntimeError and not pulse.silent.called


def test_an_error_that_nobody_is_absent_for_stays_as_it_is():
    pulse = mock.Mock(silent=lambda: [])
    with pytest.raises(RuntimeError, match="^Timed out$"):
        with waiting.naming_the_absent(pulse, 5):
            raise RuntimeError("Timed out")


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_groups_of_fairseq_have_the_limit(process_group, monkeypatch):
    made = []
    monkeypatch.setattr(dist, "new_group", lambda *args, timeout=None: made.append(timeout))
    monkeypatch.setattr(waiting.distributed_utils, "get_global_group", lambda: None)
    waiting.meet(7).end()
    assert made == [timedelta(seconds=7)]
    assert dist.distributed_c10d._get_default_store().timeout == timedelta(seconds=7)
