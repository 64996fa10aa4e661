"""Inject faults at random for some minutes, and count what is lost: nothing.

    PYTHONPATH=tests:. python tests/faults.py [--minutes 5] [--seed 1] [--kinds KIND ...]

Ranks are killed while they save and while they train, files are damaged, and settings and outputs that must
not be are given.  A fault is *survived* if everything goes on, bit for bit, as if it had not been; *refused*
if one sentence says what is wrong and nothing is lost; else it is *lost*, and the exit status is not zero.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from fairseq import checkpoint_utils

from fairseq_evomoe.checkpoints import recovery, saving
from fairseq_evomoe.checkpoints.index import DamagedCheckpoint
from fairseq_evomoe.config.errors import ConfigError
from support.cli import LM, assert_equal, call, evomoe
from support.data import preprocess, sentences, write
from support.dying_ranks import SETTINGS, save_and_die, state_at
from support.malicious import ATTACKS, infect
from support.processes import free_port
from support.rank_jobs import CPU_RANKS

SURVIVED, REFUSED, LOST = "survived", "refused", "lost"
SECONDS = 120  # a training takes less
TRAINING = {
    **LM,
    "max_update": 8,
    "moe_spawn_update": 2,
    "moe_anneal_updates": 2,
    "moe_hard_update": 3,
    "save_interval_updates": 2,
    "disable_validation": False,
}


class Faults:
    """What is injected into, made once.

    Args:
        folder: an empty one.
        draw: chooses.
    """

    def __init__(self, folder, draw):
        self.folder, self.draw = folder, draw
        self.expected, self.seconds = {}, {}
        for name, number in (("train", 64), ("valid", 12)):
            write(folder / name, sentences(number, 1))
        data = folder / "data"
        with quiet():
            preprocess(only_source=True, trainpref=folder / "train", validpref=folder / "valid", destdir=data)
            call("fairseq-train", data, **{**TRAINING, "cpu": True, "save_dir": folder / "made"})
            last = folder / "made" / "checkpoint_last.pt"
            evomoe("reshard", last, "--parts", 3, "--out", folder / "made" / "checkpoint_parts.pt")
        self.data = data

    def empty_folder(self):
        """A folder that is nobody's yet."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def kill_while_saving(self):
        """One of up to four ranks is killed at random steps of saving, a few times in a row."""
        folder = self.empty_folder() / "run"
        folder.mkdir()
        size, options = self.draw.choice([1, 2, 2, 4]), SETTINGS[self.draw.choice(list(SETTINGS))]
        save_and_die(size, folder, [1, 2], options)
        least = 2
        for update in range(3, 3 + self.draw.randint(1, 4)):
            save_and_die(size, folder, [update], options, (self.draw.randrange(size), self.draw.randrange(9)))
            there = whole_update(folder / "checkpoint_last.pt")
            assert least <= there <= update
            least = there
        save_and_die(size, folder, [9], options)
        assert whole_update(folder / "checkpoint_last.pt") == 9
        return SURVIVED

    def kill_while_training(self):
        """A training is killed in saving or at any time, and started again as it was."""
        size = self.draw.choice([1, 2])
        options = dict(TRAINING, **self.draw.choice(list(SETTINGS.values())))
        if size == 2:
            options.update(CPU_RANKS, distributed_world_size=2, moe_expert_parallel=2)
            options["moe_sharded_checkpoint"] = self.draw.random() < 0.7
        if size not in self.expected:
            whole, began = self.empty_folder() / "whole", time.monotonic()
            assert train(size, self.data, {**TRAINING, **options, "save_dir": whole}) == [0] * size
            self.expected[size] = parameters(whole / "checkpoint_last.pt")
            self.seconds[size] = time.monotonic() - began
        save_dir = self.empty_folder() / "run"
        options["save_dir"] = save_dir
        death = (self.draw.randrange(size), self.draw.randrange(1, 30))
        if self.draw.random() < 0.5:
            train(size, self.data, options, death)
        else:
            train(size, self.data, options, (death[0], None), self.draw.uniform(0, self.seconds[size]))
        assert train(size, self.data, options) == [0] * size
        assert_equal(parameters(save_dir / "checkpoint_last.pt"), self.expected[size])
        return SURVIVED

    def damage(self):
        """A file of a checkpoint is damaged, and read."""
        folder = shutil.copytree(self.folder / "made", self.empty_folder() / "made")
        name = self.draw.choice(["last", "parts", "parts-experts1", "parts-experts2"])
        first = folder / f"checkpoint_{name.split('-')[0]}.pt"
        expected = load(first)
        self._harm(folder / f"checkpoint_{name}.pt")
        fault = recovery.fault(str(first))
        if fault is None:
            assert_equal(load(first), expected)
            return SURVIVED
        assert f"checkpoint_{name}" in fault and "\n" not in fault
        with quiet(), expecting(SystemExit):
            evomoe("reshard", first, "--parts", 2, "--out", folder / "out.pt")
        assert not list(folder.glob("out*"))
        assert first.name == "checkpoint_last.pt" or expected_refusal(first)
        assert recovery.newest_whole(str(first)) is not None
        return REFUSED

    def _harm(self, path):
        content = bytearray(path.read_bytes())
        at, kind = self.draw.randrange(len(content)), self.draw.randrange(6)
        if kind == 0:
            content[at] ^= 1 << self.draw.randrange(8)
        elif kind == 1:
            content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            content[at:at] = bytes(16)
        elif kind == 4:
            content = bytearray(os.urandom(len(content)))
        path.write_bytes(content)
        if kind == 5:
            path.unlink()

    def attack(self):
        """A file would execute something."""
        folder = shutil.copytree(self.folder / "made", self.empty_folder() / "made")
        name = self.draw.choice(["last", "parts", "parts-experts1"])
        first, trace = folder / f"checkpoint_{name.split('-')[0]}.pt", folder / "trace"
        infect(folder / f"checkpoint_{name}.pt", self.draw.choice(list(ATTACKS)), trace)
        recovery.fault(str(first))
        with quiet(), expecting(SystemExit):
            evomoe("reshard", first, "--parts", 2, "--out", folder / "out.pt")
        assert not trace.exists() and not list(folder.glob("out*"))
        return REFUSED

    def wrong_setting(self):
        """Something is asked for that would begin anew, or write over something."""
        folder = shutil.copytree(self.folder / "made", self.empty_folder() / "made")
        before = {path: path.read_bytes() for path in folder.iterdir()}
        part, first = folder / "checkpoint_parts-experts1.pt", folder / "checkpoint_parts.pt"
        last = folder / "checkpoint_last.pt"
        restore = self.draw.choice([folder / "none.pt", folder, part])
        out = self.draw.choice([part, first, last, folder, folder / "checkpoint_parts"])
        force = self.draw.choice([[], ["--force"]]) if out != last else []
        command = self.draw.choice(
            [["consolidate", first], ["reshard", first, "--parts", 2], ["merge", first, "--experts", 2]]
        )
        with quiet():
            if self.draw.random() < 0.2:
                with expecting(ConfigError, DamagedCheckpoint):
                    options = {"cpu": True, "restore_file": restore, "save_dir": folder / "run"}
                    call("fairseq-train", self.data, **{**TRAINING, **options})
            else:
                with expecting(SystemExit):
                    evomoe(*command, "--out", out, *force)
        assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
        return REFUSED


