"""``evomoe presets``: what presets there are, and what one means for a model of given sizes.

Arguments are parsed before torch is imported, and fairseq is not imported at all.
"""

import argparse
import math
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Iterator, List, Optional, Sequence, Tuple

if TYPE_CHECKING:
    from .config import MoEConfig
    from .presets import Preset

Row = Tuple[str, ...]


def presets(arguments: Optional[Sequence[str]] = None) -> None:
    """``evomoe presets``: list the presets, or print what one resolves to."""
    parser = _parser()
    args = parser.parse_args(arguments)

    from ..moe.options import OptionError
    from .errors import ConfigError, as_flags

    try:
        print(listing() if args.name is None else described(args.name, _sizes(args)))
    except (OptionError, ConfigError) as error:
        parser.exit(2, f"{parser.prog}: {as_flags(str(error))}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evomoe presets",
        description="List the presets of --moe-preset, or print what one means for a model of these sizes.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a preset, or the path of a YAML file")
    parser.add_argument(
        "--experts",
        type=int,
        metavar="N",
        help="--moe-experts; that of the preset, or else 16, if not given",
    )
    parser.add_argument(
        "--ffn-dim",
        type=int,
        default=2048,
        metavar="D",
        help="hidden units of the model's feed-forward networks (2048)",
    )
    parser.add_argument(
        "--max-update", type=int, default=100000, metavar="U", help="length of the run; 0: no limit (100000)"
    )
    return parser


@dataclass(frozen=True)
class Sizes:
    """What a preset is resolved for.

    Attributes:
        experts: E; ``None``: what the preset says, or else 16.
        ffn_dim: hidden units of the feed-forward networks that become base experts.
        max_update: length of the run; 0: no limit.
    """

    experts: Optional[int] = None
    ffn_dim: int = 2048
    max_update: int = 100000

    def resolve(self, check: bool = True, **given: Any) -> "MoEConfig":
        """What options mean for these sizes.

        Args:
            check: whether they must go with each other.
            given: options by their flat names.

        Raises:
            ConfigError: contradictions.
        """
        from .resolve import resolve

        given = {"experts": self.experts, **given}
        return resolve(given, ffn_dims=[self.ffn_dim], max_update=self.max_update, check=check)


def _sizes(args: argparse.Namespace) -> Sizes:
    from ..moe.options import OptionError

    for flag, value, least in (("--ffn-dim", args.ffn_dim, 1), ("--max-update", args.max_update, 0)):
        if value < least:
            raise OptionError(flag, f"{flag} must be at least {least}, but is {value}.")
    return Sizes(args.experts, args.ffn_dim, args.max_update)


def listing() -> str:
    """All presets, a line each."""
    from .presets import load, names

    found = [load(name) for name in names()]
    rows: List[Row] = [("preset", "system", "paper")]
    rows += [(preset.id, preset.name, preset.paper) for preset in found]
    text = "--moe-preset NAME gives a model the options of a system; flags override them."
    return f"{text}\n\n{table(rows)}\n\nevomoe presets NAME prints what one means."


def described(name: str, sizes: Sizes) -> str:
    """What a preset is, what its stages and experts are for these sizes, and all its options.

    Raises:
        OptionError: there is no such preset.
        ConfigError: it does not go with these sizes.
    """
    from . import rules
    from .errors import PREFIX, flag
    from .presets import load

    preset = load(name)
    config = sizes.resolve(preset=name)
    default = sizes.resolve(check=False, router=config.router).flat()
    values = {option: value for option, value in config.flat().items() if option != "preset"}
    for _, idle in rules.idle(replace(config, given=frozenset(values))):
        values = {option: value for option, value in values.items() if option not in idle}
    differing: List[Row] = [
        (flag(PREFIX + option), _word(value), f"default {_word(default[option])}")
        for option, value in values.items()
        if value != default[option]
    ]
    if config.router != "dts":
        differing.insert(0, (flag("moe_router"), config.router, "default dts"))
    everything: List[Row] = [(flag(PREFIX + option), _word(value)) for option, value in values.items()]
    length = f"{sizes.max_update} updates" if sizes.max_update else "no limit of updates"
    parts = [
        table([("preset", preset.id), *_about(preset)]),
        f"With ffn-embed-dim {sizes.ffn_dim} and {length}:\n{table(list(_meaning(preset, config, sizes)))}",
        f"Options that are not defaults of the router:\n{table(differing) or '(none)'}",
        f"All options, but for those that have no effect:\n{table(everything)}",
    ]
    return "\n\n".join(parts)


