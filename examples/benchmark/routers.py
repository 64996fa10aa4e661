"""What deciding costs: each router, forward and backward with its losses, beside the layer's experts."""

from __future__ import annotations

import inspect

import torch
from layer import Size, dense
from timing import clean_up, interleave, ratios

from fairseq_evomoe.moe.routers import ROUTERS, Router
from fairseq_evomoe.moe.routing import RoutingContext, Vocabulary

SIZE = Size()
EXPERTS, WORDS, SEQUENCES = 8, 8000, 32


def make(name: str) -> Router:
    """A router in training with the defaults of its options."""
    router = ROUTERS[name]
    accepted = inspect.signature(router.__init__).parameters
    offered = {"vocabulary": Vocabulary(WORDS, torch.rand(WORDS)), "shared": {}}
    made = router(SIZE.dim, EXPERTS, **{key: value for key, value in offered.items() if key in accepted})
    made.initialize(torch.Generator().manual_seed(0))
    return made.train()


def deciding(router: Router):
    """A function that routes T tokens and goes back through weights and losses."""
    x = torch.randn(SIZE.tokens, SIZE.dim, requires_grad=True)
    token_T = torch.randint(WORDS, (SIZE.tokens,))
    sequence_T = torch.arange(SIZE.tokens) % SEQUENCES

    def run() -> None:
        x.grad = None
        router.zero_grad()
        routing = router(x, RoutingContext(token_T=token_T, sequence_T=sequence_T))
        total = routing.weight_N.sum() + sum(routing.losses.values())
        if total.requires_grad:
            total.backward()

    return run


def run(repeats: int) -> dict:
    """Each router's time in units of a step of a dense FFN on the same tokens."""
    functions = {"dense FFN": dense(SIZE, SIZE.tokens)}
    errors = {}
    for name in ROUTERS:
        try:
            function = deciding(make(name))
            function()
            functions[name] = function
        except Exception as error:  # it belongs into the table
            errors[name] = "{}: {}".format(type(error).__name__, str(error).splitlines()[0][:100])
    times = interleave(functions, repeats)
    rows = [
        {"name": name, "share": ratios(times, name, "dense FFN"), "ms": 1000 * times[name]["median"]}
        for name in list(functions)[1:]
    ]
    for row in rows:
        print("  {}: {}".format(row["name"], {k: round(v, 3) for k, v in row["share"].items()}), flush=True)
    clean_up()
    note = "T = {}, d = {}, E = {}; in units of a dense FFN's step, h = {}".format(
        SIZE.tokens, SIZE.dim, EXPERTS, SIZE.hidden
    )
    return {"note": note, "rows": rows, "errors": errors}
