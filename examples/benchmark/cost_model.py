#!/usr/bin/env python3
"""Estimate what a training step costs on many ranks.  This is a model, not a measurement.

    python examples/benchmark/cost_model.py                                # 8 to 1024 GPUs, assumed figures
    python examples/benchmark/cost_model.py --check results/ranks.jsonl    # against what ranks.py measured

Symbols: W ranks, G of them in a node; P consecutive ranks share the E experts of a layer; T tokens of a
rank, width d, h hidden units of an expert, k active experts of a token; b bytes of a number on the way.

- A step of a layer computes ``T (6 k m d h + 6 d E)`` FLOP on each rank: the experts (m = 2 matrices, 3 if
  gated) and the router, 2 FLOP for a weight in the forward pass and 4 in the backward pass.
- A token travels once to each rank that has any of its experts: to ``r(k)`` other ranks, see
  ``other_ranks``.  A rank sends ``4 T r d b`` bytes (there and back, and their gradients), 16 for each pair
  of a token and an expert elsewhere (weight and number of the row, and their gradients), and the counts.
- An exchange takes ``latency + max(bytes within the node / bandwidth, bytes to other nodes / bandwidth)``.
  There are 5 one after the other: counts, rows there and back, and the gradients' two.
- Before the spawn there is no exchange: the one expert is on every rank and its gradient is added up over
  W ranks.  Afterwards those of a rank's E / P experts are added up over the W / P ranks that have the same.
- An all-reduce of n bytes by R ranks takes ``2 (R - 1) / R n / bandwidth`` (a ring), inside the nodes first,
  then between them with n / G bytes of each rank; latency counts ``2 log2 R`` times.

Left out: uneven loads, sorting and gathering rows, the small sums of the router's losses, contention on the
network, the optimizer, and that latency grows with the number of messages.  Gradients are added up after the
backward pass, as ``legacy_ddp`` does, and hide behind nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

from report import table

TRIPS = 4
"""Exchanges of rows in a step: there and back, in the forward and the backward pass."""

BYTES_OF_PARAMETER = 16
"""Weight, gradient and Adam's two moments in float32; or the first two in 16 bits beside float32 weights."""


