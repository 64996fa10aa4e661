#!/usr/bin/env python3
"""Time the MoE layer on several ranks of this machine (Gloo), each with as many tokens: weak scaling.

    python examples/benchmark/ranks.py [--ranks 1 2 4] [--repeats 7] [--out DIR]

All ranks share the experts (``--moe-expert-parallel`` is the number of ranks) and have one thread each.  A
step is forward, backward, and the all-reduce of the gradients of what every rank has.  DIR gets
``ranks.jsonl``, a line for each case as it comes, which ``cost_model.py`` reads, and the table, ``ranks.md``.
With --quick, small cases on two ranks: some ten seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterator
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1] / "systems"))

import json_lines
import torch
import torch.distributed as dist
from layer import Size, dense
from report import number, table
from timing import clean_up, machine
from torch import Tensor

from fairseq_evomoe.moe import MoELayer, RoutingContext, record
from fairseq_evomoe.moe.ranks import Ranks

EXPERTS = 8
TIME_LIMIT = 600
EXCHANGED_FLOATS = 256, 1 << 20
"""Sizes of the exchanges from which latency and bandwidth are fitted: float32 numbers for each rank."""


@dataclass(frozen=True)
class Case:
    """A stage of training.

    Attributes:
        name: of the table's row.
        router: name of the router; ``None``: one expert, before the spawn.
        active: experts of a token.
        share: part of the tokens that is used, since many experts take long.
    """

    name: str
    router: str | None
    active: int
    share: float = 1.0


CASES = [
    Case("one expert", None, 1),
    Case("top-1", "switch", 1),
    Case("top-2", "topk", 2),
    Case("all experts", "dts", EXPERTS, 0.25),
]


class Clock:
    """What a rank's collectives take: seconds by kind, and the bytes that it sends to others in exchanges.

    Attributes:
        wall: seconds inside calls and waits, by kind.
        cpu: seconds that this thread computed in them.
        sent_bytes: of all-to-all exchanges, to other ranks.
    """

    KINDS = {"all_to_all_single": "exchange", "all_reduce": "sums", "all_gather": "sums"}

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.wall: Counter = Counter()
        self.cpu = 0.0
        self.sent_bytes = 0
        self.told_bytes = 0  # what the layer says

    @contextlib.contextmanager
    def time(self, kind: str) -> Iterator[None]:
        """Count what is done meanwhile as one kind."""
        cpu, wall = time.thread_time(), time.perf_counter()
        yield
        self.wall[kind] += time.perf_counter() - wall
        self.cpu += time.thread_time() - cpu

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Time the collectives that the library calls meanwhile."""
        with contextlib.ExitStack() as stack:
            for name, kind in self.KINDS.items():
                watched = self._watched(getattr(dist, name), kind)
                stack.enter_context(mock.patch.object(dist, name, watched))
            yield

    def _watched(self, function: Callable, kind: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kind == "exchange":
                self.sent_bytes += _bytes_to_others(*args, **kwargs)
            with self.time(kind):
                work = function(*args, **kwargs)
            return None if work is None else _Work(work, self, kind)

        return call


@dataclass
class _Work:
    """An exchange that is under way."""

    work: Any
    clock: Clock
    kind: str

    def wait(self) -> None:
        """Wait as ``work`` does."""
        with self.clock.time(self.kind):
            self.work.wait()


def _bytes_to_others(
    received: Tensor, sent: Tensor, receive: list[int], send: list[int], group: Any, async_op: bool
) -> int:
    rows = sum(send) - send[dist.get_rank(group)]
    return rows * sent[:1].numel() * sent.element_size()


def build(case: Case, size: Size, ranks: Ranks) -> MoELayer:
    """The layer with random weights, the same on any number of ranks."""
    torch.manual_seed(0)
    layer = MoELayer(size.dim, size.hidden, EXPERTS, case.router or "dts").train()
    if case.router is not None:
        layer.spawn("copy")
    layer.attach_ranks(ranks)
    return layer


def step_of(layer: MoELayer, size: Size, clock: Clock) -> Callable[[], None]:
    """A function that makes one step."""
    x = torch.randn(size.tokens, size.dim, requires_grad=True)
    grad = torch.randn(size.tokens, size.dim)
    context = RoutingContext(temperature=50.0)  # all experts pass the Dense-To-Sparse gate's threshold
    experts = set(layer.experts.parameters()) if layer.sharded else set()
    replicated = [parameter for parameter in layer.parameters() if parameter not in experts]

    def run() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        with clock.watch():
            with record() as routings:
                y = layer(x, context)
            clock.told_bytes = routings[layer].sent_bytes
            losses = [] if layer.router is None else [0.01 * routings[layer].losses["balance"]]
            torch.autograd.backward([y, *losses], [grad] + [None] * len(losses))
        with clock.time("gradients"):
            add_up([parameter.grad for parameter in replicated], layer.ranks)

    return run


def add_up(grads: list[Tensor], ranks: Ranks) -> None:
    """The mean of gradients over all ranks, as fairseq's ``legacy_ddp`` makes it after the backward pass."""
    if ranks.size == 1:
        return
    flat = torch.cat([grad.reshape(-1) for grad in grads]).div_(ranks.size)
    dist.all_reduce(flat, group=ranks.group)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(part.view_as(grad))


def measure(case: Case, size: Size, ranks: Ranks, repeats: int) -> dict:
    """Seconds: the step of the slowest rank, of the rest the ranks' mean.

    Returns:
        ``median`` and ``least`` of the repeats, each figure for itself (other programs on the machine disturb
        the least ones least); ``sent_bytes``: mean over ranks.
    """
    size = replace(size, tokens=int(size.tokens * case.share))
    layer, clock = build(case, size, ranks), Clock()
    torch.manual_seed(1 + ranks.rank)
    run, steps = step_of(layer, size, clock), []
    for repeat in range(repeats + 1):  # the first is not counted
        clock.reset()
        dist.barrier()
        cpu, thread, start = time.process_time(), time.thread_time(), time.perf_counter()
        run()
        wall, thread, cpu = (
            time.perf_counter() - start,
            time.thread_time() - thread,
            time.process_time() - cpu,
        )
        assert clock.sent_bytes == clock.told_bytes, (clock.sent_bytes, clock.told_bytes)
        if repeat:
            seconds = {kind: clock.wall[kind] for kind in ("exchange", "sums", "gradients")}
            seconds["compute"] = wall - sum(seconds.values())
            steps.append({"step": wall, **seconds, "compute_cpu": thread - clock.cpu, "cpu": cpu})
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, (steps, clock.sent_bytes))
    of_ranks = [
        {key: (max if key == "step" else statistics.mean)([step[key] for step in same]) for key in same[0]}
        for same in zip(*(steps for steps, _ in found))
    ]
    return {
        "ranks": ranks.size,
        "case": asdict(case),
        "size": asdict(size),
        "experts": EXPERTS if layer.router is not None else 1,
        "sent_bytes": statistics.mean(sent for _, sent in found),
        "median": {key: statistics.median(step[key] for step in of_ranks) for key in of_ranks[0]},
        "least": {key: min(step[key] for step in of_ranks) for key in of_ranks[0]},
    }


