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
ENDING = 180  # seconds to find out who is absent and to end, on a machine that stands still now and then
SETTINGS = {**LM, "batch_size": 4, "moe_freq": 1, "moe_spawn_update": 6, "moe_hard_update": 9}
SETTINGS.update(moe_expert_parallel=2, moe_timeout=TIMEOUT, distributed_world_size=2)


@pytest.fixture
def train(lm_data, tmp_path):
    """Function that starts two ranks, one of which fails as it is told: their processes.

    ``prefixes`` are what the command of each begins with, and ``environment`` is that of both.
    """
    processes = []

    def start(failure, rank, prefixes=((), ()), **environment):
        program = [sys.executable, "-m", failing_rank.__name__, failure, str(rank), str(tmp_path / "failed")]
        arguments = flags(lm_data, **SETTINGS, **CPU_RANKS, save_dir=tmp_path)
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common.update(environment, OMP_NUM_THREADS="1", PYTHONPATH=PATH)
        for i, prefix in enumerate(prefixes):
            env = {**os.environ, **common, "RANK": str(i)}
            with (tmp_path / f"{i}.log").open("w") as log:
                command = [*prefix, *program, *arguments]
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        return processes

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def end_of(tmp_path):
    """Function that waits for a rank to end: code, seconds since one has failed, and what was printed."""

    def end(processes, rank):
        code = processes[rank].wait(timeout=300)
        seconds = time.time() - (tmp_path / "failed").stat().st_mtime
        return code, seconds, (tmp_path / f"{rank}.log").read_text()

    return end


@pytest.mark.ranks
def test_a_rank_that_is_stopped_is_named(train, end_of):
    processes = train("stop", 1)
    code, seconds, output = end_of(processes, 0)
    assert code == 1 and seconds < TIMEOUT + ENDING
    assert f"no answer from rank 1 (process {processes[1].pid} on " in output
    assert f"(--moe-timeout {TIMEOUT})" in output


@pytest.mark.ranks
def test_the_rank_that_keeps_the_store_is_named(train, end_of):
    code, seconds, output = end_of(train("stop", 0), 1)
    assert code == 1 and seconds < TIMEOUT + ENDING
    assert "no answer from rank 0, or whoever keeps the store of all ranks, (--moe-timeout" in output


@pytest.fixture
def two_hosts():
    """Two network namespaces with a link between them: names, the first one's address, name of the link."""
    names = [f"evomoe{os.getpid()}{i}" for i in range(2)]
    link, made = "link0", []

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("-n", names[0], "link", "add", link, "type", "veth", "peer", "name", link, "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError):
        for name in made:
            ip("netns", "del", name)
        pytest.skip("this user cannot make network namespaces")
    yield names, "10.77.0.1", link
    for name in names:
        ip("netns", "del", name)


@pytest.mark.ranks
def test_a_link_that_is_cut_ends_both_sides(two_hosts, train, end_of):
    """While tokens are under way; each side names the other."""
    hosts, address, link = two_hosts
    prefixes = [["ip", "netns", "exec", host] for host in hosts]
    processes = train("unplug", 1, prefixes, MASTER_ADDR=address, GLOO_SOCKET_IFNAME=link)
    for rank, absent in enumerate(("rank 1 (process ", "rank 0, or whoever keeps the store of all ranks,")):
        code, seconds, output = end_of(processes, rank)
        assert code == 1 and seconds < TIMEOUT + ENDING
        assert f"no answer from {absent}" in output


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
