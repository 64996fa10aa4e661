"""A signal ends a training with a checkpoint, from which it goes on bit for bit: SLURM's preemption."""

import gc
import os
import signal
import sys
import threading

import pytest

from fairseq_evomoe.training.listener import Listener
from support import failing_rank
from support.cli import LM, Run, assert_equal, build, call, flags, parameters
from support.processes import free_port, run_side_by_side
from support.rank_jobs import CPU_RANKS

# from one expert to the last stage; the signal comes in an update whose checkpoint nothing else would write
SETTINGS = {**LM, "max_update": 13, "moe_freq": 1, "moe_spawn_update": 6, "moe_hard_update": 9}
SETTINGS["disable_validation"] = True


def run_until(failure, data, folder, **options):
    """A run that is told to end in an update: what it has printed."""
    program = ["-m", failing_rank.__name__, failure, "0", folder / "marker"]
    arguments = flags(data, **{**SETTINGS, **options}, save_dir=folder)
    (result,) = run_side_by_side([([sys.executable, *program, *arguments], {})], folder, 300)
    assert (folder / "marker").exists()
    return result


@pytest.fixture(scope="module")
def whole(lm_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return Run(folder, call("fairseq-train", lm_data, save_dir=folder, **SETTINGS))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_run_ends_and_goes_on_bit_equal(name, whole, lm_data, tmp_path):
    result = run_until(name, lm_data, tmp_path)
    assert result.returncode == 0, result.output
    (line,) = result.lines(f"{name}: the training ends after update {failing_rank.UPDATE + 1}")
    assert "goes on" in line and result.lines("done training")
    resumed = call("fairseq-train", lm_data, save_dir=tmp_path, **SETTINGS)
    assert resumed.log("train_inner")[0]["num_updates"] == failing_rank.UPDATE + 2
    assert_equal(parameters(tmp_path / "checkpoint_last.pt"), parameters(whole.last))


def test_nothing_is_saved_where_nothing_is_to_be(lm_data, tmp_path):
    result = run_until("SIGTERM", lm_data, tmp_path, no_save=True)
    assert result.returncode == 0 and not list(tmp_path.glob("*.pt"))
    assert result.lines("leaves no checkpoint of it")


@pytest.mark.ranks
def test_all_ranks_end_when_one_is_told_to(lm_data, tmp_path):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program = ["-m", failing_rank.__name__, "SIGTERM", "1", tmp_path / "marker"]
    settings = {**SETTINGS, **CPU_RANKS, "batch_size": 4, "moe_expert_parallel": 2, "save_dir": tmp_path}
    arguments = flags(lm_data, **settings, distributed_world_size=2)
    commands = [([sys.executable, *program, *arguments], {"RANK": str(rank), **common}) for rank in range(2)]
    results = run_side_by_side(commands, tmp_path, 300)
    assert [result.returncode for result in results] == [0, 0], results[0].output
    assert results[0].lines(
        f"a signal to another rank: the training ends after update {failing_rank.UPDATE + 1}"
    )
    assert (tmp_path / "checkpoint_last.pt").exists()


@pytest.fixture
def handlers():
    """The handlers are afterwards what they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_signal_is_obeyed_at_once(handlers):
    listener = Listener()
    listener.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert listener.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_somebody_else_s_handler_stays(handlers):
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    listener = Listener()
    listener.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert seen == [signal.SIGUSR1] and listener.received is None
    listener.let_go()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL != signal.getsignal(signal.SIGUSR1)


def test_another_thread_than_the_main_one_does_without(handlers):
    listener = Listener()
    thread = threading.Thread(target=listener.listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_no_handler_is_left_when_a_run_is_over(handlers, lm_data, tmp_path):
    """Of a run in this process, by whichever of fairseq's limits it ends."""
    trainer = build(lm_data, **LM).train(1)
    assert signal.getsignal(signal.SIGTERM) == trainer.evomoe.listener._receive
    del trainer
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    call("fairseq-train", lm_data, save_dir=tmp_path, **{**SETTINGS, "max_update": 7, "no_save": True})
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