KINDS = {
    "ranks killed while they save": (Faults.kill_while_saving, 4),
    "trainings killed and started again": (Faults.kill_while_training, 1),
    "files damaged": (Faults.damage, 6),
    "malicious pickles given to commands": (Faults.attack, 1),
    "wrong settings and outputs": (Faults.wrong_setting, 3),
}
"""What is injected, and how often."""


def train(size, data, options, death=None, after=None):
    """Train in processes of their own: their exit statuses.

    Args:
        death: the rank that is killed, and before which of its steps in saving.
        after: in place of that, when it is killed, in seconds.
    """
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_train, args=(rank, size, common, data, options, death))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    if after is not None:
        processes[death[0]].join(after)
        processes[death[0]].kill()
    for process in processes:
        process.join(SECONDS)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _train(rank, size, environment, data, options, death):
    steps = []

    def step(name):
        steps.append(name)
        if death == (rank, len(steps)):
            os.kill(os.getpid(), signal.SIGKILL)

    saving.step = step
    status = 1
    try:
        if size > 1:
            os.environ.update(environment, RANK=str(rank))
        with quiet():
            call("fairseq-train", data, **{**options, "cpu": True})
        status = 0
    except BaseException:
        if death is None:
            traceback.print_exc()
    finally:
        os._exit(status)


def load(path):
    """What a checkpoint holds for a model and its optimizer."""
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    return {key: state[key] for key in ("model", "last_optimizer_state")}


def parameters(path):
    """A checkpoint's model and optimizer, without a marker that fairseq never initialises."""
    state = load(path)
    state["model"] = {key: x for key, x in state["model"].items() if not key.endswith("_float_tensor")}
    return state


def whole_update(path):
    """The update of a checkpoint, whose numbers must all be that."""
    assert recovery.fault(str(path)) is None
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    update = state["optimizer_history"][-1]["num_updates"]
    assert all(torch.equal(state["model"][key], x) for key, x in state_at(update)["model"].items())
    return update


def expected_refusal(path):
    """Whether fairseq's own function refuses a checkpoint."""
    with expecting(DamagedCheckpoint, FileNotFoundError):
        load(path)
    return True


@contextlib.contextmanager
def expecting(*errors):
    """What is done within must be refused, in one sentence."""
    try:
        yield
    except errors as error:
        assert "\n" not in str(error)
    else:
        raise AssertionError("it is not refused")


@contextlib.contextmanager
def quiet():
    """Print nothing."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def inject(minutes, seed, kinds):
    """Inject faults of some kinds: counts of what became of them, by kind."""
    draw = random.Random(seed)
    counts = {kind: Counter() for kind in kinds}
    weights = [KINDS[kind][1] for kind in kinds]
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), draw)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            (kind,) = draw.choices(kinds, weights)
            try:
                outcome = KINDS[kind][0](faults)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                traceback.print_exc()
                outcome = LOST
            counts[kind][outcome] += 1
            for path in Path(folder).glob("tmp*"):
                shutil.rmtree(path)
    return counts


def table(counts):
    """Counts as a table in Markdown."""
    rows = [["fault", "injected", SURVIVED, REFUSED, LOST], ["---"] * 5]
    total = Counter()
    for kind, each in counts.items():
        rows.append([kind, sum(each.values()), *(each[outcome] for outcome in (SURVIVED, REFUSED, LOST))])
        total.update(each)
    rows.append(["all", sum(total.values()), *(total[outcome] for outcome in (SURVIVED, REFUSED, LOST))])
    return "\n".join("| {} |".format(" | ".join(map(str, row))) for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    arguments = parser.parse_args()
    counts = inject(arguments.minutes, arguments.seed, arguments.kinds)
    print(table(counts))
    lost = sum(each[LOST] for each in counts.values())
    if lost:
        sys.exit(f"{lost} lost")


if __name__ == "__main__":
    main()
