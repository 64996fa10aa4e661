"""What deciding costs: each router, forward and backward with its losses, beside the layer's experts."""

from __future__ import annotations

import inspect
from typing import Callable

import torch
from layer import Size, dense
from timing import clean_up, interleave, ratios

from fairseq_evomoe.moe.routers import ROUTERS, Router
from fairseq_evomoe.moe.routing import RoutingContext, Vocabulary

EXPERTS, WORDS, SEQUENCES = 8, 8000, 32


def make(name: str, size: Size) -> Router:
    """A router in training with the defaults of its options."""
    router = ROUTERS[name]
    accepted = inspect.signature(router.__init__).parameters
    offered = {"vocabulary": Vocabulary(WORDS, torch.rand(WORDS)), "shared": {}}
    made = router(size.dim, EXPERTS, **{key: value for key, value in offered.items() if key in accepted})
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
        routing = router(x, RoutingContext(token_T=token_T, sequence_T=sequence_T, **more))
        total = routing.weight_N.sum() + sum(routing.losses.values())
        if total.requires_grad:
            total.backward()

    return run


def run(repeats: int, **sizes: int | str) -> dict:
    """Each router's time in units of a step of a dense FFN on the same tokens; sizes: fields of `Size`."""
    size = Size(**sizes)
    functions = {"dense FFN": dense(size, size.tokens)}
    errors = {}
    for name in ROUTERS:
        try:
            function = deciding(make(name, size), size)
            function()
            functions[name] = function
        except Exception as error:  # it belongs into the table
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    times = interleave(functions, repeats)
    rows = [
        {"name": name, "share": ratios(times, name, "dense FFN"), "ms": 1000 * times[name]["median"]}
        for name in list(functions)[1:]
    ]
    for row in rows:
        print("  {}: {}".format(row["name"], {k: round(v, 3) for k, v in row["share"].items()}), flush=True)
    clean_up()
    note = f"{size}, E = {EXPERTS}; in units of a dense FFN's step"
    return {"note": note, "rows": rows, "errors": errors}
