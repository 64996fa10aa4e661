"""The ``--moe-*`` options as a flat dataclass of fairseq's, made from their declarations.

All of them are ``None`` unless they are given, so that what was given can be told from what is a default;
``resolve.py`` decides the rest.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import field, make_dataclass
from typing import Any, List, Optional, Sequence, Tuple

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.utils import safe_hasattr
from omegaconf import II, OmegaConf, open_dict

from .. import compat
from ..moe.options import Declaration
from ..moe.routers import ROUTERS
from .config import declarations, owner, routers_with
from .errors import PREFIX

AUTO = ("gate_input", "renormalize", "balance_form")
"""Options that may be ``auto``: what their default was before version 0.2, as old checkpoints have it."""


def option(default: Any, text: str) -> Any:
    """A field of a fairseq dataclass with a default and a help text, which argparse formats."""
    return field(default=default, metadata={"help": text.replace("%", "%%")})


def flat_fields() -> List[Tuple[str, Any, Any]]:
    """Name, type and field of each option, as ``make_dataclass`` takes them."""
    routers = ChoiceEnum(list(ROUTERS))
    result: List[Tuple[str, Any, Any]] = [
        (
            PREFIX + "preset",
            Optional[str],
            option(
                None,
                "Options of a published system, or of one of ours, by name, or of a YAML file by its path; "
                "other options override it. `evomoe presets` lists them.",
            ),
        ),
        (
            PREFIX + "router",
            Optional[routers],
            option(
                None, "Router that sends tokens to experts; dts, EvoMoE's Dense-To-Sparse gate, by default."
            ),
        ),
    ]
    for name, declared in declarations().items():
        result.append((PREFIX + name, _type(declared), option(None, help_text(name, declared))))
    # not options of their own: the seed of the spawn, and what durations are counted from
    result.append(("seed", int, field(default=II("common.seed"))))
    result.append(("max_update", int, field(default=II("optimization.max_update"))))
    return result


def _type(declared: Sequence[Declaration]) -> Any:
    first = declared[0]
    if first.choices:
        words = [word for declaration in declared for word in declaration.choices]
        extra = ["auto"] if first.name in AUTO else []
        return Optional[ChoiceEnum(list(dict.fromkeys(extra + words)))]
    if first.duration or first.type is str:
        return Any
    return Optional[first.type]


def help_text(name: str, declared: Sequence[Declaration]) -> str:
    """The help of an option with its default, or that of each router that has another one."""
    text = common_help(declared)
    if owner(name) is not None:
        default = _default(declared[0])
        return text if default is None else f"{text} Default: {default}."
    defaults: dict = {}
    for router in routers_with(name):
        found = _default(ROUTERS[router].Options.declared()[name])
        defaults.setdefault(found, []).append(router)
    if set(defaults) == {None}:
        return text
    if len(defaults) == 1:
        return f"{text} Default: {next(iter(defaults))}."
    parts = [f"{default} ({', '.join(routers)})" for default, routers in defaults.items()]
    return f"{text} Default: {', '.join(parts)}."


def common_help(declared: Sequence[Declaration]) -> str:
    """What most of the routers that have an option say of it; of two the first."""
    return Counter(declaration.help for declaration in declared).most_common(1)[0][0]


def _default(declaration: Declaration) -> Optional[str]:
    default = declaration.default
    if default is None:
        return None
    default = getattr(default, "value", default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def make_options(name: str = "MoEOptions") -> type:
    """The dataclass of all options that there are now."""
    made = make_dataclass(name, flat_fields(), bases=(FairseqDataclass,))
    made.__module__ = __name__
    made.__doc__ = "Options of every EvoMoE model; all are None unless given."
    return made


MoEOptions: Any = make_options()


def set_defaults(args: Any, **defaults: Any) -> None:
    """Set those attributes that are absent or None, as fairseq's architecture functions do."""
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def complete(cfg: Any, config: type) -> Any:
    """Fill in what a configuration lacks from the defaults of its dataclass.

    fairseq does this for a model's own name but not for its other architectures, which can also be
    named under Hydra (``model: {_name: evomoe_lm_tiny}``).
    """
    with open_dict(cfg) if OmegaConf.is_config(cfg) else nullcontext():
        compat.drop_absent(cfg, config)
        for name, default in vars(config()).items():
            if not safe_hasattr(cfg, name):
                setattr(cfg, name, default)
    return cfg
