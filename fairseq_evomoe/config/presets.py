"""Published systems, and ours, as files of options: ``--moe-preset NAME``.

Each is a YAML file in ``presets/`` with the keys ``name``, ``paper``, ``differs`` (what differs from the
paper), ``options`` (those that are not defaults, without ``moe_``) and, for the comparison in
``examples/systems``, ``dense_updates`` (how long a dense model is trained first, out of which the experts are
made), ``dense_as`` (the option that is given its checkpoint) and ``not_for`` (the tasks that it cannot do).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List

import yaml

from ..moe.options import OptionError

FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Preset:
    """A system.

    Attributes:
        id: what ``--moe-preset`` calls it.
        name: what people call it.
        paper: where it was published.
        differs: what differs from the paper.
        options: its options by their names without ``moe_``; values that count updates may be percentages.
        dense_updates: share of a run that trains the dense model that the experts are made of, as ``50%``.
        dense_as: the option of ``fairseq-train`` that is given that model's checkpoint.
        not_for: tasks that it cannot do, each with the reason.
    """

    id: str
    name: str
    paper: str = ""
    differs: str = ""
    options: Dict[str, Any] = field(default_factory=dict)
    dense_updates: str = ""
    dense_as: str = "finetune_from_model"
    not_for: Dict[str, str] = field(default_factory=dict)


def names() -> List[str]:
    """The names of the presets in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Preset:
    """A preset by name, or of a file by its path.

    Raises:
        OptionError: there is none, or the file is no preset.
    """
    path = FOLDER / f"{name}.yaml" if name in names() else Path(name)
    if not path.is_file():
        raise OptionError(
            "preset",
            f"`preset` {name} is no file and none of the presets {', '.join(names())}: give one of them.",
        )
    return read(path)


def read(path: Path) -> Preset:
    """The preset of a file.

    Raises:
        OptionError: the file is no preset.
    """
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        preset = Preset(id=path.stem, **keys)
        if not isinstance(preset.options, dict) or not all(isinstance(key, str) for key in preset.options):
            raise TypeError("options must be names with values")
    except (TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise OptionError("preset", f"`preset` {path} cannot be read: {text}.") from error
    return preset
