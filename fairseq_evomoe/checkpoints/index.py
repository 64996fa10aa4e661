"""What the files of a checkpoint in several files are called, and what each of them says of the set.

``checkpoint_last.pt`` is the first, ``checkpoint_last-experts1.pt`` the second, and so on.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from ..models.feed_forward import CheckpointMismatch
from .saved_optimizer import Layout
from .storage import TEMPORARY

INDEX, EXPERTS, NUMBER = "moe_shards", "moe_experts", "moe_shard"
"""Keys of a file's index, of its experts and of its number."""

_DIGEST = "digest"
_EXPERTS_OF = ".moe.experts."


class UnreadableCheckpoint(CheckpointMismatch):
    """A file of a checkpoint is there, but must not be read."""


class DamagedCheckpoint(CheckpointMismatch):
    """A file of a checkpoint is missing, damaged or from another one."""


@dataclass
class Index:
    """What all files of a set say of it.

    Attributes:
        name: of the set, unlike that of any other.
        update: number of updates that the model has made.
        widths: hidden units of each expert, by layer.
        experts_of: numbers of the experts in each file, by layer.
        layout: of the optimizer's state in the first file, before the experts' was cut out of it; ``None`` if
            it is not known, and then there is no such state.
        sealed: whether the file had a digest of all this, as those of today have.
    """

    name: str
    update: int
    widths: Dict[str, List[int]]
    experts_of: Dict[str, List[List[int]]]
    layout: Optional[Layout] = None
    sealed: bool = True

    @property
    def files(self) -> int:
        """Number of files."""
        return len(next(iter(self.experts_of.values())))

    def as_dict(self) -> Dict[str, Any]:
        """Plain values, which torch loads without trusting the file, and a digest of them."""
        values = {name: value for name, value in vars(self).items() if name != "sealed"}
        values["layout"] = None if self.layout is None else self.layout.as_dict()
        return dict(values, **{_DIGEST: _digest(values)})

    @classmethod
    def from_dict(cls, values: Dict[str, Any], path: str) -> "Index":
        """The inverse of ``as_dict``.

        Args:
            values: what a file says.
            path: of the file.

        Raises:
            DamagedCheckpoint: it cannot be the index of a set.
        """
        try:
            values = dict(values)
            digest = values.pop(_DIGEST, None)
            layout = values["layout"]
            if layout is not None:
                layout = Layout.from_dict(layout)
            index = cls(**dict(values, layout=layout, sealed=digest is not None))
            fine = digest in (None, _digest(values)) and index._is_possible()
        except (AttributeError, KeyError, IndexError, StopIteration, TypeError, ValueError) as error:
            raise DamagedCheckpoint(f"The index in {path} is damaged.") from error
        if not fine:
            raise DamagedCheckpoint(
                f"The index in {path} is damaged: it is not what was written, or contradicts itself."
            )
        return index

    def is_of_same_set(self, other: "Index") -> bool:
        """Whether two files say the same of their set; layouts may be of different ranks' rows."""
        return all(getattr(self, x) == getattr(other, x) for x in ("name", "update", "widths", "experts_of"))

    def _is_possible(self) -> bool:
        layout = self.layout
        return (
            isinstance(self.name, str)
            and isinstance(self.update, int)
            and self.widths.keys() == self.experts_of.keys()
            and all(isinstance(width, int) and width > 0 for x in self.widths.values() for width in x)
            and all(len(parts) == self.files for parts in self.experts_of.values())
            and all(
                sorted(expert for part in parts for expert in part) == list(range(len(self.widths[layer])))
                for layer, parts in self.experts_of.items()
            )
            and (layout is None or len(layout.keys) == len(layout.sizes))
        )


def _digest(values: Dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_expert(key: str) -> bool:
    """Whether a key of a model is that of a tensor that has rows for each expert."""
    return _EXPERTS_OF in key and "." not in key.split(_EXPERTS_OF)[1]


def is_low_rank(key: str) -> bool:
    """Whether a key of a model is that of a tensor of low-rank experts, which stand beside a linear layer."""
    return ".low_rank." in key


def layer_of(key: str) -> str:
    """The layer that a tensor of experts belongs to."""
    return key.split(_EXPERTS_OF)[0]


def name_of(key: str) -> str:
    """The name of a tensor of experts in its layer: ``w1``, ``b1``, ..."""
    return key.split(_EXPERTS_OF)[1]


def path_of(path: str, number: int) -> str:
    """The path of a file of a set whose first file is at ``path``."""
    stem = path[: -len(".pt")] if path.endswith(".pt") else path
    return path if number == 0 else f"{stem}{suffix_of(number)}.pt"


def suffix_of(number: int) -> str:
    """What the name of a file of a set has before its ending."""
    return f"-experts{number}" if number > 0 else ""


def places_of(path: str, number: int) -> List[str]:
    """Where a file of a set may be: there, or beside what a link leads to, or not renamed yet.

    The first file is renamed first, so that another one may still have its temporary name when ranks die.
    """
    firsts = [path] + ([os.path.realpath(path)] if os.path.islink(path) else [])
    found = [path_of(first, number) for first in firsts]
    return found if number == 0 else found + [place + TEMPORARY for place in found]
