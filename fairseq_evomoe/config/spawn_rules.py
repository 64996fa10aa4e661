"""Which options of the spawn contradict each other or others.

See ``rules.py``, which asks for these among all.
"""

from typing import Iterator

from ..evolution import stages
from ..evolution.selection import Select
from ..evolution.spawn import MAKE_GATE
from ..moe.gate_warmup import check_gate
from ..moe.options import OptionError
from .config import MoEConfig


def contradictions(config: MoEConfig) -> Iterator[OptionError]:
    """All that the options of the spawn and its stages have against each other and the rest."""
    yield from _stages(config)
    yield from _gate_warmup(config)
    yield from _rescale(config)


def _stages(config: MoEConfig) -> Iterator[OptionError]:
    """What several spawns, one after another, do not go with."""
    found = config.stages
    select = config.spawning.spawn_select
    even = select == Select.even and not config.router_class.resizes
    yield from stages.contradictions(found, config.experts, even)
    last = {error.args for error in config.router_options.contradictions(config.experts)}
    for stage in found[:-1]:
        for error in config.router_options.contradictions(stage.experts):
            if error.args not in last:
                yield error
    if len(found) == 1:
        return
    text = f"`spawn_update` {config.schedule.spawn_update}"
    if needs_linear_gate(config):
        yield OptionError(
            "spawn_method",
            f"`spawn_method` {method(config)} makes experts and a gate of the base expert alone, and {text} "
            f"has {len(found)} stages: give one stage, or another method.",
        )
    if getattr(config.router_options, "leaf_search", 0) > 0:
        yield OptionError(
            "leaf_search",
            f"`leaf_search` gives each leaf of a tree an expert, and with {text} leaves become nodes: leave "
            "it out, or give one stage.",
        )
    if select != Select.even and config.router_class.divides_itself:
        yield OptionError(
            "spawn_select",
            f"`router` {config.router} decides by itself which expert has how many children: leave "
            f"`spawn_select` {select.value} out.",
        )
    if select == Select.gradient and "experts" in config.frozen_parts:
        yield OptionError(
            "spawn_select",
            "`spawn_select` gradient measures gradients of experts, which have none with `freeze` experts: "
            "give `spawn_select` load, or leave one of them out.",
        )
    if select != Select.even and config.router_class.passes:
        yield OptionError(
            "spawn_select",
            f"The strata of `router` {config.router} grow alike, which `spawn_select` {select.value} would "
            "not let them: leave it out, or give one stage.",
        )
    if config.sizes.expert_sizes != "uniform":
        yield OptionError(
            "expert_sizes",
            f"Children are as wide as their parents, so that with {text} all experts have one width, and "
            f"`expert_sizes` is {config.sizes.expert_sizes}: leave it out, or give one stage.",
        )


def _gate_warmup(config: MoEConfig) -> Iterator[OptionError]:
    if config.schedule.gate_warmup == 0 or config.latest_spawn == 0:
        return
    try:
        check_gate(config.router_class)
    except OptionError as error:
        yield error
    text, how = f"`gate_warmup` {config.schedule.gate_warmup}", method(config)
    if "router" in config.frozen_parts:
        yield OptionError(
            "gate_warmup",
            f"{text} trains a gate, and `freeze` router leaves it as it is drawn: leave one of them out.",
        )
    if config.spawns_by_itself:
        yield OptionError(
            "gate_warmup",
            f"{text} counts back from the spawn, which nobody knows before with `spawn_update` auto: give "
            "`spawn_update` in updates, or leave `gate_warmup` out.",
        )
    if needs_linear_gate(config):
        yield OptionError(
            "gate_warmup",
            f"{text} trains a gate that `spawn_method` {how} would make anew: leave one of them out.",
        )


def _rescale(config: MoEConfig) -> Iterator[OptionError]:
    if not config.spawning.spawn_rescale or config.latest_spawn == 0:
        return
    if config.layer.shared_expert:
        yield OptionError(
            "spawn_rescale",
            "`spawn_rescale` lets experts that spawn give together what the base expert gave, and with "
            "`shared_expert` a copy of it goes on beside them: leave one of them out.",
        )
    if method(config) == "split":
        yield OptionError(
            "spawn_rescale",
            "`spawn_rescale` is for experts that each do what the base expert did, and `spawn_method` split "
            "divides it: leave one of them out.",
        )


def method(config: MoEConfig) -> str:
    """What is done to the copies of the base expert; empty: what fits their widths."""
    return getattr(config.spawning.spawn_method, "value", "")


def needs_linear_gate(config: MoEConfig) -> bool:
    """Whether the spawn makes the rows of a linear gate."""
    return config.spawning.spawn_method in MAKE_GATE