@dataclass(frozen=True)
class Link:
    """How ranks reach each other.

    Attributes:
        bandwidth: B/s that a rank can send while it receives as much.
        latency: seconds of an exchange without content.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """What ranks run on.

    Attributes:
        flops: FLOP/s that a rank reaches in the products of experts.
        inside: between the ranks of a node.
        between: between nodes.
        ranks_per_node: G.
    """

    flops: float
    inside: Link
    between: Link
    ranks_per_node: int


@dataclass(frozen=True)
class Layer:
    """An MoE layer: width d, h hidden units and number E of the experts, matrices of each."""

    dim: int
    hidden: int
    experts: int
    matrices: int = 2

    @property
    def expert_parameters(self) -> int:
        """Of one expert, biases among them."""
        return self.matrices * self.dim * self.hidden + self.hidden + self.dim

    @property
    def router_parameters(self) -> int:
        """Of a linear gate."""
        return self.dim * self.experts


@dataclass(frozen=True)
class Run:
    """How a layer is trained.

    Attributes:
        ranks: W.
        parallel: P, a divisor of W, at most E.
        tokens: T of a rank.
        wire_bytes: b, of a number on the way.
        gradient_bytes: of a number of the gradients that are added up.
    """

    ranks: int
    parallel: int
    tokens: int
    wire_bytes: int = 2
    gradient_bytes: int = 2


@dataclass(frozen=True)
class Phase:
    """A stage of EvoMoE: k experts of a token, all of which are on every rank before the spawn."""

    name: str
    active: int
    spawned: bool = True


@dataclass(frozen=True)
class Seconds:
    """What a step takes."""

    compute: float = 0.0
    exchange: float = 0.0
    gradients: float = 0.0

    @property
    def step(self) -> float:
        """All of it, one after the other."""
        return self.compute + self.exchange + self.gradients


def phases(experts: int) -> list[Phase]:
    """The three of EvoMoE; the second one is the start of the Dense-To-Sparse gate."""
    return [Phase("one expert", 1, spawned=False), Phase("all experts", experts), Phase("top-1", 1)]


def other_ranks(experts: int, parallel: int, active: int) -> float:
    """How many other ranks have any of a token's k experts: the expected number, r.

    The experts are k different ones at random.  A rank with n of the E experts has none of them with
    probability ``C(E - n, k) / C(E, k)``, and it is another rank than the token's with ``(P - 1) / P``.
    """
    counts = [experts // parallel + (place < experts % parallel) for place in range(parallel)]
    none = [math.comb(experts - n, active) / math.comb(experts, active) for n in counts]
    return sum(1 - p for p in none) * (parallel - 1) / parallel


def exchanged_bytes(layer: Layer, run: Run, phase: Phase) -> float:
    """Bytes that a rank sends to others in a step."""
    if not phase.spawned or run.parallel == 1:
        return 0.0
    others = run.parallel - 1
    rows = run.tokens * other_ranks(layer.experts, run.parallel, phase.active)
    pairs = run.tokens * phase.active * others / run.parallel
    counts = others * (1 + layer.experts / run.parallel)
    return TRIPS * rows * layer.dim * run.wire_bytes + 2 * pairs * 8 + counts * 8


def all_to_all(sent: float, parallel: int, machine: Machine, exchanges: int = 1) -> float:
    """Seconds in which a rank sends so many bytes, evenly to the P - 1 others, in several exchanges."""
    if parallel == 1:
        return 0.0
    near = min(parallel, machine.ranks_per_node) - 1
    far = parallel - 1 - near
    share = sent / (parallel - 1)
    latency = machine.between.latency if far else machine.inside.latency
    inside, between = near * share / machine.inside.bandwidth, far * share / machine.between.bandwidth
    return exchanges * latency + max(inside, between)


def all_reduce(size: float, ranks: int, machine: Machine, stride: int = 1) -> float:
    """Seconds in which R ranks add up so many bytes; every ``stride``-th rank takes part."""
    near = min(ranks, max(machine.ranks_per_node // stride, 1))
    far = math.ceil(ranks / near)
    seconds = 0.0
    for count, link, part in ((near, machine.inside, size), (far, machine.between, size / near)):
        ring = 2 * (count - 1) / count * part / link.bandwidth
        seconds += ring + 2 * math.ceil(math.log2(count)) * link.latency
    return seconds


def flop(layer: Layer, run: Run, phase: Phase) -> float:
    """FLOP of a rank in a step."""
    router = layer.router_parameters if phase.spawned else 0
    experts = phase.active * layer.matrices * layer.dim * layer.hidden
    return 6 * run.tokens * (experts + router)


def own_experts(layer: Layer, run: Run, phase: Phase) -> float:
    """Number of experts that a rank has, in the mean."""
    return layer.experts / run.parallel if phase.spawned else 1


def shared_parameters(layer: Layer, run: Run, phase: Phase) -> float:
    """Parameters of the layer that are on all ranks: the one expert, or the router and experts that are."""
    if not phase.spawned:
        return layer.expert_parameters
    return layer.router_parameters + (run.parallel == 1) * layer.experts * layer.expert_parameters


def reduce_experts(layer: Layer, run: Run, phase: Phase, machine: Machine) -> float:
    """Seconds to add up the gradients of experts over the ranks that have the same ones."""
    if not phase.spawned or run.parallel == 1:
        return 0.0
    size = own_experts(layer, run, phase) * layer.expert_parameters * run.gradient_bytes
    return all_reduce(size, run.ranks // run.parallel, machine, stride=run.parallel)


def layer_seconds(layer: Layer, run: Run, phase: Phase, machine: Machine) -> Seconds:
    """A step of one MoE layer."""
    sent = exchanged_bytes(layer, run, phase)
    shared = shared_parameters(layer, run, phase) * run.gradient_bytes
    return Seconds(
        compute=flop(layer, run, phase) / machine.flops,
        exchange=all_to_all(sent, run.parallel, machine, TRIPS + 1) if sent else 0.0,
        gradients=all_reduce(shared, run.ranks, machine) + reduce_experts(layer, run, phase, machine),
    )


def hidden_share(layer: Layer, run: Run, phase: Phase, machine: Machine) -> float:
    """The part of the exchange that an always-on expert of the same width hides (``--moe-shared-expert``).

    It is computed while the rows go out, and its gradients while those of the outputs do: half of the trips
    at most.
    """
    exchange = layer_seconds(layer, run, phase, machine).exchange
    if not exchange:
        return 0.0
    forward = 2 * run.tokens * layer.matrices * layer.dim * layer.hidden / machine.flops
    trip = all_to_all(exchanged_bytes(layer, run, phase), run.parallel, machine) / TRIPS
    return (min(trip, forward) + min(trip, 2 * forward)) / exchange


@dataclass(frozen=True)
class Model:
    """A Transformer decoder: every ``freq``-th of its layers has experts, the others a dense FFN.

    Attributes:
        layers: L.
        freq: of them have experts.
        vocabulary: V, of embeddings that are the output's too.
        sequence: tokens that a token attends to.
    """

    moe: Layer
    layers: int
    freq: int
    vocabulary: int
    sequence: int

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts."""
        return self.layers // self.freq

    @property
    def other_parameters(self) -> int:
        """Weights of all that is on every rank at all times: attention, dense layers, embeddings."""
        dim, dense = self.moe.dim, self.layers - self.moe_layers
        ffn = self.moe.matrices * dim * self.moe.hidden
        return self.layers * 4 * dim**2 + dense * ffn + self.vocabulary * dim

    def parameters(self, run: Run, phase: Phase) -> float:
        """Parameters of a rank."""
        experts = own_experts(self.moe, run, phase) * self.moe.expert_parameters
        router = self.moe.router_parameters if phase.spawned else 0
        return self.other_parameters + self.moe_layers * (experts + router)


