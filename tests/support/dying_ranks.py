"""Two processes that save checkpoints together, one of which is killed at a chosen step.

They train nothing: what they save is a few numbers that tell the update.
"""

import multiprocessing
import os
import signal
import uuid
from argparse import Namespace
from unittest import mock

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_evomoe.checkpoints import saving, shards
from fairseq_evomoe.checkpoints.index import Index
from fairseq_evomoe.checkpoints.saving import Saving, delete_old, recorded
from fairseq_evomoe.moe.ranks import ALONE, Ranks
from fairseq_evomoe.moe.sharding import deal_experts
from fairseq_evomoe.training import checkpoint_hooks

FULL = -1
"""In place of a step: the rank lives, and has no space left on its disk."""

LAYER, WIDTHS = "decoder.layers.1", [2, 2, 2, 2]
SETTINGS = {
    "best and last": {},
    "keep 1": {"keep_interval_updates": 1},
    "keep 2": {"keep_interval_updates": 2},
}


def config(folder, **changes):
    """fairseq's options, as far as saving reads them."""
    options = dict.fromkeys(("keep_interval_updates", "keep_last_epochs", "keep_best_checkpoints"), -1)
    return Namespace(save_dir=str(folder), keep_interval_updates_pattern=-1, **{**options, **changes})


def state_at(update):
    """A checkpoint, all of whose numbers are the number of the update."""
    model = {
        f"{LAYER}.moe.experts.w1": torch.full((8, 3), float(update)),
        f"{LAYER}.moe.experts.b2": torch.full((4, 3), float(update)),
        "rest": torch.full((5,), float(update)),
    }
    history = [{"num_updates": update, "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}]
    return {"args": None, "model": model, "optimizer_history": history, "extra_state": {"epoch": 1}}


def save(update, folder, ranks, options):
    """What fairseq's ``save_checkpoint`` and what is around it do."""
    state, names = state_at(update), ["checkpoint_best", "checkpoint_last"]
    if "keep_interval_updates" in options:
        names.insert(0, f"checkpoint_1_{update}")
    own = Saving(ranks)
    if ranks.parallel > 1:
        widths = {LAYER: WIDTHS}
        index = Index(f"set {update}", update, widths, {LAYER: deal_experts(WIDTHS, ranks.parallel)})
        state = shards.file_of(state, index, own.number, shards.shard_of_state(state, index, own.number))
    suffix = f"-experts{own.number}" if own.number else ""
    first, *others = [str(folder / f"{name}{suffix}.pt") for name in names]
    with recorded(own):
        checkpoint_utils.torch_persistent_save(state, first)
        for other in others:
            assert PathManager.copy(first, other, overwrite=True)
    own.commit()
    if own.number == 0:
        delete_old(config(folder, **options), end_of_epoch=False, suffix="")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _work(rank, size, folder, meeting, updates, options, death):
    checkpoint_hooks.patches.apply()
    torch.set_num_threads(1)
    ranks = ALONE
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        ranks = Ranks.of_group(dist.group.WORLD, size)
    steps, write = [], torch.save

    def count(name):
        steps.append(name)
        if death is not None and (rank, len(steps)) == tuple(death) and update == updates[-1]:
            _die()

    def write_half(state, file, *args, **kwargs):
        if update == updates[-1] and death == (rank, 0):
            file.write(b"half of it")
            file.flush()
            _die()
        if update == updates[-1] and death == (rank, FULL):
            raise OSError("No space left on device")
        write(state, file, *args, **kwargs)

    with (
        mock.patch.object(saving, "step", count),
        mock.patch.object(torch, "save", write_half),
        mock.patch("time.sleep"),
    ):
        for update in updates:
            steps.clear()
            save(update, folder, ranks, options)


def _quietly(*arguments):
    try:
        _work(*arguments)
    except BaseException:
        os._exit(1)  # the other rank is dead
    os._exit(0)


def save_and_die(size, folder, updates, options, death=None):
    """Let ranks save the checkpoints of some updates.

    Args:
        size: how many ranks share the experts; 1: the checkpoint is one file.
        death: the rank that is killed, and before which of its steps in the last save, from 1 on; 0: when it
            has written half of its file.

    Returns:
        whether a rank was killed.
    """
    meeting = folder.parent / uuid.uuid4().hex
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_quietly, args=(rank, size, folder, meeting, updates, options, death))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    return [process.exitcode for process in processes]
