"""The model's options in a checkpoint of any version."""

from argparse import Namespace
from enum import Enum
from typing import Any, Dict, List, Mapping, MutableMapping

from ..config import legacy
from ..config.config import declarations
from ..config.errors import PREFIX
from ..moe.routers import ROUTERS, Router

SPAWNED_BEFORE = "moe_spawned_before"
"""Key of how many times the experts spawned in another run, in what a checkpoint has beside the model.

In checkpoints of earlier versions, whether they did.
"""


class SavedOptions:
    """What a checkpoint says of the model that it is of.

    Checkpoints of today say everything.  In older ones an option may be missing or ``auto``, and those of
    other routers are there, too; fairseq's oldest have a namespace instead of a dictionary.

    Attributes:
        found: whether the checkpoint has any.

    Args:
        state: the checkpoint.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        # a checkpoint that fairseq has loaded and saved again may have both
        places = [state.get("args"), (state.get("cfg") or {}).get("model")]
        self._places: List[MutableMapping[str, Any]] = [
            vars(place) if isinstance(place, Namespace) else place for place in places if place is not None
        ]
        self.found = bool(self._places)
        given = {name: _plain(value) for name, value in self._first.items() if value is not None}
        ours = {name[len(PREFIX) :]: x for name, x in given.items() if name.startswith(PREFIX)}
        masked = str(given.get("_name", given.get("arch"))).startswith("evomoe_roberta")
        self._values = legacy.understood(ours, masked)

    @property
    def _first(self) -> Mapping[str, Any]:
        return self._places[0] if self.found else {}

    @property
    def given(self) -> Dict[str, Any]:
        """Our options that the checkpoint has, in the terms of this version."""
        return dict(self._values)

    @property
    def router(self) -> str:
        """The router's name."""
        return str(self["router"])

    def __getitem__(self, name: str) -> Any:
        """The value of one of our options, by its name without ``moe_``; its default if it is not there.

        Raises:
            OptionError: a value that the option cannot have.
        """
        if name == "router":
            return self._values.get(name, "dts")
        router = ROUTERS.get(self.router, Router)
        declared = router.Options.declared().get(name) or declarations()[name][0]
        return declared.convert(self._values.get(name, declared.default))

    def of_model(self, name: str, default: Any) -> Any:
        """The value of one of fairseq's options of the model."""
        value = self._first.get(name)
        return default if value is None else value

    @property
    def all_of_model(self) -> Dict[str, Any]:
        """All options of the model, as plain values."""
        return {name: _plain(value) for name, value in self._first.items()}

    def change(self, values: Dict[str, Any]) -> None:
        """Give some of our options other values, wherever the checkpoint has them.

        Args:
            values: by name, without ``moe_``.
        """
        for place in self._places:
            place.update({PREFIX + name: value for name, value in values.items()})
        self._values.update(values)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
