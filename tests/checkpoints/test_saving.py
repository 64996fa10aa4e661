"""At every moment of saving, a whole checkpoint is on the disk: ranks are killed at each step."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_evomoe.checkpoints import recovery
from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.moe.ranks import Ranks
from fairseq_evomoe.training import checkpoint_hooks
from fairseq_evomoe.training.checks import check_before_trainer
from support.cli import LM, build
from support.dying_ranks import FULL, SETTINGS, save, save_and_die, state_at
from support.refusals import refused

STEPS = range(12)  # more than there are


def updates_there(folder):
    """The update of each checkpoint in a folder, all of which must be whole, by name."""
    result = {}
    for path in sorted(folder.glob("checkpoint*.pt")):
        if "experts" in path.name:
            continue
        assert recovery.fault(str(path)) is None
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        update = state["optimizer_history"][-1]["num_updates"]
        for key, tensor in state_at(update)["model"].items():
            assert torch.equal(state["model"][key], tensor)
        result[path.name] = update
    return result


@pytest.mark.parametrize(
    "size, rank, options",
    [
        (1, 0, "keep 1"),
        (2, 0, "best and last"),
        (2, 1, "best and last"),
        (2, 0, "keep 1"),
        (2, 1, "keep 2"),
    ],
)
def test_whenever_a_rank_dies_a_whole_checkpoint_is_there(size, rank, options, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    assert save_and_die(size, begun, [1, 2], SETTINGS[options]) == [0] * size
    for step in STEPS:
        folder = tmp_path / str(step)
        shutil.copytree(begun, folder)
        died = -signal.SIGKILL in save_and_die(size, folder, [3], SETTINGS[options], (rank, step))
        there = updates_there(folder)
        assert there["checkpoint_last.pt"] in (2, 3) and there["checkpoint_best.pt"] in (2, 3)
        # the ranks start anew, and what was left half done is in nobody's way
        save_and_die(size, folder, [4], SETTINGS[options])
        there = updates_there(folder)
        assert there["checkpoint_last.pt"] == there["checkpoint_best.pt"] == 4
        kept = SETTINGS[options].get("keep_interval_updates", 0)
        assert len([name for name in there if name.startswith("checkpoint_1_")]) == kept
        left = {path.name for path in folder.iterdir() if path.name.endswith(".tmp")}
        assert left <= {"checkpoint_1_3.pt.tmp", "checkpoint_1_3-experts1.pt.tmp"}, left
        if not died:
            break
    else:
        raise AssertionError("there are more steps")
    assert step > 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_stops_all_and_the_old_checkpoint_stays(rank, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert save_and_die(2, folder, [1], SETTINGS["keep 1"]) == [0, 0]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert save_and_die(2, folder, [2], SETTINGS["keep 1"], (rank, FULL)) == [1, 1]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def events(monkeypatch):
    """What one of two ranks does to the disk, in order; the other one is always there when it is met."""
    done = []

    def record(owner, name, describe):
        original = getattr(owner, name)

        def recording(*args, **kwargs):
            result = original(*args, **kwargs)
            done.append(describe(*args))
            return result

        monkeypatch.setattr(owner, name, recording)

    path = lambda file: Path(os.readlink(f"/proc/self/fd/{file}")).name  # noqa: E731
    record(torch, "save", lambda state, file: f"write {Path(file.name).name}")
    record(shutil, "copyfile", lambda source, target: f"write {Path(target).name}")
    record(os, "fsync", lambda file: f"flush {path(file)}")
    record(os, "replace", lambda source, target: f"rename {Path(source).name}")
    record(os, "remove", lambda target: f"delete {Path(target).name}")

    def meet(told, own, group):
        told[:] = [(None, [name.replace("-experts1", "") for name in own[1]])] * 2
        done.append("meet")

    monkeypatch.setattr("torch.distributed.all_gather_object", meet)
    return done


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_renamed_is_on_the_disk(rank, events, tmp_path):
    """A power cut loses what is not flushed, and keeps renames in any order until their folder is flushed."""
    checkpoint_hooks.patches.apply()
    (tmp_path / "run").mkdir()
    for update in (1, 2):
        events.clear()
        save(update, tmp_path / "run", Ranks(size=2, rank=rank, parallel=2), SETTINGS["keep 1"])
    end = "-experts1.pt.tmp" if rank else ".pt.tmp"
    names = [name + end for name in ("checkpoint_1_2", "checkpoint_best", "checkpoint_last")]
    written = [f"{what} {name}" for name in names for what in ("write", "flush")]
    renamed = [f"rename {name}" for name in names] + ["flush run"]
    assert events[0] == written[0] and events[1] == written[1]
    meetings = [i for i, event in enumerate(events) if event == "meet"]
    assert events[: meetings[1]] == written[:2] + ["meet"] + written[2:] + ["flush run"]
    between = [events[meetings[i] + 1 : meetings[i + 1]] for i in (1, 2)]
    assert between == ([[], renamed] if rank else [renamed, []])
    deleted = events[meetings[3] + 1 :]
    assert len(meetings) == 4 and deleted == ([] if rank else ["delete checkpoint_1_1.pt"])


def test_what_still_has_its_temporary_name_is_not_written_over(tmp_path):
    """A rank dies before it gives its files their names, and again while it writes the next ones."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_and_die(2, folder, [1, 2], SETTINGS["best and last"], (1, 4))
    temporary = folder / "checkpoint_best-experts1.pt.tmp"
    assert temporary.exists() and updates_there(folder)["checkpoint_best.pt"] == 2
    save_and_die(2, folder, [3], SETTINGS["best and last"], (1, 0))
    assert temporary.read_bytes() == b"half of it"
    assert set(updates_there(folder).values()) == {2}


def test_what_writes_in_the_background_is_refused_in_several_files(lm_data):
    """Ranks could not wait for each other's files."""
    ranks = {"moe_expert_parallel": 2, "distributed_world_size": 2, "moe_sharded_checkpoint": True}
    cfg = build(lm_data, **LM, **ranks, write_checkpoints_asynchronously=True).cfg
    with pytest.raises(ConfigError) as error:
        check_before_trainer(cfg)
    refused(error, "--moe-sharded-checkpoint", "--write-checkpoints-asynchronously", "leave one of them out")


def test_files_of_a_set_with_more_of_them_do_not_stay(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save_and_die(3, folder, [1, 2], SETTINGS["best and last"], (2, 5))  # one file has its name, one has not
    assert len(list(folder.glob("*experts2*"))) == 3
    for size in (2, 1):
        assert save_and_die(size, folder, [3], SETTINGS["best and last"]) == [0] * size
        assert set(updates_there(folder).values()) == {3}
        assert len(list(folder.iterdir())) == 2 * size
