"""``evomoe plan``: what schedules of spawns cost beside a number of experts that is there from the start."""

import argparse
import contextlib
import logging
import platform
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from fairseq.data import Dictionary

from ..checkpoints.files import CommandError
from ..config.config import MoEConfig
from ..config.errors import ConfigError
from ..evolution import budget
from ..evolution.budget import Stage, Step
from ..evolution.cost import (
    BYTES_OF_PARAMETER,
    Link,
    Machine,
    Phase,
    Run,
    all_reduce,
    all_to_all,
    exchanged_bytes,
    reduce_experts,
)
from .calibration import Configured, Measured, Sizes, configured, measure, temporary_data

ROUNDS = 2
"""Times that each number of experts is timed, in turn, so that a busy moment is not one number's alone."""


class Schedule(NamedTuple):
    """A way to reach all experts.

    Attributes:
        name: as it is written with ``--moe-spawn-update``.
        stages: of the run.
    """

    name: str
    stages: List[Stage]


class Case(NamedTuple):
    """What is timed.

    Attributes:
        experts: of a layer.
        here: those of them that a rank has.
        soft: whether the gate is soft.
    """

    experts: int
    here: int = 1
    soft: bool = False


def plan(args: argparse.Namespace) -> None:
    """Carry out the command: measure, and print two tables."""
    _check(args)
    sizes = Sizes(args.layers, args.dim, args.ffn_dim, args.vocabulary, args.tokens, args.sequence)
    with temporary_data(sizes, updates=256) as folder:
        flags = _flags(args, sizes.flags(Path(folder)))
        with _silent(logging.INFO), _refusals():
            whole = configured([*flags, "--moe-spawn-update", "0"])
            schedules = list(_schedules(args, flags, whole.config))
        with _silent(logging.WARNING), _refusals():  # each would come again with each number of experts
            measured = _measure(args, flags, schedules, whole)
    steps = {case: _step(args, case, found) for case, found in measured.items()}
    print(_heading(args))
    print(steps_table(measured, steps))
    print(schedules_table(schedules, lambda stage: steps[_case(args, stage)]))


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be, and fill in ``parallel`` if it is not given.

    Raises:
        CommandError: sizes that do not fit each other.
    """
    for name in (
        "experts",
        "max_update",
        "layers",
        "dim",
        "ffn_dim",
        "tokens",
        "sequence",
        "gpus",
        "ranks_per_node",
        "bandwidth",
        "inside",
        "bytes",
        "seconds",
    ):
        if getattr(args, name) <= 0:
            raise CommandError(f"`{name}` must be greater than 0, but is {getattr(args, name)}.")
    # beside the words, a dictionary has symbols of its own
    for name, least in (("experts", 2), ("vocabulary", len(Dictionary()) + 1), ("latency", 0)):
        if getattr(args, name) < least:
            raise CommandError(f"`{name}` must be at least {least}, but is {getattr(args, name)}.")
    if args.parallel is None:
        args.parallel = args.gpus if args.experts % args.gpus == 0 else 1
    if args.parallel < 1 or args.gpus % args.parallel or args.experts % args.parallel:
        raise CommandError(
            f"`parallel` {args.parallel} must divide `gpus` ({args.gpus}) and `experts` ({args.experts})."
        )


@contextlib.contextmanager
def _silent(level: int) -> Iterator[None]:
    """Nothing of this level or below is logged, and Hydra does not warn of itself."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Let what a training would refuse, or not find, be a sentence."""
    try:
        yield
    except ConfigError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise CommandError(
            f"The model cannot be timed ({text}): give files and folders as fairseq-train takes them."
        ) from error


def _flags(args: argparse.Namespace, own: List[str]) -> List[str]:
    """The flags of ``fairseq-train`` that are measured: those after ``--``, or those of the sizes given."""
    flags = list(args.train) or own
    if args.train and Path(flags[0]).name in ("fairseq-train", "fairseq-hydra-train"):
        flags = flags[1:]
    _load_this_copy(flags)
    if not torch.cuda.is_available() and "--cpu" not in flags:
        flags.append("--cpu")
    if args.preset:
        flags += ["--moe-preset", args.preset]
    return [*flags, "--max-update", str(args.max_update), "--moe-experts", str(args.experts)]


