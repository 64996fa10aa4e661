#!/usr/bin/env python3
"""What the MoE layer costs beside a plain dense FFN that is given the same number of active rows.

    python examples/benchmark/layer.py [--threads 2] [--repeats 9] [--quick] [--json FILE]

Forward and backward with weight gradients in float32; the two are run in turn in one process, so that a noisy
machine hits both alike.  Prints a Markdown table; exits with 1 if a ratio is over --limit times its target.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_evomoe.moe import Experts, MoELayer, Routing, RoutingContext
from fairseq_evomoe.moe.dispatch import dispatch
from fairseq_evomoe.moe.routers import DenseToSparseRouter


@dataclass
class Size:
    """Tokens, model width and hidden width."""

    tokens: int = 4096
    dim: int = 512
    hidden: int = 2048


@dataclass
class Case:
    """One row of the table: a layer, its floor, and how many times the floor it may cost."""

    name: str
    target: float
    layer: Callable[[], None]
    floor: Callable[[], None]


def step(function: Callable, inputs: list, grad: torch.Tensor) -> Callable[[], None]:
    """A function that runs forward and backward once, with fresh gradients as an optimizer leaves them."""

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        function().backward(grad)

    return run


def dense(size: Size, rows: int, hidden: int | None = None) -> Callable[[], None]:
    """The floor: Linear, ReLU, Linear on so many rows."""
    hidden = hidden or size.hidden
    ffn = nn.Sequential(nn.Linear(size.dim, hidden), nn.ReLU(), nn.Linear(hidden, size.dim))
    x = torch.randn(rows, size.dim, requires_grad=True)
    return step(lambda: ffn(x), [x, *ffn.parameters()], torch.randn(rows, size.dim))


def sparse(size: Size, mask: torch.Tensor, widths: list[int] | None = None) -> Callable[[], None]:
    """Dispatch, experts and weighted sum for a T x E mask of active pairs."""
    token, expert = mask.nonzero(as_tuple=True)
    experts = Experts(size.dim, widths or [size.hidden] * mask.shape[1])
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(size.tokens, size.dim, requires_grad=True)
    weight = torch.rand(len(token), requires_grad=True)
    routing = Routing(token, expert, weight, *mask.shape)
    grad = torch.randn(size.tokens, size.dim)
    return step(lambda: dispatch(x, routing, experts), [x, weight, *experts.parameters()], grad)


def top(size: Size, experts: int, k: int) -> torch.Tensor:
    """Random top-k mask, even in expectation."""
    best = torch.rand(size.tokens, experts).topk(k).indices
    return torch.zeros(size.tokens, experts, dtype=torch.bool).scatter(1, best, True)


def balanced(size: Size, experts: int) -> torch.Tensor:
    """Top-1 mask with equal loads."""
    expert = (torch.arange(size.tokens) % experts)[torch.randperm(size.tokens)]
    return nn.functional.one_hot(expert, experts).bool()


def zipf(size: Size, experts: int) -> torch.Tensor:
    """Top-1 mask in which expert i has a load proportional to 1 / (i + 1)."""
    expert = torch.multinomial(1 / torch.arange(1.0, experts + 1), size.tokens, True)
    return nn.functional.one_hot(expert, experts).bool()


def soft(size: Size, experts: int, mean: float) -> torch.Tensor:
    """Mask with so many active experts for a token in the mean, and at least one."""
    best = nn.functional.one_hot(torch.randint(experts, (size.tokens,)), experts).bool()
    return best | (torch.rand(size.tokens, experts) < (mean - 1) / (experts - 1))


def arithmetic(size: Size, experts: int) -> list[int]:
    """HMoE's arithmetic widths, 9 : 11 : ... : 23, of the same total."""
    ratios = range(9, 9 + 2 * experts, 2)
    return [round(size.hidden * experts * r / sum(ratios) / 8) * 8 for r in ratios]


def layer_of(size: Size, experts: int, grown: bool) -> MoELayer:
    """A whole layer with its Dense-To-Sparse gate."""
    base = Experts(size.dim, [size.hidden])
    base.set_expert(0, nn.Linear(size.dim, size.hidden), nn.Linear(size.hidden, size.dim))

    def router() -> DenseToSparseRouter:
        gate = DenseToSparseRouter(size.dim, experts)
        gate.initialize(torch.Generator().manual_seed(0))
        return gate

    layer = MoELayer(base, experts, router, lambda name, tensor: torch.cat([tensor] * experts))
    if grown:
        layer.grow()
    return layer