def model_seconds(model: Model, run: Run, phase: Phase, machine: Machine) -> Seconds:
    """A step of a whole model: all gradients that all ranks have are added up in one all-reduce."""
    layer = layer_seconds(model.moe, run, phase, machine)
    attention = 12 * model.layers * model.sequence * model.moe.dim
    others = run.tokens * (6 * model.other_parameters + attention) / machine.flops
    shared = model.other_parameters + model.moe_layers * shared_parameters(model.moe, run, phase)
    experts = reduce_experts(model.moe, run, phase, machine)
    return Seconds(
        compute=model.moe_layers * layer.compute + others,
        exchange=model.moe_layers * layer.exchange,
        gradients=all_reduce(shared * run.gradient_bytes, run.ranks, machine) + model.moe_layers * experts,
    )


def check(path: Path) -> str:
    """The model beside what ``ranks.py`` measured, the least values, with the figures fitted there."""
    first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    fits = {row["ranks"]: row["fit"] for row in rows if "fit" in row}
    lines = []
    for row in rows:
        if "case" not in row:
            continue
        ranks, case, size, found = row["ranks"], row["case"], row["size"], row["least"]
        fitted = fits[ranks]
        link = Link(fitted.get("bandwidth", math.inf), fitted.get("latency", 0.0))
        machine = Machine(fitted["flops"], link, link, ranks)
        layer = Layer(size["dim"], size["hidden"], row["experts"])
        run = Run(ranks, ranks, size["tokens"], wire_bytes=4, gradient_bytes=4)
        phase = Phase(case["name"], case["active"], spawned=case["router"] is not None)
        seconds = layer_seconds(layer, run, phase, machine)
        waiting = max(ranks / first["machine"]["cores"] - 1, 0) * seconds.compute  # for a core
        figures = [
            (seconds.compute, found["compute_cpu"]),
            (seconds.exchange, found["exchange"]),
            (seconds.gradients, found["gradients"]),
            (seconds.step + waiting, found["step"]),
        ]
        sent = exchanged_bytes(layer, run, phase) / 1e6
        lines.append(
            [
                f"{ranks}, {phase.name}",
                beside(sent, row["sent_bytes"] / 1e6, "{:.2f}"),
                *(beside(1000 * model, 1000 * measured, "{:.1f}") for model, measured in figures),
            ]
        )
    head = ["ranks, stage", "MB sent", "compute (CPU), ms", "exchange, ms", "gradients, ms", "step, ms"]
    return "Model / measured (ratio)\n\n" + table(head, lines)