def fit(size: Size, ranks: Ranks, repeats: int) -> dict:
    """What a rank computes and exchanges in a second while the others do the same, by the best repeats.

    Returns:
        ``flops``: FLOP in a second of CPU time, of a dense FFN, forward and backward; ``bandwidth``: B/s that
        a rank sends in an all-to-all exchange; ``latency``: seconds of an exchange without content.
    """

    def least(function: Callable[[], Any], clock: Callable[[], float]) -> float:
        times = []
        for _ in range(repeats + 1):
            dist.barrier()
            start = clock()
            function()
            times.append(clock() - start)
        mean = torch.tensor(min(times[1:]), dtype=torch.float64)
        dist.all_reduce(mean, group=ranks.group)
        return mean.item() / ranks.size

    seconds = least(dense(size, size.tokens), time.thread_time)
    result = {"flops": 12 * size.tokens * size.dim * size.hidden / seconds}
    if ranks.size > 1:
        times = []
        for count in EXCHANGED_FLOATS:
            sent = torch.ones(ranks.size, count)
            received = torch.empty_like(sent)
            exchange = functools.partial(dist.all_to_all_single, received, sent)
            times.append(least(exchange, time.perf_counter))
        few, many = (4 * count * (ranks.size - 1) for count in EXCHANGED_FLOATS)
        result["bandwidth"] = (many - few) / (times[1] - times[0])
        result["latency"] = max(times[0] - few / result["bandwidth"], 0.0)
    return {"ranks": ranks.size, "fit": result}


