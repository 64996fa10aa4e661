"""A rank that fails takes the others down with it, its error is shown, and the run can go on from there."""

import signal
import sys
import time

import pytest

from support import failing_rank
from support.cli import LM, assert_equal, evomoe, flags, parameters
from support.processes import free_port, run_side_by_side
from support.rank_jobs import CPU_RANKS, train_on_ranks

pytestmark = pytest.mark.ranks

RANKS = 2
# from the failure until the last process is gone
SECONDS = 180  # what hangs takes ten minutes; a machine may stand still for one
# an epoch has 8 updates, so that the last checkpoint before the failure is one of the middle of an epoch
SETTINGS = {
    **LM,
    "batch_size": 4,
    "moe_freq": 1,
    "moe_spawn_update": 6,
    "moe_hard_update": 9,
    "moe_expert_parallel": RANKS,
    "save_interval_updates": 10,
}


def torchrun(program, *options):
    """With a launcher, which sees which of its processes have ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", RANKS]
    return [([*launcher, *options, *program], {})]


def torchrun_with_restart(program):
    return torchrun(program, "--max-restarts", 1)


def no_launcher(program):
    """Processes that nobody watches, as SLURM's srun starts them."""
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [([sys.executable, *program], {"RANK": str(rank), **common}) for rank in range(RANKS)]


@pytest.fixture
def train(lm_data, tmp_path):
    """Function that trains until a rank fails: a list of ``Result``, one for each command."""

    def run(failure, rank, launch, save_dir=tmp_path, **options):
        marker = tmp_path / "failed"
        options = {**SETTINGS, **CPU_RANKS, "distributed_world_size": RANKS, "save_dir": save_dir, **options}
        arguments = flags(lm_data, **options)
        commands = launch(["-m", failing_rank.__name__, failure, rank, marker, *arguments])
        results = run_side_by_side(commands, tmp_path, 10 * SECONDS)  # a busy machine starts slowly
        ended = time.time()
        assert marker.read_text() == str(RANKS)
        assert ended - marker.stat().st_mtime < SECONDS
        return results

    return run


@pytest.mark.parametrize("launch, rank", [(torchrun, 1), (no_launcher, 0)])
def test_an_error(launch, rank, train, tmp_path):
    results = train("error", rank, launch)
    assert all(result.returncode == 1 for result in results)
    # the only command, or that of the rank
    assert results[min(rank, len(results) - 1)].lines("ValueError: " + failing_rank.ERROR)
    # the first rank would write it, and the experts of the other one would be missing
    assert not (tmp_path / "crash.pt").exists()


def test_an_error_before_training(train):
    results = train("start", 1, no_launcher)
    assert [result.returncode for result in results] == [1, 1]
    assert results[1].lines("ValueError: " + failing_rank.ERROR)


def test_a_rank_that_dies(train):
    (result,) = train("kill", 1, torchrun)
    assert result.returncode == 1
    assert result.lines("(SIGKILL)")


def test_a_rank_that_dies_without_a_launcher(train):
    results = train("kill", 1, no_launcher)
    # nobody but the collective can notice
    assert [result.returncode for result in results] == [1, -signal.SIGKILL]
    assert results[0].lines("RuntimeError")


@pytest.fixture(scope="module")
def uninterrupted(lm_data, tmp_path_factory):
    """The last checkpoint of a run in which no rank fails."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_on_ranks(RANKS, [[[lm_data], {**SETTINGS, "save_dir": folder}]], folder / "jobs")
    return folder / "checkpoint_last.pt"


def test_a_run_heals_itself(train, uninterrupted, tmp_path):
    (result,) = train("kill", 1, torchrun_with_restart, save_dir=tmp_path / "healed")
    assert result.returncode == 0, result.output
    assert result.lines("healed/checkpoint_last.pt (epoch 2 @ 10 updates)")
    assert len(result.lines("done training")) == 1
    assert_equal(parameters(tmp_path / "healed" / "checkpoint_last.pt"), parameters(uninterrupted))


@pytest.mark.parametrize("rank, update", [(0, 10), (1, 14)])
def test_a_run_whose_rank_dies_in_saving_heals_itself(rank, update, train, uninterrupted, tmp_path):
    """Where it dies, half of the files have their names, or none."""
    few = {"moe_sharded_checkpoint": True, "keep_interval_updates": 1}
    (result,) = train("saving", rank, torchrun_with_restart, save_dir=tmp_path / "healed", **few)
    assert result.returncode == 0, result.output
    assert result.lines(f"healed/checkpoint_last.pt (epoch 2 @ {update} updates)")
    assert len(result.lines("nothing is left to do")) == (update == 14)
    last = tmp_path / "healed" / "checkpoint_last.pt"
    evomoe("consolidate", last, "--out", tmp_path / "whole.pt")
    assert_equal(parameters(tmp_path / "whole.pt"), parameters(uninterrupted))


def test_an_expert_that_is_not_a_number(train, tmp_path):
    for result in train("nan", 1, no_launcher):
        assert result.returncode == 1
        assert result.lines(
            f"NaN or Inf in expert {failing_rank.EXPERT} of decoder.layers.{failing_rank.LAYER} (rank 1)"
        )
    assert not (tmp_path / "crash.pt").exists()
