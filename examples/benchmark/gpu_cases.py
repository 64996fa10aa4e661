"""What `gpu.py` measures, part by part."""

from __future__ import annotations

import argparse
import importlib.util
import io
import logging
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable

import layer as layers
import peers
import programs
import routers
import torch
from gpu_measure import Results, Step, as_before, autocast, figures, on_device, with_candidates
from gpu_profile import profile
from layer import Size
from systems import DENSE, System
from torch.nn import functional as F

from fairseq_evomoe.moe import RoutingContext
from fairseq_evomoe.moe.routers import ROUTERS

HERE = Path(__file__).resolve().parent
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
COMPILED = ["switch", "dts", "topk", "base"]
OTHERS = [TOP_1, "top-2, E = 32"]  # in float32 and under autocast
STEP = (
    "--decoder-layers 8 --decoder-embed-dim 1024 --decoder-input-dim 1024 --decoder-output-dim 1024 "
    "--decoder-ffn-embed-dim 4096 --decoder-attention-heads 16 --dropout 0.1 "
    "--tokens-per-sample 512 --batch-size 32 --lr 0.0005"
)
BARE = "torch's grouped_mm, bare"
PEERS = [
    ["fairseq_evomoe, ReLU", "loop over masks", "transformers, Switch", BARE],
    [
        "fairseq_evomoe, SwiGLU",
        "fairseq_evomoe, SwiGLU, no biases",
        "transformers, Mixtral eager",
        "transformers, Mixtral batched_mm",
        "transformers, Mixtral grouped_mm",
        BARE,
    ],
]


def products(size: Size, load_E: torch.Tensor, gated: bool = False) -> Step:
    """The grouped products of a step alone, on sorted rows: the limit of their kernel."""
    rows, experts = int(load_E.sum()), len(load_E)
    end_E = load_E.cumsum(0).to(size.device, torch.int32)
    x, y = (torch.randn(rows, size.dim, **size.like) for _ in range(2))
    hidden, grad = (torch.randn(rows, size.hidden, **size.like) for _ in range(2))
    w1, w2 = (0.02 * torch.randn(experts, size.hidden, size.dim, **size.like) for _ in range(2))

    def run() -> None:
        for _ in range(2 if gated else 1):  # w1, and w3 of gated experts
            F.grouped_mm(x, w1.transpose(1, 2), offs=end_E)
            F.grouped_mm(grad.t(), x, offs=end_E)
            F.grouped_mm(grad, w1, offs=end_E)
        F.grouped_mm(hidden, w2, offs=end_E)
        F.grouped_mm(hidden.t(), y, offs=end_E)
        F.grouped_mm(y, w2.transpose(1, 2), offs=end_E)

    return run


def of_mask(
    name: str, size: Size, repeats: int, mixed: bool = False, candidates: bool = True
) -> dict[str, Any]:
    """Dispatch and experts against the floor, without the kernels, and the products alone."""
    mask = MASKS[name][1](size)
    step, floor = layers.sparse(size, mask), layers.dense(size, int(mask.sum()))
    functions = {"layer": step, "no biases": layers.sparse(size, mask, bias=False), "floor": floor}
    if mixed:
        functions = {way: autocast(each, size.device) for way, each in functions.items()}
    step = functions["layer"]
    functions.update({"before": as_before(step), **(with_candidates(step) if candidates else {})})
    if size.dtype == "bfloat16" and hasattr(F, "grouped_mm"):
        functions["products"] = products(size, mask.sum(0))
    return {"target": MASKS[name][0], "size": str(size), **figures(functions, "floor", repeats)}


def whole(size: Size, grown: bool, repeats: int) -> dict[str, Any]:
    """A whole layer with its gate: one expert, or all of eight with the gate's loss."""
    made = layers.layer_of(size, 8, grown).train()
    step = layers.whole(size, made, RoutingContext(temperature=50.0))
    floor = layers.dense(size, (8 if grown else 1) * size.tokens)
    functions = {"layer": step, **with_candidates(step), "before": as_before(step), "floor": floor}
    target = 1.15 if grown else 1.03
    return {"target": target, "size": str(size), **figures(functions, "floor", repeats)}


def one_token(size: Size, repeats: int) -> dict[str, Any]:
    """Fifty tokens, one after another, through a layer of 64 experts with its gate."""
    step, floor = layers.decoding(size)
    functions = {"layer": step, **with_candidates(step), "before": as_before(step), "floor": floor}
    return {"target": 2.0, "size": str(size), "calls": 50, **figures(functions, "floor", repeats)}