def _about(preset: "Preset") -> Iterator[Row]:
    yield "system", preset.name
    yield "paper", preset.paper
    if preset.differs:
        yield "differs", preset.differs
    for task, reason in preset.not_for.items():
        yield f"not for {task}", reason


def _meaning(preset: "Preset", config: "MoEConfig", sizes: Sizes) -> Iterator[Row]:
    """Experts, stages and losses in words."""
    widths = config.widths(sizes.ffn_dim)
    if len(set(widths)) == 1:
        yield "experts", f"{config.experts}, each of {widths[0]} hidden units"
    else:
        yield "experts", f"{config.experts}, of {', '.join(map(str, widths))} hidden units"
    if preset.dense_updates:
        yield "before", f"a dense model trains for {preset.dense_updates} of the updates"
    yield "spawn", _spawn(config)
    if config.experts > 1:
        yield from _stages(config)
    weights = [f"{name} {weight:g}" for name, weight in config.loss_weights().items() if weight > 0]
    yield "losses", ", ".join(weights) or "none"


def _spawn(config: "MoEConfig") -> str:
    method = getattr(config.spawning.spawn_method, "value", "")
    if config.experts == 1:
        return "never"
    if len(config.stages) > 1:
        when = [str(update) for update in config.latest_spawns]
        when = [f"a plateau, or else {update}" if config.spawns_by_itself else update for update in when]
        numbers = [f"{stage.experts} before update {update}" for stage, update in zip(config.stages, when)]
        return f"{', '.join(numbers)}, by {method}"
    if config.spawns_by_itself:
        latest = f", or else before update {config.latest_spawn}" if config.max_update else ""
        return f"at a plateau of the training loss{latest}, by {method}"
    if config.latest_spawn == 0:
        return f"experts from the start; those made of a dense checkpoint, by {method}"
    return f"before update {config.latest_spawn}, by {method}"


def _stages(config: "MoEConfig") -> Iterator[Row]:
    schedule, router = config.make_schedule(), config.router_class
    restarts = schedule.restarts and len(config.stages) > 1

    def when(update: float) -> str:
        if config.spawns_by_itself or restarts:
            return f"{update:g} updates after {'each' if restarts else 'the'} spawn"
        update += config.latest_spawn
        late = 0 < config.max_update < update
        return f"update {update:.0f}{' (after the end of the run)' if late else ''}"

    hard = schedule.hard_after
    if router.anneals:
        if hard > 0:
            fall = f"{schedule.temperature_start:g} to {schedule.temperature_end:g}, {schedule.kind.value}"
            yield "soft gate", f"from {when(0)}; temperature {fall}, until {when(schedule.anneal_updates)}"
        experts = getattr(config.router_options, "hard_experts", 1)
        evaluated = getattr(config.router_options, "eval_routing", None) == "top1"
        never = "in evaluation only" if evaluated else "never"
        yield f"top-{experts}", never if math.isinf(hard) else f"from {when(hard)}"
    elif router.stages:
        yield "frozen", f"from {when(hard)}"


def _word(value: Any) -> str:
    if value is None:
        return "(none)"
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(rows: Sequence[Row]) -> str:
    """Rows in columns; the last one is wrapped to a line of 100 characters.  Nothing, of no rows."""
    if not rows:
        return ""
    lengths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows))]
    indent = sum(length + 2 for length in lengths)
    lines = []
    for row in rows:
        head = "".join(cell.ljust(length + 2) for cell, length in zip(row, lengths))
        text = textwrap.wrap(row[-1], max(100 - indent, 30)) or [""]
        lines.append((head + ("\n" + " " * indent).join(text)).rstrip())
    return "\n".join(lines)