def _load_this_copy(flags: List[str]) -> None:
    """Have ``--user-dir`` name this very package, since fairseq loads no second one of that name.

    Raises:
        CommandError: it names another copy.
    """
    own = Path(__file__).resolve().parents[1]
    at = next((i for i, flag in enumerate(flags) if flag.split("=")[0] == "--user-dir"), None)
    if at is None:
        flags += ["--user-dir", str(own)]
        return
    joined = "=" in flags[at]
    given = Path(flags[at].split("=", 1)[1] if joined else "".join(flags[at + 1 : at + 2]))
    if given.name != own.name:  # a package of the user's own, which fairseq loads beside this one
        return
    if given.resolve() != own:
        raise CommandError(
            f"--user-dir {given} is another copy of {own.name} than that of this command: "
            f"give --user-dir {own}, or call {given}/bin/evomoe."
        )
    flags[at : at + 1 if joined else at + 2] = ["--user-dir", str(own)]


def _schedules(args: argparse.Namespace, flags: Sequence[str], whole: MoEConfig) -> Iterator[Schedule]:
    """All experts from the start, as a configuration has them, and each schedule of the arguments."""
    for text in ("0", *(args.spawn_update or _usual(args))):
        try:
            config = whole if text == "0" else configured([*flags, "--moe-spawn-update", text]).config
        except ConfigError:
            if args.spawn_update or ":" not in text:
                raise
            continue  # options that stages do not go with, of which nobody has asked for these
        spawns = _spawns(config, text)
        _check_ranks(args, spawns, text)
        schedule = config.make_schedule()
        soft = schedule.hard_after if config.router_class.anneals else 0
        stages = budget.stages(spawns, args.max_update, soft, schedule.restarts)
        yield Schedule("from the start" if text == "0" else text, stages)


