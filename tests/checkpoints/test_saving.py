"""At every moment of saving, a whole checkpoint is on the disk: ranks are killed at each step."""

import shutil

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_evomoe.checkpoints import recovery
from support.dying_ranks import SETTINGS, save_and_die, state_at

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
    assert not save_and_die(size, begun, [1, 2], SETTINGS[options])
    for step in STEPS:
        folder = tmp_path / str(step)
        shutil.copytree(begun, folder)
        died = save_and_die(size, folder, [3], SETTINGS[options], (rank, step))
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
