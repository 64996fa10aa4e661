"""Flat options, most of them not given, become one typed configuration without contradictions.

In this order: what a preset says, what was given over it, percentages as updates, what is decided by other
options, the ranges of all, and what they have against each other.  All contradictions are reported together.
"""

import logging
import re
from dataclasses import replace
from enum import Enum
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type

from ..evolution import stages
from ..evolution.spawn import SpawnMethod
from ..moe.options import Declaration, OptionError, Options
from ..moe.routers import ROUTERS, StratifiedRouter
from . import legacy, presets, rules
from .config import GROUPS, MoEConfig, declarations, owner, routers_with, unknown_router
from .errors import PREFIX, ConfigError, as_flags, flag

logger = logging.getLogger(__name__)


def resolve(
    given: Mapping[str, Any],
    *,
    experts: int = 16,
    masked: bool = False,
    ffn_dims: Sequence[int] = (),
    seed: int = 1,
    max_update: int = 0,
    model: Any = None,
    check: bool = True,
) -> MoEConfig:
    """Decide everything that the options leave open.

    Args:
        given: options by their flat names, without ``moe_``; ``None``: not given.
        experts: the number of experts of the model by default.
        masked: whether the model is a masked LM, where ``auto`` of old checkpoints means something else.
        ffn_dims: hidden units of the feed-forward networks that become base experts, if known.
        seed: of the spawn.
        max_update: length of the run; 0: no limit.
        model: fairseq's configuration of the model, to find options of its own that experts do not go with.
        check: whether options must go with each other, which defaults alone need not.

    Raises:
        ConfigError: all contradictions that were found.
    """
    options = {name: _plain(value) for name, value in given.items() if value is not None}
    named = frozenset(options)
    errors: List[OptionError] = list(rules.unsupported(model)) if model is not None else []
    options = legacy.understood(options, masked)
    preset = options.pop("preset", None)
    try:
        from_preset = {} if preset is None or _resolved(options) else _options_of(preset)
    except OptionError as error:
        raise ConfigError([*errors, error]) from error
    router = str(options.get("router", from_preset.get("router", "dts")))
    if router not in ROUTERS:
        raise ConfigError([*errors, unknown_router(router)])
    if router != from_preset.get("router", "dts"):  # another one was given over the preset's
        from_preset = _known_to(router, from_preset)
    values = {**from_preset, **options}
    values.pop("router", None)
    values.setdefault("experts", stages.last_experts(values.get("spawn_update")) or experts)
    errors += _without_effect(values, router, from_preset)
    values, counted = _count_durations(values, max_update)
    errors += counted

    parts: Dict[str, Any] = {}
    groups: Dict[str, Type[Options]] = {**GROUPS, "router_options": ROUTERS[router].Options}
    for name, cls in groups.items():
        parts[name], found = _make(cls, values)
        errors += found
    config = MoEConfig(router=router, preset=preset, seed=seed, max_update=max_update, given=named, **parts)
    config = _decide(config, values, ffn_dims)
    if check and not errors:  # ranges first: what follows computes with the values
        errors += rules.contradictions(config)
        errors += rules.widths(config, list(ffn_dims)) if not errors else []
    if errors:
        raise ConfigError(errors)
    return config


# options that ``write_back`` always writes, so many that nobody gives all of them
_WRITTEN = ("experts", "freq", "heads", "spawn_update", "spawn_method", "hard_update", "a2a_dtype", "lsh_dim")


def _resolved(options: Mapping[str, Any]) -> bool:
    """Whether the options are those of a resolved configuration, such as a checkpoint's.

    They say what a preset said then, whether it has changed since or its file is somewhere else.
    """
    return all(name in options for name in _WRITTEN)


def _options_of(preset: str) -> Dict[str, Any]:
    """What a preset gives; names may be written with ``moe_`` or without.

    Raises:
        OptionError: there is no such preset.
    """
    options = presets.load(preset).options
    return {
        (name[len(PREFIX) :] if name.startswith(PREFIX) else name): value
        for name, value in options.items()
        if value is not None
    }


def _known_to(router: str, options: Mapping[str, Any]) -> Dict[str, Any]:
    """Those options that are not of other routers alone."""
    return {
        name: value
        for name, value in options.items()
        if owner(name) or router in routers_with(name) or not routers_with(name)
    }


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _make(cls: type, values: Mapping[str, Any]) -> Tuple[Any, List[OptionError]]:
    """A group of options out of all values, with defaults in place of those that it cannot have."""
    kept, errors = {}, []
    for name, declaration in cls.declared().items():  # type: ignore[attr-defined]
        if name not in values:
            continue
        try:
            kept[name] = declaration.convert(values[name])
        except OptionError as error:
            errors.append(error)
    return cls.given(kept), errors  # type: ignore[attr-defined]


def _without_effect(
    values: Mapping[str, Any], router: str, from_preset: Mapping[str, Any]
) -> Iterable[OptionError]:
    """Options that there are not, or that other routers have, whatever their value is."""
    known = declarations()
    for name, value in values.items():
        if name not in known and name in from_preset:
            yield OptionError("preset", f"`preset` has {name}, which is no option: leave it out.")
        elif name not in known:
            yield OptionError(name, f"`{name}` is no option: leave it out.")
        elif owner(name) is None and router not in routers_with(name):
            if known[name][0].loss and str(value) in ("0", "0.0"):
                continue  # that there is no such loss is true
            others = ", ".join(routers_with(name))
            yield OptionError(
                name,
                f"`{name}` {value} has no effect with `router` {router}: leave it out or choose one of the "
                f"routers {others}.",
            )


