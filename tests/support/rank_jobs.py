"""Run fairseq-train in several processes, and in one process on the batches of all of them.

``train_on_ranks`` starts processes that work off a list of jobs.  They are forked from one that has imported
torch and fairseq and done nothing else, which saves each of them the seconds of that.  A job is the
positional values and options of ``fairseq-train``; some options are the tests' own, see ``patched``.
``train_on_all_batches`` is what they must equal.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from fairseq.trainer import Trainer
from fairseq_cli import train

from fairseq_evomoe.moe.routers import hash as hash_router
from fairseq_evomoe.moe.routers.dynmoe import DynMoERouter, Resize
from support.cli import Result, call
from support.processes import free_port, run_side_by_side, wait_for_all

CPU_RANKS = {"cpu": True, "distributed_backend": "gloo"}
TIME_LIMIT = 1800  # seconds; what hangs is to be found, and a busy machine is not to matter


def launch(ranks, *arguments, time_limit=TIME_LIMIT, **environment):
    """Start processes with torchrun; they are gone, with whatever they started, when this returns."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    with tempfile.TemporaryDirectory() as folder:
        (result,) = run_side_by_side([([*command, *arguments], environment)], Path(folder), time_limit)
    return result


def train_on_ranks(ranks, jobs, folder, time_limit=TIME_LIMIT):
    """Train each job in ``ranks`` processes: a list of ``Result`` of the first rank."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs, default=str))
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    common = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank, log in enumerate(logs):
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(context.Process(target=_be_a_rank, args=(environment, path, log)))
    wait_for_all(processes, time_limit, logs)
    return [Result((folder / f"{i}.log").read_text()) for i in range(len(jobs))]


def _be_a_rank(environment, path, log):
    """What each forked process does; it has the environment of the test, and what torchrun would add."""
    os.environ.update({name: str(value) for name, value in environment.items()})
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    _work(path)


def train_on_all_batches(ranks, data, **options):
    """Train in this process, each update on the batches of all ranks as one batch."""
    original = Trainer.train_step

    def train_step(self, samples, *args, **kwargs):
        return original(self, [one_batch(samples, self.task)], *args, **kwargs)

    options = {**options, "moe_expert_parallel": None, "moe_sharded_checkpoint": None}
    with mock.patch.object(Trainer, "train_step", train_step), patched(options):
        return call("fairseq-train", data, cpu=True, update_freq=ranks, **options)


@contextlib.contextmanager
def patched(options):
    """Carry out those options that are not fairseq's, and take them out."""
    with contextlib.ExitStack() as stack:
        if options.pop("all_to_first_expert", False):
            fill = lambda self, generator: self.table_V.zero_()  # noqa: E731
            stack.enter_context(mock.patch.object(hash_router.HashRouter, "initialize", fill))
        if options.pop("keep_one_expert", False):
            decide = lambda self: Resize([1]) if self.experts > 1 else None  # noqa: E731
            stack.enter_context(mock.patch.object(DynMoERouter, "decide", decide))
        if options.pop("flat_fp16_on_cpu", False):  # see conftest.py
            stack.enter_context(mock.patch("torch.cuda.current_device", return_value=None))
        common = options.pop("common", None)
        if common:  # what only YAML can give
            convert = train.convert_namespace_to_omegaconf

            def convert_and_update(args):
                cfg = convert(args)
                cfg.common.update(common)
                return cfg

            stack.enter_context(
                mock.patch.object(train, "convert_namespace_to_omegaconf", convert_and_update)
            )
        yield


def one_batch(samples, task):
    """Several batches of fairseq's as one: sequences are padded to the longest."""
    pad = task.source_dictionary.pad()

    def join(parts, name):
        if isinstance(parts[0], dict):
            return {key: join([part[key] for part in parts], key) for key in parts[0]}
        if not torch.is_tensor(parts[0]):
            return sum(parts) if isinstance(parts[0], int) else parts[0]
        if parts[0].dim() < 2:
            return torch.cat(parts)
        length = max(part.shape[1] for part in parts)
        left = name == "src_tokens" and getattr(task.cfg, "left_pad_source", False)
        sides = [(length - part.shape[1], 0) if left else (0, length - part.shape[1]) for part in parts]
        padded = [torch.nn.functional.pad(part, side, value=pad) for part, side in zip(parts, sides)]
        return torch.cat(padded)

    return join(samples, "")


def state_of(path):
    """A checkpoint's model, without fairseq's marker of a device, which is never initialised."""
    state = torch.load(path)["model"]
    return {name: value for name, value in state.items() if not name.endswith("_float_tensor")}


def largest_difference(a, b):
    """The largest difference of any two numbers of two models, relative to those over 1.

    They must have the same tensors.
    """
    assert a.keys() == b.keys()
    assert all(a[name].shape == b[name].shape for name in a)
    pairs = [(a[name].double(), b[name].double()) for name in a if a[name].numel()]
    return max(((x - y).abs() / y.abs().clamp(min=1)).max().item() for x, y in pairs)


def _work(path):
    """What each process does."""
    jobs = json.loads(Path(path).read_text())
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for i, (values, options) in enumerate(jobs):
        world = options.pop("ranks", size)
        assert world == size
        with patched(options):
            result = call("fairseq-train", *values, distributed_world_size=size, **CPU_RANKS, **options)
        assert torch.distributed.get_world_size() == size
        if rank == 0:
            Path(path).with_name(f"{i}.log").write_text(result.output)


if __name__ == "__main__":
    _work(sys.argv[1])
