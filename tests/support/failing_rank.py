"""fairseq-train in one of several ranks, one of which fails.

    failing_rank.py FAILURE RANK MARKER [argument of fairseq-train ...]

It fails once.  Right before, it writes the number of ranks to the file MARKER: that is when it failed.
"""

import functools
import os
import signal
import sys
from pathlib import Path

import torch
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq_cli import train

import fairseq_evomoe  # noqa: F401
from fairseq_evomoe.checkpoints import saving
from fairseq_evomoe.models.feed_forward import MoEFeedForward
from fairseq_evomoe.moe import MoELayer
from fairseq_evomoe.moe.sharding import rows_per_expert

LAYER, EXPERT = 1, 3
# when the experts have spawned, and every one of them has tokens
UPDATE = 11
ERROR = "this rank is out of luck"


def error(moe=None, *_):
    """An error of one rank alone; no RuntimeError, since for any other fairseq writes crash.pt."""
    raise ValueError(ERROR)


def kill(moe, *_):
    """What a machine that goes down does."""
    os.kill(os.getpid(), signal.SIGKILL)


def nan(moe, *_):
    """An expert that only this rank has is broken."""
    own = moe.experts.local
    assert EXPERT in own and len(own) < moe.num_experts
    rows = rows_per_expert("w1", moe.experts.local_widths)
    with torch.no_grad():
        moe.experts.w1.split(rows)[own.index(EXPERT)].fill_(float("nan"))


def stop(moe, *_):
    """What a debugger does, or a machine that swaps."""
    os.kill(os.getpid(), signal.SIGSTOP)


def ask(number, moe, *_):
    """What a scheduler does before it takes a machine away."""
    os.kill(os.getpid(), number)
    return MoELayer._beside(moe, *_)


def once(marker):
    """Whether the rank has not failed yet: from now on it has."""
    if marker.exists():
        return False
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    marker.write_text(str(ranks))
    return True


def fail_in_update(failure, marker):
    """Fail in a layer while tokens are under way to other ranks, which is when the most is unfinished."""
    original = MoEFeedForward.fc1

    @functools.wraps(original)
    def fc1(self, x):
        assert self.moe.sharded or not (self.moe.spawned and torch.distributed.is_initialized())
        if self.num_updates == UPDATE and self.moe.spawner.layer == LAYER and self.training and once(marker):
            # what a layer computes in the meantime
            self.moe._beside = functools.partial(failure, self.moe)
        return original(self, x)

    MoEFeedForward.fc1 = fc1


def die_in_saving(marker):
    """Be killed while the other rank's file of the third checkpoint is as whole as this one's.

    The first rank dies before its file has its name, the second one before its own has.
    """
    names = []

    def step(name):
        names.append(name)
        last = "all written" if os.environ["RANK"] == "0" else "first renamed"
        if name == last and names.count(last) == 3 and once(marker):
            kill(None)

    saving.step = step


def fail_at_start(marker):
    """Fail where the data is loaded, which is before ranks exchange anything."""
    original = LanguageModelingTask.load_dataset

    @functools.wraps(original)
    def load_dataset(self, *args, **kwargs):
        if once(marker):
            error()
        return original(self, *args, **kwargs)

    LanguageModelingTask.load_dataset = load_dataset


FAILURES = {
    "error": error,
    "kill": kill,
    "nan": nan,
    "stop": stop,
    "SIGTERM": functools.partial(ask, signal.SIGTERM),
    "SIGUSR1": functools.partial(ask, signal.SIGUSR1),
}

if __name__ == "__main__":
    failure, rank, marker = sys.argv[1:4]
    sys.argv[1:] = sys.argv[4:]
    if os.environ.get("RANK", "0") == rank:
        if failure == "start":
            fail_at_start(Path(marker))
        elif failure == "saving":
            die_in_saving(Path(marker))
        else:
            fail_in_update(FAILURES[failure], Path(marker))
    train.cli_main()