def work(rank: int, world: int, folder: str, path: str, size: Size, repeats: int) -> None:
    """What each rank does: append a line to a file for each measurement; ``folder`` is where they meet."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIME_LIMIT),
    )
    assert dist.get_world_size() == world
    ranks = Ranks.of_group(dist.group.WORLD, world)
    measurements = [lambda: fit(size, ranks, repeats)]
    measurements += [lambda case=case: measure(case, size, ranks, repeats) for case in CASES]
    for measurement in measurements:
        row = measurement()
        clean_up()
        if rank == 0:
            json_lines.append(Path(path), row)
            print(row, flush=True)
    dist.destroy_process_group()


def start(world: int, *arguments: Any) -> None:
    """Run ``work`` in so many processes; they are gone when this returns.

    Raises:
        TimeoutError: they took longer than the time limit.
    """
    deadline = time.monotonic() + TIME_LIMIT
    context = torch.multiprocessing.spawn(work, (world, *arguments), world, join=False, daemon=True)
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world} ranks took more than {TIME_LIMIT} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def markdown(rows: list[dict]) -> str:
    """The tables; medians and least values, in milliseconds."""
    keys = ["step", "compute", "exchange", "sums", "gradients", "compute_cpu", "cpu"]
    lines = [
        [
            "{}, {}".format(row["ranks"], row["case"]["name"]),
            str(row["size"]["tokens"]),
            *(
                "{:.0f} / {:.0f}".format(*(1000 * row[kind][key] for kind in ("median", "least")))
                for key in keys
            ),
            number(row["sent_bytes"] / 1e6),
        ]
        for row in rows
        if "case" in row
    ]
    scales = {"flops": 1e-9, "bandwidth": 1e-9, "latency": 1e3}
    fits = [
        [
            str(row["ranks"]),
            *(number(scale * row["fit"][k] if k in row["fit"] else None) for k, scale in scales.items()),
        ]
        for row in rows
        if "fit" in row
    ]
    head = ["ranks, stage", "tokens", "step", "compute", "exchange", "sums", "gradients"]
    head += ["CPU, compute", "CPU, all", "MB sent"]
    units = ["ranks", "GFLOP/s of a rank", "GB/s that a rank sends", "latency, ms"]
    return f"{table(head, lines)}\n\n{table(units, fits)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--tokens", type=int, default=2048, help="of a rank")
    parser.add_argument("--dim", type=int, default=512, help="width of a token")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden units of an expert")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each case")
    parser.add_argument("--quick", action="store_true", help="two ranks, small sizes")
    parser.add_argument("--out", type=Path, help="folder for ranks.jsonl and ranks.md")
    args = parser.parse_args()
    size, worlds, repeats = Size(args.tokens, args.dim, args.hidden), args.ranks, args.repeats
    if args.quick:
        size, worlds, repeats = Size(256, 64, 128), [2], 3

    os.environ["OMP_NUM_THREADS"] = "1"  # of the ranks
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.jsonl"
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out.resolve() / "ranks.jsonl"
        path.write_text(json.dumps({"command": " ".join(sys.argv), "machine": machine(1)}) + "\n")
        for world in worlds:
            start(world, folder, str(path), size, repeats)
        text = markdown(json_lines.read(path))
    if args.out:
        (args.out / "ranks.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
