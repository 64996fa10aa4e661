#!/usr/bin/env python3
"""Measure what the layer, the routers and other implementations cost on a GPU, and where the time goes.

    python examples/benchmark/gpu.py [PART ...] --out FOLDER

Each figure is a JSON line of FOLDER/gpu.jsonl as soon as it is there; the same command goes on where it was
cut, and makes FOLDER/gpu.md of what there is.  `step` trains, and needs --data.  With --quick everything is
small, also on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import statistics
import sys
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "systems"), str(HERE.parents[1])]

import layer as layers  # noqa: E402
import peers  # noqa: E402
import routers  # noqa: E402
import torch  # noqa: E402
from gpu_profile import profile  # noqa: E402
from gpu_report import report  # noqa: E402
from layer import Size  # noqa: E402
from systems import DENSE, System  # noqa: E402
from timing import clean_up, interleave, machine, peak_memory, ratios  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from fairseq_evomoe.moe import RoutingContext  # noqa: E402
from fairseq_evomoe.moe.dispatch import local as ways  # noqa: E402
from fairseq_evomoe.moe.dispatch.kernels import launch  # noqa: E402
from fairseq_evomoe.moe.routers import ROUTERS  # noqa: E402

Step = Callable[[], None]
PARTS = ["layer", "routers", "step", "profile", "sizes", "peers", "compiled"]
"""In the order in which they are worth most, should time be up."""
TOP_1 = "top-1, E = 8, balanced"

# name -> at most so many times the floor, and which pairs are active
MASKS: dict[str, tuple[float, Callable[[Size], torch.Tensor]]] = {
    TOP_1: (1.20, lambda size: layers.balanced(size, 8)),
    "top-1, E = 64, balanced": (1.35, lambda size: layers.balanced(size, 64)),
    "top-1, E = 64, random": (1.50, lambda size: layers.top(size, 64, 1)),
    "top-2, E = 32": (1.25, lambda size: layers.top(size, 32, 2)),
    "soft stage, 4 of 8": (1.15, lambda size: layers.soft(size, 8, 4.0)),
    "dense stage, 8 of 8": (1.15, lambda size: layers.soft(size, 8, 8.0)),
}
PROFILED = [TOP_1, "top-1, E = 64, balanced", "top-2, E = 32", "dense stage, 8 of 8"]
COMPILED = ["switch", "dts", "topk"]
OTHERS = {"float32": [TOP_1, "top-2, E = 32"], "autocast": [TOP_1, "top-2, E = 32"]}
STEP = (
    "--decoder-layers 8 --decoder-embed-dim 1024 --decoder-input-dim 1024 --decoder-output-dim 1024 "
    "--decoder-ffn-embed-dim 4096 --decoder-attention-heads 16 --dropout 0.1 "
    "--tokens-per-sample 512 --batch-size 32 --lr 0.0005"
)
PEERS = [
    ["fairseq_evomoe, ReLU", "loop over masks", "transformers, Switch"],
    [
        "fairseq_evomoe, SwiGLU",
        "transformers, Mixtral eager",
        "transformers, Mixtral batched_mm",
        "transformers, Mixtral grouped_mm",
    ],
]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("parts", nargs="*", metavar="part", help="of " + ", ".join(PARTS))
    add("--out", type=Path, required=True, help="folder for gpu.jsonl and gpu.md")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", type=Path, help="folder that fairseq reads, for step")
    add("--repeats", type=int, default=20, help="timed runs of each function (20)")
    add("--seconds", type=float, default=300, help="begin nothing new after so long (300)")
    add("--quick", action="store_true", help="everything small, to see that it works")
    return result


class Results:
    """What is known already, by key, and a file to which each new figure is added at once."""

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known = {line["key"]: line for line in map(json.loads, lines)}
        self.end = time.monotonic() + seconds

    def measure(self, key: str, part: str, function: Callable[[], dict[str, Any]]) -> None:
        """Add what the function returns, unless it is known or time is up; errors are results, too."""
        if key in self.known or time.monotonic() > self.end:
            return
        start = time.monotonic()
        try:
            found = function()
        except Exception as error:  # a case that cannot run must not take the others with it
            found = {"error": "{}: {}".format(type(error).__name__, str(error)[:300])}
        seconds = round(time.monotonic() - start, 2)
        line = {"key": key, "part": part, "seconds": seconds, **found}
        self.known[key] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        brief = found.get("brief") or found.get("error") or ""
        print("{} ({:.1f} s): {}".format(key, line["seconds"], brief), flush=True)
        clean_up()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Dispatch that does not take some of its ways."""
    before, ways.without = ways.without, set(names)
    try:
        yield
    finally:
        ways.without = before