def beside(expected: float, found: float, form: str) -> str:
    """Two figures and their ratio."""
    if not expected or not found:
        return "-"
    return f"{form.format(expected)} / {form.format(found)} ({expected / found:.2f})"


def by_ranks(model: Model, runs: list[Run], machine: Machine) -> str:
    """Steps of the phases on numbers of ranks, also in units of a top-1 step."""
    head = [
        "GPUs",
        "P",
        "stage",
        "MB sent, a layer",
        "compute",
        "exchange",
        "gradients",
        "step",
        "of top-1's",
    ]
    head += ["exchange's share of it", "of which can hide"]
    lines = []
    for run in runs:
        stages = phases(model.moe.experts)
        top1 = model_seconds(model, run, stages[-1], machine).step
        for phase in stages:
            s = model_seconds(model, run, phase, machine)
            lines.append(
                [
                    str(run.ranks),
                    str(run.parallel),
                    phase.name,
                    f"{exchanged_bytes(model.moe, run, phase) / 1e6:.0f}",
                    *(f"{1000 * t:.1f}" for t in (s.compute, s.exchange, s.gradients, s.step)),
                    f"{s.step / top1:.2f}",
                    f"{s.exchange / s.step:.0%}",
                    f"{hidden_share(model.moe, run, phase, machine):.0%}" if s.exchange else "-",
                ]
            )
    return table(head, lines)


def shares(layer: Layer, run: Run) -> list[int]:
    """The numbers of ranks that can share the experts out evenly."""
    return [p for p in range(1, layer.experts + 1) if layer.experts % p == 0 == run.ranks % p]


def by_parallel(model: Model, run: Run, machine: Machine) -> str:
    """What sharing experts out changes once they are there, for one number of ranks."""
    head = ["P", "GB of a rank", "MB sent, a layer", "exchange, ms", "gradients, ms", "step, ms"]
    one, _, top1 = phases(model.moe.experts)
    lines = []
    parallels = shares(model.moe, run)
    for parallel, phase in [(parallels[-1], one)] + [(parallel, top1) for parallel in parallels]:
        here = replace(run, parallel=parallel)
        seconds = model_seconds(model, here, phase, machine)
        lines.append(
            [
                f"{parallel}, {phase.name}" if phase.spawned else "any, one expert",
                f"{BYTES_OF_PARAMETER * model.parameters(here, phase) / 1e9:.1f}",
                f"{exchanged_bytes(model.moe, here, phase) / 1e6:.0f}",
                *(f"{1000 * s:.1f}" for s in (seconds.exchange, seconds.gradients, seconds.step)),
            ]
        )
    return table(head, lines)