def measure_layer(results: Results, size: Size, args: argparse.Namespace) -> None:
    """The cases of the table of targets."""
    for name in (TOP_1, "dense stage, 8 of 8") if args.quick else MASKS:
        results.measure(_key(size, name), "layer", partial(of_mask, name, size, args.repeats))
    for name, grown in (("single expert", False), ("8 of 8 with its gate", True)):
        results.measure(_key(size, name), "layer", partial(whole, size, grown, args.repeats))
    key = "layer, one token, E = 64, with its gate"
    results.measure(key, "layer", partial(one_token, size, args.repeats))


def _key(size: Size, name: str, kind: str = "") -> str:
    return f"layer, {kind}T = {size.tokens}, {name}"


def _sizes(size: Size) -> list[Size]:
    """A quarter of the tokens, as many, and four times as many."""
    return [replace(size, tokens=tokens) for tokens in (size.tokens // 4, size.tokens, 4 * size.tokens)]


def measure_sizes(results: Results, size: Size, args: argparse.Namespace) -> None:
    """The layer with other numbers of tokens, and in other dtypes."""
    few = max(args.repeats // 4, 2)
    for of in _sizes(size)[:1] if args.quick else _sizes(size):
        for name in MASKS if of.tokens != size.tokens and not args.quick else ():
            if of.tokens < size.tokens or not name.endswith("8 of 8"):  # not half a million rows
                measure = partial(of_mask, name, of, args.repeats // 2, candidates=False)
                results.measure(_key(of, name), "layer", measure)
        for kind in ("float32", "autocast"):
            for name in OTHERS[:1] if args.quick else OTHERS:
                of = replace(of, dtype="float32")
                measure = partial(of_mask, name, of, few, kind == "autocast", candidates=False)
                results.measure(_key(of, name, kind + ", "), "layer", measure)


def router_steps(name: str, options: dict[str, Any], size: Size) -> dict[str, Step]:
    """A router as it is, and as in training; BASE with its candidate, SMoLA with its experts."""
    if name == "smola":
        return {"in training": routers.low_rank(size)}
    router = routers.make(name, size, **options)
    trained = routers.learning(router, routers.deciding(router, size, True))
    functions = {"router": routers.deciding(router, size), "in training": trained}
    return {**functions, "on device": on_device(trained)} if name == "base" else functions


def all_routers(quick: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Each router, and options that have a row of their own: name -> router, options."""
    every = {**{name: (name, {}) for name in ROUTERS}, **routers.VARIANTS, "smola": ("smola", {})}
    return {name: every[name] for name in (("base", "dts, DS-MoE", "smola") if quick else every)}


def measure_routers(results: Results, size: Size, args: argparse.Namespace) -> None:
    """Each router beside a dense FFN's step."""
    for name, (of, options) in all_routers(args.quick).items():

        def one(of: str = of, options: dict[str, Any] = options) -> dict[str, Any]:
            functions = {**router_steps(of, options, size), "floor": layers.dense(size, size.tokens)}
            found = figures(functions, "floor", max(args.repeats // 2, 2))
            return {"target": 1.0 if of == "base" else 0.25, "size": str(size), **found}

        results.measure(f"router, {name}", "routers", one)


def measure_router_sizes(results: Results, size: Size, args: argparse.Namespace) -> None:
    """All routers, as in training, with other numbers of tokens and in other dtypes; a line for each."""
    for of in _sizes(size)[:1] if args.quick else _sizes(size):
        for kind in ("autocast",) if args.quick else ("bfloat16", "float32", "autocast"):
            if (kind, of.tokens) == ("bfloat16", size.tokens):
                continue
            of = replace(of, dtype="bfloat16" if kind == "bfloat16" else "float32")
            key = f"routers, {kind}, T = {of.tokens}"
            results.measure(key, "router sizes", partial(_every_router, of, kind == "autocast", args))


def _every_router(size: Size, mixed: bool, args: argparse.Namespace) -> dict[str, Any]:
    functions, errors = {"floor": layers.dense(size, size.tokens)}, {}
    for name, (of, options) in all_routers(args.quick).items():
        try:
            step = router_steps(of, options, size)["in training"]
            functions[name] = autocast(step, size.device) if mixed else step
            functions[name]()
        except Exception as error:  # it must not take the others with it
            functions.pop(name, None)
            errors[name] = f"{type(error).__name__}: {str(error)[:200]}"
    functions = {k: autocast(v, size.device) if mixed and k == "floor" else v for k, v in functions.items()}
    return {"size": str(size), "errors": errors, **figures(functions, "floor", max(args.repeats // 5, 2))}


def measure_compiled(results: Results, size: Size, args: argparse.Namespace) -> None:
    """Routers by `torch.compile`, and captured as CUDA graphs: what fusing their launches would give."""
    backend = "eager" if args.quick else "inductor"  # which would take half a minute on a CPU
    for name in ("base",) if args.quick else COMPILED:

        def one(name: str = name) -> dict[str, Any]:
            router = routers.make(name, size)
            ways = {"compiled": torch.compile(router, backend=backend)}
            if torch.cuda.is_available():
                ways["captured"] = torch.compile(router, mode="reduce-overhead")
            functions = {"in training": routers.deciding(router, size, True)}
            functions.update({way: routers.deciding(made, size, True) for way, made in ways.items()})
            if name == "base":  # its own assignment is on the CPU
                functions = {way: on_device(step) for way, step in functions.items()}
            functions["floor"] = layers.dense(size, size.tokens)
            found = figures(functions, "floor", max(args.repeats // 2, 2))
            return {"target": 1.0 if name == "base" else 0.25, "size": str(size), **found}

        results.measure(f"compiled router, {name}", "routers", one)


def measure_step(results: Results, size: Size, args: argparse.Namespace) -> None:
    """Whole updates of `fairseq-train`: 8 layers, every second one with 16 experts, one for a token."""
    common = {"moe_experts": 16, "moe_freq": 2}
    top_1 = System("top-1", "top-1", common=common, options={"moe_router": "switch", "moe_spawn_update": 0})

    def one() -> dict[str, Any]:
        path = HERE / "quality" / "gpu.py"
        spec = importlib.util.spec_from_file_location("side_by_side", path)
        side_by_side = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(side_by_side)
        sizes = (side_by_side.SMALL if args.quick else STEP).split()
        settings = argparse.Namespace(data=_text(args), out=args.out, updates=500, seed=1, batches=1)
        logging.disable(logging.INFO)
        with redirect_stdout(io.StringIO()):
            made = [side_by_side.Contestant(each.id, each, settings, sizes) for each in (top_1, DENSE)]
        layer, floor = (partial(each.train, 1) for each in made)
        functions = {"layer": layer, **with_candidates(layer), "floor": floor}
        found = figures(functions, "floor", max(args.repeats // 2, 2))
        found["profiles"] = {name: profile(functions[name], 1) for name in ("layer", "looked up", "floor")}
        return {"target": 1.15, "size": " ".join(sizes), **found}

    results.measure("layer, whole update of a language model, top-1 of 16 in 4 of 8 layers", "layer", one)


def _text(args: argparse.Namespace) -> Path:
    """The folder of the text that was given, or one of random words."""
    if args.data is not None:
        return args.data
    folder = args.out / "random"
    if not (folder / "text" / "train.idx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        programs.make_data(folder)
    return folder / "text"


def measure_peers(results: Results, size: Size, args: argparse.Namespace) -> None:
    """Other implementations of experts on the same routing."""
    builders = {name: build for group in peers.GROUPS for name, build in group.items()}
    builders["fairseq_evomoe, SwiGLU, no biases"] = partial(peers.ours, gated=True, bias=False)
    for experts, k in ((8, 1),) if args.quick else ((8, 1), (64, 1), (32, 2)):
        for names in PEERS:

            def one(experts: int = experts, k: int = k, names: list[str] = names) -> dict[str, Any]:
                problem = peers.Problem.make(size, experts, k)
                load_E = torch.bincount(problem.expert_TK.flatten(), minlength=experts).cpu()
                of_size = partial(products, size, load_E, "SwiGLU" in names[0])
                group = {name: builders.get(name, lambda problem: of_size()) for name in names}
                rows = peers.compare(problem, group, max(args.repeats // 4, 2))
                for row in rows:
                    row.pop("times", None)
                brief = {r["name"]: round(r["ratio"]["median"], 2) if "ratio" in r else "-" for r in rows}
                return {"size": str(size), "rows": rows, "brief": brief}

            results.measure(f"peers, top-{k} of {experts}, {names[0]}", "peers", one)


def measure_profile(results: Results, size: Size, args: argparse.Namespace) -> None:
    """Where the time goes: layers, a token, and each router."""
    for name in PROFILED[:1] if args.quick else PROFILED:

        def one(name: str = name, way: str = "") -> dict[str, Any]:
            step = layers.sparse(size, MASKS[name][1](size))
            return profile({"": step, "before": as_before(step), **with_candidates(step)}[way])

        results.measure(f"profile, {name}", "profile", one)
        if name in PROFILED[:2]:
            for way in ("looked up",) if args.quick else ("before", "one function", "looked up"):
                results.measure(f"profile, {way}, {name}", "profile", partial(one, way=way))
        if name == TOP_1:
            floor = layers.dense(size, int(MASKS[name][1](size).sum()))
            results.measure(f"profile, floor of {name}", "profile", partial(profile, floor))
    results.measure("profile, one token", "profile", lambda: profile(layers.decoding(size)[0], 1))
    for name, (of, options) in all_routers(args.quick).items():
        for way in ("in training", "on device"):

            def router(of: str = of, options: dict[str, Any] = options, way: str = way) -> dict[str, Any]:
                return profile(router_steps(of, options, size)[way])

            if way == "in training" or of == "base":
                results.measure(f"profile, router {name}, {way}", "profile", router)
