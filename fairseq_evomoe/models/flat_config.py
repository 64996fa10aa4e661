"""A configuration dataclass out of the ``add_args`` of a fairseq model that still uses argparse.

``transformer`` and ``roberta`` declare their options to an ``argparse`` parser.  The dataclass made here
has the same names, types, defaults and help texts, for whatever version of fairseq is installed, so the
options can be given as flags and as (flat) YAML.
"""

import argparse
from dataclasses import field, make_dataclass
from typing import Any, Callable, Dict, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import OmegaConf


def config_from_parser(
    name: str,
    add_args: Callable[[argparse.ArgumentParser], None],
    defaults: Dict[str, Any],
) -> type:
    """Make a dataclass with one field for each option of a parser.

    Args:
        name: name of the class.
        add_args: adds the options to a parser.
        defaults: defaults that override the parser's.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_args(parser)
    fields = []
    for action in parser._actions:
        default = defaults.get(action.dest, action.default)
        metadata = {"help": action.help or action.dest.replace("_", " ")}
        if len(action.option_strings) > 1:
            metadata["argparse_alias"] = action.option_strings[1]
        fields.append((action.dest, _type(action), field(default=default, metadata=metadata)))
    return make_dataclass(name, fields, bases=(FairseqDataclass,))


def _type(action: argparse.Action) -> Any:
    if isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
        return bool
    if action.choices is not None:
        return ChoiceEnum(list(action.choices))
    # lists are parsed by functions of fairseq's own: the models take them as strings, too
    return Optional[action.type if action.type in (int, float) else str]


def to_namespace(cfg: Any) -> argparse.Namespace:
    """A flat configuration as the namespace that fairseq's argparse models take."""
    if isinstance(cfg, argparse.Namespace):
        return cfg
    return argparse.Namespace(**OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
