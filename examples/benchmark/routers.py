"""What deciding costs: each router, forward and backward with its losses, beside the layer's experts.

What a router learns of an update counts, too.  Some options have rows of their own, and the last rows
are differences: what an option costs on top of what is without it.
"""

from __future__ import annotations

import inspect
import statistics
from typing import Callable

import torch
from layer import Size, dense
from timing import clean_up, in_words, interleave, ratios, step

from fairseq_evomoe.moe import MoELayer
from fairseq_evomoe.moe.low_rank import LowRankExperts
from fairseq_evomoe.moe.routers import ROUTERS, Router
from fairseq_evomoe.moe.routing import RoutingContext, Vocabulary
from fairseq_evomoe.moe.statistics import Collector

EXPERTS, WORDS, SEQUENCES = 8, 8000, 32

VARIANTS: dict[str, tuple[str, dict]] = {
    "switch, bias": ("switch", {"balance": "bias"}),
    "switch, no loss": ("switch", {"balance_weight": 0.0}),
    "topk, quantile": ("topk", {"balance": "quantile"}),
    "topk, MoE++": ("topk", {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}),
    "topk, GELU": ("topk", {"gate_activation": "gelu"}),
    "comet, searching": ("comet", {"leaf_search": 1000000}),
    "dts, DS-MoE": ("dts", {"threshold": 0.0, "hard_experts": 2, "mutual_information_weight": 0.01}),
}
"""Rows beside those of the routers as they are: a router and its options."""

DIFFERENCES = {
    "bias, on top of switch without a loss": ("switch, bias", "switch, no loss"),
    "a layer of default-moe, on top of topk's": ("layer of default-moe", "layer of topk"),
}


def make(name: str, size: Size, **options: object) -> Router:
    """A router in training with the defaults of its other options."""
    router = ROUTERS[name]
    accepted = inspect.signature(router.__init__).parameters
    offered = {"vocabulary": Vocabulary(WORDS, torch.rand(WORDS)), "shared": {}}
    given = {key: value for key, value in offered.items() if key in accepted}
    made = router(size.dim, EXPERTS, **given, **options)
    made.initialize(torch.Generator().manual_seed(0))
    return made.to(**size.like).train()


def deciding(router: Router, size: Size, trained: bool = False) -> Callable[[], None]:
    """A function that routes T tokens and goes back through weights and losses.

    Args:
        router: what `make` returns.
        size: of the tokens.
        trained: whether it is as in training: without losses that have no weight, and with noise that
            belongs to a token.
    """
    x = torch.randn(size.tokens, size.dim, **size.like, requires_grad=True)
    token_T = torch.randint(WORDS, (size.tokens,), device=size.device)
    sequence_T = torch.arange(size.tokens, device=size.device) % SEQUENCES

    more: dict = {}
    if trained:
        more["losses"] = ["balance"] + [name for name, weight in router.loss_weights.items() if weight > 0]
        more["noise_key"] = "gate", 1

    def run() -> None:
        x.grad = None
        router.zero_grad()
        context = RoutingContext(token_T=token_T, sequence_T=sequence_T, **more)
        if router.passes:  # all that is between them, with experts that give tokens back as they are
            y, routing = router.run_passes(x, context, lambda tokens, *_: tokens, True)
            extra = router.finish(x + y).sum()
        else:
            routing, extra = router(x, context), 0
        total = routing.weight_N.sum() + sum(routing.losses.values()) + extra
        if total.requires_grad:
            total.backward()

    return run


def low_rank(size: Size, rank: int = 4) -> Callable[[], None]:
    """A function that goes forward and back through SMoLA's experts beside a linear layer, without that."""
    experts = LowRankExperts(size.dim, size.hidden, EXPERTS, rank)
    experts.initialize(torch.Generator().manual_seed(0))
    experts.to(**size.like)
    x = torch.randn(size.tokens, size.dim, **size.like, requires_grad=True)
    sequence_T = torch.arange(size.tokens, device=size.device) % SEQUENCES
    grad = torch.randn(size.tokens, size.hidden, **size.like)
    return step(lambda: experts(x, sequence_T), [x, *experts.parameters()], grad)


def learning(modules: torch.nn.Module, function: Callable[[], None]) -> Callable[[], None]:
    """The function, and after it what collectors do at the end of an update."""
    collectors = [module for module in modules.modules() if isinstance(module, Collector)]

    def run() -> None:
        function()
        for collector in collectors:
            collector.commit(collector.drain())

    return run


def whole_layer(router: str, size: Size) -> Callable[[], None]:
    """A function that goes forward and back through a layer with two experts a token."""
    options = {} if router == "default-moe" else {"renormalize": "never"}
    layer = MoELayer(size.dim, size.hidden, EXPERTS, router, spawned=True, top_k=2, **options)
    layer = layer.to(**size.like).train()
    x = torch.randn(size.tokens, size.dim, **size.like, requires_grad=True)

    def run() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).sum().backward()

    return learning(layer, run)


def difference(times: dict, more: str, less: str) -> dict:
    """How much more time one function takes, in units of a dense FFN's step of the same turn."""
    base = times["dense FFN"]
    pairs = [(a - b) / c for a, b, c in zip(times[more]["all"], times[less]["all"], base["all"])]
    by = {"median": "median", "minimum": "minimum", "cpu": "cpu_minimum"}
    share = {key: (times[more][k] - times[less][k]) / max(base[k], 1e-9) for key, k in by.items()}
    return {**share, "pairs": statistics.median(pairs)}


def run(repeats: int, **sizes: int | str) -> dict:
    """Each router's time in units of a step of a dense FFN on the same tokens; sizes: fields of `Size`."""
    size = Size(**sizes)
    functions = {"dense FFN": dense(size, size.tokens)}
    errors = {}
    rows_of = {**{name: (name, {}) for name in ROUTERS}, **VARIANTS}
    for name, (of, options) in rows_of.items():
        try:
            router = make(of, size, **options)
            trained = name in sum(DIFFERENCES.values(), ())  # a loss without weight is not computed
            function = learning(router, deciding(router, size, trained))
            function()
            functions[name] = function
        except Exception as error:  # it belongs into the table
            errors[name] = in_words(error)
    functions.update({f"layer of {name}": whole_layer(name, size) for name in ("topk", "default-moe")})
    times = interleave(functions, repeats)
    rows = [
        {"name": name, "share": ratios(times, name, "dense FFN"), "ms": 1000 * times[name]["median"]}
        for name in list(functions)[1:]
    ]
    for name, (more, less) in DIFFERENCES.items():
        apart = 1000 * (times[more]["median"] - times[less]["median"])
        rows.append({"name": name, "share": difference(times, more, less), "ms": apart})
    for row in rows:
        print("  {}: {}".format(row["name"], {k: round(v, 3) for k, v in row["share"].items()}), flush=True)
    clean_up()
    note = f"{size}, E = {EXPERTS}; in units of a dense FFN's step"
    return {"note": note, "rows": rows, "errors": errors}
