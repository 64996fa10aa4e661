"""What the MoE layer costs beside a plain dense FFN that is given the same number of active rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Iterator

import torch
from timing import clean_up, interleave, peak_memory, ratios, step
from torch import nn

from fairseq_evomoe.moe import Experts, MoELayer, Routing, RoutingContext, record
from fairseq_evomoe.moe.dispatch.local import dispatch


@dataclass
class Size:
    """Tokens, model width and hidden width; where they are, and of what kind."""

    tokens: int = 4096
    dim: int = 512
    hidden: int = 2048
    device: str = "cpu"
    dtype: str = "float32"

    def __str__(self) -> str:
        numbers = f"T = {self.tokens}, d = {self.dim}, h = {self.hidden}"
        usual = (self.dtype, self.device) == ("float32", "cpu")
        return numbers if usual else f"{numbers}, {self.dtype} on {self.device}"

    @property
    def like(self) -> dict:
        """Where to make a tensor of activations, for PyTorch's functions."""
        return {"device": self.device, "dtype": getattr(torch, self.dtype)}


@dataclass
class Case:
    """One row of the table: a layer, its floor, and how many times the floor it may cost.

    A target of ``None`` is a row for information; ``calls`` of the functions' own are one figure.
    """

    name: str
    target: float | None
    layer: Callable[[], None]
    floor: Callable[[], None]
    calls: int = 1


def dense(size: Size, rows: int, hidden: int | None = None) -> Callable[[], None]:
    """The floor: Linear, ReLU, Linear on so many rows."""
    ffn = ffn_of(size, hidden)
    x = torch.randn(rows, size.dim, **size.like, requires_grad=True)
    return step(lambda: ffn(x), [x, *ffn.parameters()], torch.randn(rows, size.dim, **size.like))


def ffn_of(size: Size, hidden: int | None = None) -> nn.Sequential:
    hidden = hidden or size.hidden
    layers = nn.Linear(size.dim, hidden), nn.ReLU(), nn.Linear(hidden, size.dim)
    return nn.Sequential(*layers).to(**size.like)


def experts_of(size: Size, widths: list[int], bias: bool = True) -> Experts:
    experts = Experts(size.dim, widths, bias=bias).to(**size.like)
    for parameter in experts.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return experts


def sparse(
    size: Size, mask: torch.Tensor, widths: list[int] | None = None, bias: bool = True
) -> Callable[[], None]:
    """Dispatch, experts and weighted sum for a T x E mask of active pairs."""
    token, expert = mask.to(size.device).nonzero(as_tuple=True)
    experts = experts_of(size, widths or [size.hidden] * mask.shape[1], bias)
    x = torch.randn(mask.shape[0], size.dim, **size.like, requires_grad=True)
    weight = torch.rand(len(token), device=size.device, requires_grad=True)
    routing = Routing(token, expert, weight, *mask.shape)
    run = lambda: dispatch(x, routing, experts)  # noqa: E731
    return step(run, [x, weight, *experts.parameters()], torch.randn(mask.shape[0], size.dim, **size.like))


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


def layer_of(size: Size, experts: int, spawned: bool = True) -> MoELayer:
    """A whole layer with its Dense-To-Sparse gate."""
    # noise as published
    layer = MoELayer(size.dim, size.hidden, experts, "dts", gate_noise="always").to(**size.like)
    if spawned:
        layer.spawn("copy")
    return layer


def whole(size: Size, layer: MoELayer, context: RoutingContext) -> Callable[[], None]:
    """Forward and backward of a whole layer, gate and balance loss included."""
    x = torch.randn(size.tokens, size.dim, **size.like, requires_grad=True)

    def run() -> torch.Tensor:
        with record() as routings:
            y = layer(x, context)
        # the loss has a gradient of its own; weight 0, as in the authors' scripts, still computes it
        return y + 0 * routings[layer].losses["balance"] if layer.router is not None else y

    return step(run, [x, *layer.parameters()], torch.randn(size.tokens, size.dim, **size.like))