def plot(model: Model, run: Run, machine: Machine, path: Path) -> None:
    """What the number of a token's experts, which falls in the soft stage, changes; needs matplotlib."""
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "evomoe", "svg.fonttype": "none", "font.size": 9})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    layer, stages = model.moe, [Phase("grown", k) for k in range(1, model.moe.experts + 1)]
    active = [stage.active for stage in stages]
    for parallel in shares(layer, run)[1:]:
        here = replace(run, parallel=parallel)
        sent = [exchanged_bytes(layer, here, stage) / 1e6 for stage in stages]
        left.plot(active, sent, label=f"P = {parallel}")
    left.set(xlabel="active experts of a token", ylabel="MB that a rank sends, a layer", ylim=(0, None))
    left.legend(frameon=False)

    steps = [model_seconds(model, run, stage, machine) for stage in stages]
    parts = [[1000 * getattr(step, part) for step in steps] for part in ("compute", "exchange", "gradients")]
    right.stackplot(active, parts, labels=["compute", "exchange of tokens", "sum of gradients"])
    one = model_seconds(model, run, phases(layer.experts)[0], machine)
    right.plot([1], [1000 * one.step], "ko", ms=4, label="one expert, before the spawn")
    title = f"{run.ranks} GPUs, P = {run.parallel}"
    right.set(title=title, xlabel="active experts of a token", ylabel="ms of a step", xlim=(0.5, None))
    right.legend(frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", type=Path, metavar="JSONL", help="compare with what ranks.py wrote, and nothing else")
    add("--plot", type=Path, metavar="SVG", help="draw what active experts change")
    assumed = parser.add_argument_group("assumptions about the machine")
    add = assumed.add_argument
    add("--flops", type=float, default=400e12 * 0.4, help="FLOP/s that a GPU reaches (default: %(default)g)")
    add("--ranks-per-node", type=int, default=8, help="GPUs of a node (default: %(default)s)")
    add("--inside", type=float, default=450e9, help="B/s of a GPU inside a node (default: %(default)g)")
    add("--between", type=float, default=50e9, help="B/s of a GPU between nodes (default: %(default)g)")
    add("--latency", type=float, default=20e-6, help="seconds of an exchange (default: %(default)g)")
    chosen = parser.add_argument_group("the model and how it is trained")
    add = chosen.add_argument
    add("--gpus", type=int, nargs="+", default=[8, 64, 256, 1024], help="numbers of GPUs")
    add("--experts", type=int, default=16, help="of a layer (default: %(default)s)")
    add("--parallel", type=int, help="P; as many GPUs as share the experts (default: an expert on each)")
    add("--tokens", type=int, default=8192, help="of a GPU in an update (default: %(default)s)")
    add("--dim", type=int, default=1024, help="width of a token (default: %(default)s)")
    add("--hidden", type=int, default=4096, help="hidden units of an expert (default: %(default)s)")
    add("--layers", type=int, default=24, help="of the model (default: %(default)s)")
    add("--freq", type=int, default=2, help="one of how many layers has experts (default: %(default)s)")
    add("--vocabulary", type=int, default=50000, help="(default: %(default)s)")
    add("--sequence", type=int, default=1024, help="tokens of a sequence (default: %(default)s)")
    add("--bytes", type=int, default=2, help="of a number on the way and of gradients (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.check:
        print(check(args.check))
        return
    inside, between = Link(args.inside, args.latency), Link(args.between, args.latency)
    machine = Machine(args.flops, inside, between, args.ranks_per_node)
    layer = Layer(args.dim, args.hidden, args.experts)
    model = Model(layer, args.layers, args.freq, args.vocabulary, args.sequence)
    runs = []
    for ranks in args.gpus:
        parallel = args.parallel or math.gcd(ranks, args.experts)
        runs.append(Run(ranks, parallel, args.tokens, args.bytes, args.bytes))
    print("A model, not a measurement. Milliseconds of a step of the whole model:\n")
    print(by_ranks(model, runs, machine))
    middle = runs[min(1, len(runs) - 1)]
    print(f"\n{middle.ranks} GPUs by P\n\n{by_parallel(model, middle, machine)}")
    if args.plot:
        plot(model, middle, machine, args.plot)


if __name__ == "__main__":
    main()