def as_before(step: Step) -> Step:
    """A step without the kernels: what a GPU without Triton does."""

    def run() -> None:
        with without("kernels"):
            step()

    return run


@contextmanager
def taking(look_up: bool) -> Iterator[None]:
    """Dispatch by the candidates that are off until they are measured."""
    before = ways.candidates, launch.look_up
    ways.candidates, launch.look_up = {"one_function"}, look_up
    try:
        yield
    finally:
        ways.candidates, launch.look_up = before


def with_candidates(step: Step) -> dict[str, Step]:
    """A step by each of them."""

    def by(look_up: bool) -> Step:
        def run() -> None:
            with taking(look_up):
                step()

        return run

    return {"one function": by(False), "looked up": by(True)}


def autocast(step: Step, device: str) -> Step:
    def run() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            step()

    return run


def products(size: Size, mask: torch.Tensor) -> Step:
    """The six grouped products of a step alone, on sorted rows: the limit of their kernel."""
    rows, experts = int(mask.sum()), mask.shape[1]
    end_E = mask.sum(0).cumsum(0).to(size.device, torch.int32)
    x, y = (torch.randn(rows, size.dim, **size.like) for _ in range(2))
    hidden, grad = (torch.randn(rows, size.hidden, **size.like) for _ in range(2))
    w1, w2 = (0.02 * torch.randn(experts, size.hidden, size.dim, **size.like) for _ in range(2))

    def run() -> None:
        F.grouped_mm(x, w1.transpose(1, 2), offs=end_E)
        F.grouped_mm(hidden, w2, offs=end_E)
        F.grouped_mm(hidden.t(), y, offs=end_E)
        F.grouped_mm(y, w2.transpose(1, 2), offs=end_E)
        F.grouped_mm(grad.t(), x, offs=end_E)
        F.grouped_mm(grad, w1, offs=end_E)

    return run


def queued(functions: dict[str, Step], repeats: int, calls: int = 8) -> dict[str, float]:
    """Milliseconds of a call when others wait behind it, as in training: the median over some rounds."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(max(repeats // 4, 2)):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end) / calls)
    return {name: statistics.median(times) for name, times in found.items()}


def figures(functions: dict[str, Step], base: str, repeats: int) -> dict[str, Any]:
    """Times one at a time and queued, and memory, of what is run in turn; ratios to one of them."""
    times = interleave(functions, repeats)
    found: dict[str, Any] = {
        "ms": {name: round(1000 * t["median"], 4) for name, t in times.items()},
        "ratio": {name: {k: round(v, 3) for k, v in ratios(times, name, base).items()} for name in functions},
        "mib": {name: peak_memory(function) for name, function in functions.items()},
    }
    if torch.cuda.is_initialized():
        found["queued_ms"] = {name: round(v, 4) for name, v in queued(functions, repeats).items()}
    times = found.get("queued_ms", found["ms"])
    found["brief"] = {name: round(times[name] / times[base], 3) for name in functions}
    return found


def of_mask(name: str, size: Size, repeats: int, mixed: bool = False) -> dict[str, Any]:
    """Dispatch and experts against the floor, without the kernels, and the products alone."""
    mask = MASKS[name][1](size)
    step, floor = layers.sparse(size, mask), layers.dense(size, int(mask.sum()))
    if mixed:
        step, floor = autocast(step, size.device), autocast(floor, size.device)
    functions = {"layer": step, **with_candidates(step), "before": as_before(step), "floor": floor}
    if size.dtype == "bfloat16" and hasattr(F, "grouped_mm"):
        functions["products"] = products(size, mask)
    return {"target": MASKS[name][0], "size": str(size), **figures(functions, "floor", repeats)}


def whole(size: Size, grown: bool, repeats: int) -> dict[str, Any]:
    """A whole layer with its gate: one expert, or all of eight with the gate's loss."""
    made = layers.layer_of(size, 8, grown).train()
    step = layers.whole(size, made, RoutingContext(temperature=50.0))
    functions = {
        "layer": step,
        **with_candidates(step),
        "before": as_before(step),
        "floor": layers.dense(size, (8 if grown else 1) * size.tokens),
    }
    target = 1.15 if grown else 1.03
    return {"target": target, "size": str(size), **figures(functions, "floor", repeats)}


