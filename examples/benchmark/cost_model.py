#!/usr/bin/env python3
"""Estimate what a training step costs on many ranks.  This is a model, not a measurement.

    python examples/benchmark/cost_model.py                                # 8 to 1024 GPUs, assumed figures
    python examples/benchmark/cost_model.py --check results/ranks.jsonl    # against what ranks.py measured

The formulas are in fairseq_evomoe/evolution/cost.py.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "systems"))

import json_lines
from labels import label_lines
from report import table

# the file alone: the package around it imports fairseq and PyTorch, which this does not need
sys.path.append(str(Path(__file__).resolve().parents[2] / "fairseq_evomoe" / "evolution"))

from cost import (
    BYTES_OF_PARAMETER,
    Layer,
    Link,
    Machine,
    Model,
    Phase,
    Run,
    exchanged_bytes,
    hidden_share,
    layer_seconds,
    model_seconds,
)


def phases(experts: int) -> list[Phase]:
    """The three of EvoMoE; the second one is the start of the Dense-To-Sparse gate."""
    return [Phase("one expert", 1, spawned=False), Phase("all experts", experts), Phase("top-1", 1)]


def check(path: Path) -> str:
    """The model beside what ``ranks.py`` measured, the least values, with the figures fitted there."""
    lines = json_lines.read(path)
    if not lines:
        sys.exit(
            f"cost_model.py: {path} has no lines: give --check the ranks.jsonl that ranks.py --out makes."
        )
    first, *rows = lines
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

    steps = [model_seconds(model, run, stage, machine) for stage in stages]
    parts = {"compute": "compute", "exchange": "exchange of tokens", "gradients": "sum of gradients"}
    bottom = [0.0] * len(steps)
    for part, label in parts.items():
        top = [below + 1000 * getattr(step, part) for below, step in zip(bottom, steps)]
        area = right.fill_between(active, bottom, top)
        middle = [(below + above) / 2 for below, above in zip(bottom, top)]
        # nothing that is seen: the line in the middle of the area is where its name belongs
        right.plot(active, middle, alpha=0, color=area.get_facecolor()[0], label=label)
        bottom = top
    one = model_seconds(model, run, phases(layer.experts)[0], machine)
    right.plot([1], [1000 * one.step], "ko", ms=4)
    right.annotate(
        "one expert, before\nthe spawn",
        (1, 1000 * one.step),
        (0.7, 0.8 * bottom[-1]),
        arrowprops={"arrowstyle": "-", "linewidth": 0.6},
    )
    title = f"{run.ranks} GPUs, P = {run.parallel}"
    right.set(
        title=title,
        xlabel="active experts of a token",
        ylabel="ms of a step",
        xlim=(0.5, None),
        ylim=(0, None),
    )
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        label_lines(axis, size=9)
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