def _usual(args: argparse.Namespace) -> Iterator[str]:
    """One stage and three, where no schedule is given."""
    yield "10%"
    few, some = max(args.experts // 16, args.parallel, 2), args.experts // 4
    if few < some < args.experts and some % few == 0 == args.experts % some:
        yield f"5%:{few},10%:{some},20%:{args.experts}"


def _spawns(config: MoEConfig, text: str) -> List[Tuple[int, int]]:
    """Updates before which experts spawn, and how many there are from then on."""
    spawns = [(stage.update, stage.experts) for stage in config.stages]
    if any(update is None for update, _ in spawns):
        raise CommandError(
            f"`spawn_update` {text} waits for a plateau, whose update nobody knows: give updates."
        )
    return [(update, experts) for update, experts in spawns if update is not None]


def _check_ranks(args: argparse.Namespace, spawns: Sequence[Tuple[int, int]], text: str) -> None:
    if spawns[0][1] < args.parallel:
        raise CommandError(
            f"`spawn_update` {text} has {spawns[0][1]} experts at first, fewer than the `parallel` "
            f"{args.parallel} GPUs that share them: lower that."
        )


def _case(args: argparse.Namespace, stage: Stage) -> Case:
    """What is timed for a stage: the experts that one of P ranks has."""
    if stage.experts == 1:
        return Case(1)
    return Case(stage.experts, -(-stage.experts // args.parallel), stage.soft)


def _measure(
    args: argparse.Namespace, flags: Sequence[str], schedules: Sequence[Schedule], whole: Configured
) -> Dict[Case, Measured]:
    """Time each number of experts that any schedule has, in turns, each as wide as all of them are."""
    cases = sorted({_case(args, stage) for schedule in schedules for stage in schedule.stages})
    seconds = args.seconds / len(cases) / ROUNDS
    found: Dict[Case, Measured] = {}
    for number in range(ROUNDS):
        for case in cases:
            print(
                f"evomoe plan: timing {_name(case)} ({number + 1} of {ROUNDS})", file=sys.stderr, flush=True
            )
            here = _measure_case(case, [*flags, *_case_flags(case, args.max_update)], whole, seconds)
            before = found[case].seconds if case in found else []
            found[case] = replace(here, seconds=before + here.seconds)
    return found


def _measure_case(case: Case, flags: Sequence[str], whole: Configured, seconds: float) -> Measured:
    """Time the experts of a rank, or the fewest more that the options go with.

    Such as 2 where each rank has one, and a token has the best two of all: an update computes as many pairs
    of a token and an expert, whatever number of experts shares them.

    Raises:
        ConfigError: the options do not even go with those of all ranks.
    """
    if case.experts == 1:
        return measure(flags, seconds)

    def timed(experts: int) -> Measured:
        found = measure([*flags, *_experts_flags(experts, whole)], seconds)
        return replace(found, experts=found.experts * case.here // experts)

    if case.soft:  # each token may have all of them, wherever they are
        return timed(case.experts)
    for experts in range(max(case.here, 2), case.experts, case.here):  # a single one would have no gate
        with contextlib.suppress(ConfigError):
            return timed(experts)
    return timed(case.experts)


def _experts_flags(experts: int, whole: Configured) -> List[str]:
    """Flags for so many experts of those that the whole model has, each as wide as there."""
    config, flags = whole.config, ["--moe-experts", str(experts)]
    total = sum(config.widths(whole.ffn_dim))
    if experts == config.experts or total == config.experts * whole.ffn_dim:  # that is the default
        return flags
    return [*flags, "--moe-total-ffn-dim", str(total * experts // config.experts)]


def _case_flags(case: Case, max_update: int) -> List[str]:
    """Flags with which a run is in that stage from its first update on."""
    if case.experts == 1:
        return ["--moe-spawn-update", str(max_update - 1)]
    return ["--moe-spawn-update", "0", "--moe-hard-update", "-1" if case.soft else "0"]


def _step(args: argparse.Namespace, case: Case, found: Measured) -> Step:
    """What an update costs on the ranks that are asked for."""
    parameters = found.others + found.experts
    memory = BYTES_OF_PARAMETER * parameters
    if args.gpus == 1:
        return Step(found.median, memory)
    machine = Machine(
        1.0,
        Link(args.inside * 1e9, args.latency),
        Link(args.bandwidth * 1e9, args.latency),
        args.ranks_per_node,
    )
    run = Run(args.gpus, args.parallel, round(found.tokens), args.bytes, args.bytes)
    spawned = case.experts > 1
    phase = Phase(_name(case), max(round(found.active), 1), spawned)
    layers = [replace(layer, experts=case.experts) for layer in found.layers]
    sent = sum(exchanged_bytes(layer, run, phase) for layer in layers)
    exchange = sum(
        all_to_all(exchanged_bytes(layer, run, phase), args.parallel, machine, 5) for layer in layers
    )
    own = sum(reduce_experts(layer, run, phase, machine) for layer in layers)
    everywhere = found.others + (found.experts if args.parallel == 1 or not spawned else 0)
    gradients = own + all_reduce(everywhere * args.bytes, args.gpus, machine)
    return Step(found.median + (exchange if spawned else 0) + gradients, memory, sent)


def _name(case: Case) -> str:
    here = f", {case.here} on a rank" if case.here < case.experts else ""
    gate = ", soft gate" if case.soft else ""
    return f"{case.experts} expert{'s' if case.experts > 1 else ''}{here}{gate}"


def _heading(args: argparse.Namespace) -> str:
    """What was measured, where, and what was not."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    lines = [f"Medians of updates timed here ({device}, torch {torch.__version__}), one process."]
    if args.gpus > 1:
        lines.append(
            f"The exchange between {args.gpus} GPUs, {args.parallel} of which share the experts, is "
            f"estimated from {args.bandwidth:g} GB/s between nodes and {args.inside:g} GB/s inside."
        )
    lines.append(f"Memory is that of weights, gradients and Adam: {BYTES_OF_PARAMETER} bytes a parameter.")
    return "\n".join(lines) + "\n"


def steps_table(measured: Dict[Case, Measured], steps: Dict[Case, Step]) -> str:
    """What an update costs with each number of experts."""
    rows = [["a layer has", "s an update", "updates timed", "parameters", "memory, GB", "MB sent"]]
    for case, found in measured.items():
        step = steps[case]
        rows.append(
            [
                _name(case),
                f"{step.seconds:.3f}",
                str(len(found.seconds)),
                f"{found.experts + found.others:,}",
                f"{step.memory / 1e9:.3g}",
                f"{step.sent / 1e6:.3g}",
            ]
        )
    return _table(rows)


def schedules_table(schedules: Sequence[Schedule], step: Callable[[Stage], Step]) -> str:
    """What the run costs with each schedule, and as a share of the first one."""
    rows = [
        [
            "--moe-spawn-update",
            "hours",
            "of the first",
            "memory x time",
            "peak memory, GB",
            "GB sent",
            "of the first",
        ]
    ]
    costs = [budget.cost(schedule.stages, step) for schedule in schedules]
    first = costs[0]
    for schedule, cost in zip(schedules, costs):
        rows.append(
            [
                schedule.name,
                f"{cost.seconds / 3600:.3g}",
                f"{cost.seconds / first.seconds:.2f}",
                f"{cost.memory_seconds / first.memory_seconds:.2f}",
                f"{cost.peak_memory / 1e9:.3g}",
                f"{cost.sent / 1e9:.3g}",
                f"{cost.sent / first.sent:.2f}" if first.sent else "-",
            ]
        )
    return _table(rows)


def _table(rows: List[List[str]]) -> str:
    """Markdown, its columns padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