def one_token(size: Size, repeats: int) -> dict[str, Any]:
    """Fifty tokens, one after another, through a layer of 64 experts with its gate."""
    step, floor = layers.decoding(size)
    functions = {"layer": step, **with_candidates(step), "before": as_before(step), "floor": floor}
    return {"target": 2.0, "size": str(size), "calls": 50, **figures(functions, "floor", repeats)}


def measure_layer(results: Results, size: Size, args: argparse.Namespace) -> None:
    for name in MASKS:
        key = "layer, T = {}, {}".format(size.tokens, name)
        results.measure(key, "layer", lambda name=name: of_mask(name, size, args.repeats))
    for name, grown in (("single expert", False), ("8 of 8 with its gate", True)):
        key = "layer, T = {}, {}".format(size.tokens, name)
        results.measure(key, "layer", lambda grown=grown: whole(size, grown, args.repeats))
    key = "layer, one token, E = 64, with its gate"
    results.measure(key, "layer", lambda: one_token(size, args.repeats))


def measure_sizes(results: Results, size: Size, args: argparse.Namespace) -> None:
    """The layer with other numbers of tokens and in other dtypes."""
    for tokens in () if args.quick else (size.tokens // 4, 4 * size.tokens):
        for name in MASKS:
            if tokens > size.tokens and name.endswith("8 of 8"):
                continue  # half a million rows
            of = replace(size, tokens=tokens)
            key = "layer, T = {}, {}".format(tokens, name)
            results.measure(key, "layer", lambda name=name, of=of: of_mask(name, of, args.repeats))
    for kind, names in OTHERS.items():
        for name in names[:1] if args.quick else names:
            of = replace(size, dtype="float32")
            key = "layer, {}, T = {}, {}".format(kind, size.tokens, name)
            mixed = kind == "autocast"
            results.measure(
                key,
                "layer",
                lambda name=name, of=of, mixed=mixed: of_mask(name, of, max(args.repeats // 4, 2), mixed),
            )


def measure_routers(results: Results, size: Size, args: argparse.Namespace) -> None:
    for name in list(ROUTERS)[:2] if args.quick else ROUTERS:

        def one(name: str = name) -> dict[str, Any]:
            router = routers.make(name, size)
            functions = {
                "router": routers.deciding(router, size),
                "in training": routers.deciding(router, size, True),
                "floor": layers.dense(size, size.tokens),
            }
            return {
                "target": 1.0 if name == "base" else 0.25,
                "size": str(size),
                **figures(functions, "floor", max(args.repeats // 2, 2)),
            }

        results.measure("router, {}".format(name), "routers", one)


def measure_compiled(results: Results, size: Size, args: argparse.Namespace) -> None:
    """Routers by `torch.compile`: what fusing their launches would give."""
    backend = "eager" if args.quick else "inductor"  # which would take half a minute on a CPU
    for name in COMPILED[:1] if args.quick else COMPILED:

        def one(name: str = name) -> dict[str, Any]:
            router = routers.make(name, size)
            functions = {
                "in training": routers.deciding(router, size, True),
                "compiled": routers.deciding(torch.compile(router, backend=backend), size, True),
                "floor": layers.dense(size, size.tokens),
            }
            return {
                "target": 0.25,
                "size": str(size),
                **figures(functions, "floor", max(args.repeats // 2, 2)),
            }

        results.measure("compiled router, {}".format(name), "routers", one)


def measure_step(results: Results, size: Size, args: argparse.Namespace) -> None:
    """Whole updates of `fairseq-train`: 8 layers, every second one with 16 experts, one for a token."""
    if args.data is None:
        return
    path = HERE / "quality" / "gpu.py"
    spec = importlib.util.spec_from_file_location("side_by_side", path)
    side_by_side = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(side_by_side)
    common = {"moe_experts": 16, "moe_freq": 2}
    top_1 = System("top-1", "top-1", common=common, options={"moe_router": "switch", "moe_spawn_update": 0})
    sizes = (side_by_side.SMALL if args.quick else STEP).split()
    logging.disable(logging.INFO)

    def build(system: System) -> Any:
        with redirect_stdout(io.StringIO()):
            return side_by_side.Contestant(system.id, system, settings, sizes)

    settings = argparse.Namespace(data=args.data, out=args.out, updates=500, seed=1, batches=1)

    def one() -> dict[str, Any]:
        layer, floor = (partial(build(system).train, 1) for system in (top_1, DENSE))
        functions = {"layer": layer, **with_candidates(layer), "floor": floor}
        found = figures(functions, "floor", max(args.repeats // 2, 2))
        found["profiles"] = {name: profile(functions[name], 1) for name in ("layer", "looked up", "floor")}
        return {"target": 1.15, "size": " ".join(sizes), **found}

    results.measure("layer, whole update of a language model, top-1 of 16 in 4 of 8 layers", "layer", one)


def measure_peers(results: Results, size: Size, args: argparse.Namespace) -> None:
    builders = {name: build for group in peers.GROUPS for name, build in group.items()}
    for experts, k in ((8, 1),) if args.quick else ((8, 1), (64, 1), (32, 2)):
        for names in PEERS:

            def one(experts: int = experts, k: int = k, names: list[str] = names) -> dict[str, Any]:
                problem = peers.Problem.make(size, experts, k)
                rows = peers.compare(
                    problem, {name: builders[name] for name in names}, max(args.repeats // 4, 2)
                )
                for row in rows:
                    row.pop("times", None)
                brief = {r["name"]: round(r["ratio"]["median"], 2) if "ratio" in r else "-" for r in rows}
                return {"size": str(size), "rows": rows, "brief": brief}

            results.measure("peers, top-{} of {}, {}".format(k, experts, names[0]), "peers", one)


def measure_profile(results: Results, size: Size, args: argparse.Namespace) -> None:
    for name in PROFILED[:1] if args.quick else PROFILED:

        def one(name: str = name, way: str = "") -> dict[str, Any]:
            step = layers.sparse(size, MASKS[name][1](size))
            return profile({"": step, "before": as_before(step), **with_candidates(step)}[way])

        def floor(name: str = name) -> dict[str, Any]:
            return profile(layers.dense(size, int(MASKS[name][1](size).sum())))

        results.measure("profile, {}".format(name), "profile", one)
        if name in PROFILED[:2]:
            for way in ("before", "one function", "looked up"):
                key = "profile, {}, {}".format(way, name)
                results.measure(key, "profile", lambda one=one, way=way: one(way=way))
        if name == TOP_1:
            results.measure("profile, floor of {}".format(name), "profile", floor)
    results.measure("profile, one token", "profile", lambda: profile(layers.decoding(size)[0], 1))
    for name in list(ROUTERS)[:1] if args.quick else ROUTERS:
        results.measure(
            "profile, router {}, in training".format(name),
            "profile",
            lambda name=name: profile(routers.deciding(routers.make(name, size), size, True)),
        )


def main() -> int:
    """Measure what is not known yet."""
    args = parser().parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser().error("there is no part {!r}, but {}".format(unknown[0], ", ".join(PARTS)))
    torch.manual_seed(0)
    results = Results(args.out, args.seconds)
    size = Size(16384, 1024, 4096, args.device, "bfloat16")
    if args.quick:
        size, args.repeats = Size(64, 16, 32, args.device, "bfloat16"), 2
    results.measure("machine", "machine", lambda: {"machine": machine(torch.get_num_threads())})
    functions = {
        "layer": measure_layer,
        "routers": measure_routers,
        "step": measure_step,
        "profile": measure_profile,
        "sizes": measure_sizes,
        "peers": measure_peers,
        "compiled": measure_compiled,
    }
    for part in args.parts or PARTS:
        functions[part](results, size, args)
    (args.out / "gpu.md").write_text(report(results.known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
