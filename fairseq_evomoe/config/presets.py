"""Published systems, and ours, as files of options: ``--moe-preset NAME``.

Each is a YAML file in ``presets/`` with the keys ``name``, ``paper``, ``differs`` (what differs from the
paper), ``options`` (those that are not defaults, without ``moe_``) and, for the comparison in
``examples/systems``, ``dense_updates`` (how long a dense model is trained first, out of which the experts are
made), ``dense_as`` (the option that is given its checkpoint) and ``not_for`` (the tasks that it cannot do).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List

import yaml

from ..moe.options import OptionError

FOLDER = Path(__file__).parent / "presets"


class _Loader(yaml.SafeLoader):
    """Reads a stage such as ``400:4`` as it is written, which YAML 1.1 takes for a number in base 60."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """The tag of a node; see the parent."""
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return "tag:yaml.org,2002:str" if number and ":" in value else tag


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
        text = path.read_text(encoding="utf-8")
        keys = yaml.load(text, yaml.BaseLoader)  # words, so that the number of a paper keeps its last zero
        preset = Preset(id=path.stem, **keys)
        if "options" in keys:
            preset = replace(preset, options=yaml.load(text, _Loader)["options"])
        _check(preset)
    except (OSError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise OptionError("preset", f"`preset` {path} cannot be read: {text}.") from error
    return preset


def _check(preset: Preset) -> None:
    """Refuse what a preset cannot have under its keys.

    Raises:
        TypeError: there is some.
    """
    for name in ("name", "paper", "differs", "dense_updates", "dense_as"):
        if not isinstance(getattr(preset, name), str):
            raise TypeError(f"{name} must be text")
    for name, values in (("options", "values"), ("not_for", "reasons")):
        found = getattr(preset, name)
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise TypeError(f"{name} must be names with {values}")
    if not all(isinstance(reason, str) for reason in preset.not_for.values()):
        raise TypeError("not_for must be names with reasons")