def _count_durations(values: Mapping[str, Any], max_update: int) -> Tuple[Dict[str, Any], List[OptionError]]:
    """Percentages of the run as updates."""
    result, errors = dict(values), []
    for name, declared in declarations().items():
        if name in result and declared[0].duration:
            try:
                result[name] = _count_stages(declared[0], values, max_update)
            except OptionError as error:
                errors.append(error)
                del result[name]
    return result, errors


def _count_stages(declaration: Declaration, values: Mapping[str, Any], max_update: int) -> Any:
    """A duration in updates, or a list of stages in updates and experts."""
    value = values[declaration.name]
    if not (declaration.stages and stages.is_list(value)):
        return count(declaration, value, max_update)
    experts = declarations()["experts"][0].convert(values["experts"])
    return stages.counted(value, lambda moment: count(declaration, moment, max_update), experts)


def count(declaration: Declaration, value: Any, max_update: int) -> Any:
    """A duration in updates: ``10%`` is a tenth of ``max_update``, at least one; anything else is what it is.

    Raises:
        OptionError: a percentage of a run without a length, or of more than 100.
    """
    match = re.fullmatch(r"(\d*\.?\d+)\s*%", str(value).strip())
    if match is None:
        return value
    share = float(match.group(1)) / 100
    name = declaration.name
    if share > 1:
        raise OptionError(name, f"`{name}` is {value}, more than the whole run: give at most 100%.")
    if max_update <= 0:
        raise OptionError(
            name,
            f"`{name}` {value} is a percentage of --max-update, which is not given: give it, or a number.",
        )
    return max(round(share * max_update), 1) if share > 0 else 0


def _decide(config: MoEConfig, values: Mapping[str, Any], ffn_dims: Sequence[int]) -> MoEConfig:
    """What is not given and depends on other options."""
    schedule, spawning, plateau = config.schedule, config.spawning, config.plateau
    if schedule.spawn_update is None:
        schedule = replace(schedule, spawn_update=_spawn_update(config))
    if schedule.hard_update is None:
        schedule = replace(schedule, hard_update=round(1.2 * schedule.anneal_updates))
    if spawning.spawn_method is None:
        spawning = replace(spawning, spawn_method=_spawn_method(config, ffn_dims))
    config = replace(config, schedule=schedule, spawning=spawning)
    made = config.make_plateau()
    if made is not None and plateau.spawn_window is None:
        config = replace(config, plateau=replace(plateau, spawn_window=made.window))
    router_options = config.router_options
    # with several stages, each has halves of its own
    if isinstance(router_options, StratifiedRouter.Options) and len(config.stages) == 1:
        if router_options.strata is None:
            sizes = ",".join(map(str, router_options.sizes(config.experts)))
            config = replace(config, router_options=replace(router_options, strata=sizes))
    if getattr(router_options, "stable_update", 0) is None and config.max_update > 0:
        if not config.spawns_by_itself:
            update = int(config.stable_update(config.latest_spawns[-1]))
            config = replace(config, router_options=replace(router_options, **{"stable_update": update}))
    return config


def _spawn_update(config: MoEConfig) -> Any:
    """EvoMoE's expert learns alone for a tenth of the run; its rivals have theirs from the start."""
    if not config.router_class.anneals or config.experts == 1 or config.max_update == 1:
        return 0
    return max(round(0.1 * config.max_update), 1) if config.max_update > 0 else "auto"


def _spawn_method(config: MoEConfig, ffn_dims: Sequence[int]) -> SpawnMethod:
    """Experts as wide as the base are masked copies of it, and others are slices."""
    equal = config.sizes.expert_sizes == "uniform" and config.sizes.total_ffn_dim is None
    if ffn_dims:
        try:
            equal = all(config.widths(dim) == [dim] * config.experts for dim in ffn_dims)
        except OptionError:  # is reported with the others
            equal = True
    return SpawnMethod.mask if equal else SpawnMethod.slice


def given_options(cfg: Any) -> Dict[str, Any]:
    """The options that a configuration of fairseq's has, without ``moe_``; those not given are ``None``."""
    names = ["preset", "router", *declarations()]
    return {name: getattr(cfg, PREFIX + name, None) for name in names}


def write_back(cfg: Any, config: MoEConfig) -> None:
    """Let a configuration of fairseq's say what was decided, so that a checkpoint says what was meant.

    Options of other routers stay ``None``.

    Args:
        cfg: of the model; changed in place.
        config: what its options were resolved to.
    """
    for name, value in config.flat().items():
        setattr(cfg, PREFIX + name, value)


def warn_of_idle_options(config: MoEConfig) -> None:
    """Warn of options that were given for stages that do not come, and of a gate that learns nothing."""
    line = rules.gate_that_learns_nothing(config)
    if line is not None:
        logger.warning(as_flags(line))
    for where, found in rules.idle(config):
        logger.warning(f"no effect {as_flags(where)}: {', '.join(flag(PREFIX + name) for name in found)}")


FORMER = ("gate_input", "renormalize", "gate_noise", "spawn_update")


def former_defaults(config: MoEConfig) -> Optional[str]:
    """A line for command lines that relied on defaults of versions before 0.2; ``None`` if none did."""
    relied = [name for name in FORMER if name not in config.given]
    if config.router != "dts" or config.preset is not None or not relied:
        return None
    flags = ", ".join(flag(PREFIX + name) for name in relied)
    return (
        f"EvoMoE as published, which is the default since version 0.2, decides {flags}; the former defaults "
        "are --moe-preset evomoe_table (evomoe_context in a masked LM)"
    )


__all__ = ["ConfigError", "Options", "given_options", "resolve", "warn_of_idle_options", "write_back"]