def decoding(size: Size) -> tuple[Callable[[], None], Callable[[], None]]:
    """One token through a layer of 64 experts in evaluation, gate included, and through a dense FFN."""
    layer, x = layer_of(size, 64, grown=True).eval(), torch.randn(1, size.dim)
    ffn = nn.Sequential(nn.Linear(size.dim, size.hidden), nn.ReLU(), nn.Linear(size.hidden, size.dim))

    def repeat(function: Callable) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            for _ in range(50):
                function(x)

        return run

    return repeat(lambda x: layer(x, RoutingContext())), repeat(ffn)


def single(size: Size) -> Callable[[], None]:
    """The layer before the spawn."""
    layer = layer_of(size, 8, grown=False).train()
    x = torch.randn(size.tokens, size.dim, requires_grad=True)
    run = lambda: layer(x, RoutingContext())  # noqa: E731
    return step(run, [x, *layer.parameters()], torch.randn(size.tokens, size.dim))


def cases(size: Size, quick: bool):
    """The cases, each built when it is its turn."""

    def case(name: str, target: float, mask: torch.Tensor, widths: list[int] | None = None) -> Case:
        rows = int(mask.sum())
        hidden = None
        if widths:
            work = sum(w * n for w, n in zip(widths, mask.sum(0).tolist()))
            hidden = round(work / rows)
        return Case(name, target, sparse(size, mask, widths), dense(size, rows, hidden))

    yield case("top-1, E = 8, balanced", 1.12, balanced(size, 8))
    yield case("top-1, E = 16, Zipf load", 1.20, zipf(size, 16))
    yield Case("single expert before the spawn", 1.02, single(size), dense(size, size.tokens))
    if quick:
        return
    yield case("top-1, E = 64, balanced", 1.50, balanced(size, 64))
    yield case("top-2, E = 32", 1.15, top(size, 32, 2))
    for mean in (1.5, 4.0):
        yield case(f"DTS soft stage, {mean:g} of 8 active", 1.15, soft(size, 8, mean))
    yield case("DTS dense stage, 8 of 8", 1.05, soft(size, 8, 8.0))
    yield case("HMoE arithmetic widths, top-2 of 8", 1.20, top(size, 8, 2), arithmetic(size, 8))
    yield Case("one token, E = 64, evaluation", 2.0, *decoding(size))


def peak_memory(function: Callable[[], None]) -> float:
    """MiB that a call needs at its peak beyond what is in use before it; NaN where Linux is not there."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free counts as free
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        function()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return float("nan")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(case: Case, repeats: int) -> dict:
    """Medians of both, in turn, and their ratio."""
    seconds: dict[str, list[float]] = {"layer": [], "floor": []}
    functions = {"layer": case.layer, "floor": case.floor}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = [a / b for a, b in zip(seconds["layer"], seconds["floor"])]
    return {
        "case": case.name,
        "target": case.target,
        "ratio": medians["layer"] / medians["floor"],
        "ratio_of_pairs": statistics.median(pairs),
        "ratio_of_minima": min(seconds["layer"]) / min(seconds["floor"]),
        "floor_seconds": medians["floor"],
        "layer_mib": peak_memory(case.layer),
        "floor_mib": peak_memory(case.floor),
    }


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="three cases, smaller: half a minute")
    parser.add_argument(
        "--limit", type=float, default=1.0, help="factor of the target that is still accepted"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = Size(tokens=2048, hidden=1024) if args.quick else Size()
    machine = "torch {}, {} threads, {}, Python {}".format(
        torch.__version__, args.threads, platform.machine(), platform.python_version()
    )
    print(f"T = {size.tokens}, d = {size.dim}, h = {size.hidden}; medians of {args.repeats}; {machine}\n")
    print("| case | x floor | at most | by minima | floor, ms | peak MiB, layer / floor |")
    print("|---|--:|--:|--:|--:|--:|")
    rows = []
    for case in cases(size, args.quick):
        row = measure(case, args.repeats)
        rows.append(row)
        figures = "| {case} | {ratio:.2f} | {target:.2f} | {ratio_of_minima:.2f} | {floor_ms:.1f} |"
        memory = " {layer_mib:.0f} / {floor_mib:.0f} |"
        print((figures + memory).format(floor_ms=1000 * row["floor_seconds"], **row), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    return int(any(min(r["ratio"], r["ratio_of_pairs"]) > args.limit * r["target"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