def decoding(size: Size) -> tuple[Callable[[], None], Callable[[], None]]:
    """One token through a layer of 64 experts in evaluation, gate included, and through a dense FFN."""
    layer, ffn, x = layer_of(size, 64).eval(), ffn_of(size), torch.randn(1, size.dim, **size.like)

    def repeat(function: Callable) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            for _ in range(50):
                function(x)

        return run

    return repeat(lambda x: layer(x, RoutingContext(statistics=False))), repeat(ffn)


def cases(size: Size, quick: bool) -> Iterator[Case]:
    """The cases, each built when it is its turn."""

    def case(name: str, target: float | None, mask: torch.Tensor, widths: list[int] | None = None) -> Case:
        rows = int(mask.sum())
        hidden = None
        if widths:
            work = sum(w * n for w, n in zip(widths, mask.sum(0).tolist()))
            hidden = round(work / rows)
        return Case(name, target, sparse(size, mask, widths), dense(size, rows, hidden))

    yield case("top-1, E = 8, balanced", 1.12, balanced(size, 8))
    yield case("top-1, E = 16, Zipf load", 1.20, zipf(size, 16))
    base = whole(size, layer_of(size, 8, spawned=False), RoutingContext())
    yield Case("single expert before the spawn", 1.02, base, dense(size, size.tokens))
    if quick:
        return
    yield case("top-1, E = 64, balanced", 1.50, balanced(size, 64))
    yield case("top-1, E = 64, random", None, top(size, 64, 1))
    yield case("top-2, E = 32", 1.15, top(size, 32, 2))
    for mean in (1.5, 4.0):
        yield case(f"DTS soft stage, {mean:g} of 8 active", 1.15, soft(size, 8, mean))
    everything = whole(size, layer_of(size, 8).train(), RoutingContext(temperature=50.0))
    yield Case("DTS soft stage, 8 of 8 active, with its gate", 1.15, everything, dense(size, 8 * size.tokens))
    yield case("DTS dense stage, 8 of 8", 1.05, soft(size, 8, 8.0))
    yield case("HMoE arithmetic widths, top-2 of 8", 1.20, top(size, 8, 2), arithmetic(size, 8))
    yield Case("one token, E = 64, evaluation, with its gate", 2.0, *decoding(size), calls=50)
    one = replace(size, tokens=1)
    yield Case("one token, E = 64, forward and backward", None, sparse(one, top(one, 64, 1)), dense(one, 1))
    large = replace(size, tokens=4 * size.tokens)
    name = f"{large.tokens} tokens, top-1, E = 64"
    yield Case(name, None, sparse(large, balanced(large, 64)), dense(large, large.tokens))


def measure(case: Case, repeats: int) -> dict:
    """Both in turn: ratios, times and memory."""
    times = interleave({"layer": case.layer, "floor": case.floor}, repeats)
    return {
        "case": case.name,
        "target": case.target,
        "ratio": ratios(times, "layer", "floor"),
        "ms": {n: {k: 1000 * t[k] / case.calls for k in ("median", "minimum")} for n, t in times.items()},
        "mib": {"layer": peak_memory(case.layer), "floor": peak_memory(case.floor)},
        "times": times,
    }


def run(quick: bool, repeats: int, **sizes: int | str) -> dict:
    """All cases, the figures of each printed as they come; ``sizes`` are fields of `Size`."""
    size = Size(**{**({"tokens": 2048, "hidden": 1024} if quick else {}), **sizes})
    rows = []
    for case in cases(size, quick):
        row = measure(case, repeats)
        rows.append(row)
        print("  {}: {}".format(case.name, {k: round(v, 2) for k, v in row["ratio"].items()}), flush=True)
        del case
        clean_up()
    return {"size": str(size), "repeats": repeats, "rows": rows}
