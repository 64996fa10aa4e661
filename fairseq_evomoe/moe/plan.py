"""How the experts of a layer become other experts: one plan for weights, optimizer state and copies."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence

import torch
from torch import Tensor

from .experts import ROWS_BY_EXPERT
from .offspring import Offspring
from .options import OptionError
from .routers import Router
from .routers.registry import name_of

OUTPUT = ("w2", "b2")
"""The tensors that an expert's output is linear in."""


@dataclass(frozen=True)
class Origin:
    """Where a new expert comes from.

    Attributes:
        source: number of the old expert whose row of ``b2``, and of the router's tensors, it takes.
        unit_K: int64, the hidden units that it takes, in its order, as rows of the old ``w1``, ``b1``, ``w2``
            and ``w3``.
        new_units: how many hidden units it has besides, after those; their rows are zeros unless the plan
            changes them.
        inherits: whether it takes over what an optimizer knows of them; that of an expert that does not is
            zero, like that of new hidden units.
    """

    source: int
    unit_K: Tensor
    new_units: int = 0
    inherits: bool = True


class Inherit(str, Enum):
    """For which weights new experts take over what an optimizer knows of the old ones."""

    all = "all"
    unchanged = "unchanged"
    none = "none"


@dataclass(frozen=True)
class Plan:
    """How old experts become new ones, made once for a layer and then applied to every copy of its tensors.

    The names and shapes of the tensors are those of ``moe.experts.Experts``.

    Attributes:
        origins: where each of the new experts comes from.
        change: ``change(e, name, rows)`` is applied to the rows that new expert ``e`` has in each tensor of
            weights; ``None``: nothing changes.
        gate_ED: the weights that the linear gate of a new router must have, if any.
        inherit: the weights whose statistics in an optimizer are kept: ``unchanged`` are those that are equal
            in the old expert; ``none`` lets the optimizer begin as if the parameters were new.
        offspring: who is whose child, where many experts become more; ``None``: there was one, or experts
            come and go.
        output_scale: factor of what each new expert gives, that is of its ``w2`` and ``b2``.  An optimizer's
            statistics do not change by it.
    """

    origins: Sequence[Origin]
    change: Optional[Callable[[int, str, Tensor], Tensor]] = None
    gate_ED: Optional[Tensor] = None
    inherit: Inherit = Inherit.all
    offspring: Optional[Offspring] = None
    output_scale: float = 1.0

    @property
    def widths(self) -> List[int]:
        """Hidden units of each new expert."""
        return [len(origin.unit_K) + origin.new_units for origin in self.origins]

    def only(self, experts: Sequence[int]) -> "Plan":
        """The plan of some of the new experts, for a rank that has no others."""
        change = self.change

        def change_local(expert: int, name: str, rows: Tensor) -> Tensor:
            return rows if change is None else change(experts[expert], name, rows)

        origins = [self.origins[e] for e in experts]
        return replace(self, origins=origins, change=change and change_local, gate_ED=None)

    def weights(self, name: str, old: Tensor) -> Tensor:
        """A tensor of weights of the new experts.

        Args:
            name: ``w1``, ``b1``, ``w2``, ``b2`` or ``w3``.
            old: that tensor of the old experts, in any precision.

        Returns:
            rows of all new experts, one after another; dtype and device of ``old``.
        """
        parts = [self._changed(e, name, part) for e, part in enumerate(self._taken(name, old))]
        rows = torch.cat(parts) if parts else old[:0]
        return rows * self.output_scale if name in OUTPUT and self.output_scale != 1 else rows

    def statistics(self, name: str, old: Tensor, weights: Tensor) -> Tensor:
        """The optimizer's statistics of the new experts.

        Args:
            name: of the tensor of weights.
            old: those of the old experts, with a row for each row of the weights, not necessarily as long.
            weights: the tensor of weights of the old experts.
        """
        parts = self._taken(name, old)
        parts = [part if o.inherits else torch.zeros_like(part) for o, part in zip(self.origins, parts)]
        if self.inherit == Inherit.unchanged and old.shape == weights.shape:
            for e, before in enumerate(self._taken(name, weights)):
                parts[e] = parts[e].masked_fill(self._changed(e, name, before) != before, 0)
        return torch.cat(parts) if parts else old[:0]

    def _taken(self, name: str, old: Tensor) -> List[Tensor]:
        return [_take(origin, name, old) for origin in self.origins]

    def _changed(self, expert: int, name: str, rows: Tensor) -> Tensor:
        return rows if self.change is None else self.change(expert, name, rows)

    def per_expert(self, old: Tensor, new: Optional[Tensor] = None) -> Tensor:
        """A tensor with one row for each expert, such as the router's.

        Args:
            old: rows of the old experts.
            new: rows of the new experts, used where they do not inherit; zeros if not given.
        """
        result = old[[origin.source for origin in self.origins]]
        for e, origin in enumerate(self.origins):
            if not origin.inherits:
                result[e] = 0 if new is None else new[e]
        return result

    def fill_gate(self, router: Router) -> None:
        """Give a new router the gate that the plan asks for, if it does.

        Raises:
            OptionError: the router has no linear gate.
        """
        if self.gate_ED is not None:
            check_linear_gate(router)
            router.set_gate(self.gate_ED)


def _take(origin: Origin, name: str, old: Tensor) -> Tensor:
    if name == ROWS_BY_EXPERT:
        return old[origin.source : origin.source + 1]
    rows = old.index_select(0, origin.unit_K.to(old.device))
    if origin.new_units == 0:
        return rows
    return torch.cat([rows, rows.new_zeros((origin.new_units,) + rows.shape[1:])])


def check_linear_gate(router: Router, method: str = "split") -> None:
    """Raise ``OptionError`` unless a router has a gate with one row of weights for each expert.

    Args:
        router: the router.
        method: by which experts spawn.
    """
    if router.linear_gate:
        return
    if type(router).linear_gate:
        given = router.options
        if getattr(router, "weight", None) is None:
            reason = f"sees the layer's input, which `gate_input` {given.gate_input.value} does not"
            way_out = "use hidden or both"
        else:
            reason = "has no other map, but there is a `gate_activation` or a `gate_input_activation`"
            way_out = "leave them out"
        raise OptionError(
            "spawn_method",
            f"`spawn_method` {method} makes the rows of a gate that {reason}: {way_out}, or use another "
            "method.",
        )
    name = name_of(type(router))
    raise OptionError(
        "spawn_method",
        f"`spawn_method` {method} makes the rows of a linear gate, which `router` {name} has not: use "
        "another router, such as topk, or another method.",
    )


def resize_plan(widths: Sequence[int], kept: Sequence[int], copied: Optional[int] = None) -> Plan:
    """Keep some experts as they are and perhaps add the copy of one, of which an optimizer knows nothing.

    Args:
        widths: hidden units of the experts.
        kept: numbers of the experts that stay, in their order.
        copied: number of the expert that the last of the new ones is a copy of.
    """
    starts = [sum(widths[:e]) for e in range(len(widths))]
    units = [torch.arange(start, start + width) for start, width in zip(starts, widths)]
    origins = [Origin(e, units[e]) for e in kept]
    if copied is not None:
        origins.append(Origin(copied, units[copied], inherits=False))
    return Plan(origins)


class Spawner(Protocol):
    """Makes a plan of how one expert becomes many; ``evolution.spawn.Spawn`` is one.

    Attributes:
        experts: E, how many experts it makes.
        layer: number of the layer, on which its random numbers depend.
        seed: the same for all layers of a model.
        method_name: what it does to the copies of the base, in a word.
        used_strength: how much.
        needs_activity: whether the base's activations should be measured before the spawn.
        needs_sample: whether tokens that it sees should be kept for it.
        makes_gate: whether the router must have a linear gate; see ``check_linear_gate``.
        measure: what tells how many children an expert deserves: ``load``, ``gradient``, or nothing if empty.
    """

    @property
    def experts(self) -> int: ...  # noqa: D102

    @property
    def layer(self) -> int: ...  # noqa: D102

    @property
    def seed(self) -> int: ...  # noqa: D102

    @property
    def method_name(self) -> str: ...  # noqa: D102

    @property
    def used_strength(self) -> float: ...  # noqa: D102

    @property
    def needs_activity(self) -> bool: ...  # noqa: D102

    @property
    def needs_sample(self) -> bool: ...  # noqa: D102

    @property
    def makes_gate(self) -> bool: ...  # noqa: D102

    def widths_from(self, base: int) -> List[int]:
        """Hidden units of each expert that is made out of a base with ``base`` of them."""

    def generator(self, *key: object) -> torch.Generator:
        """A generator of random numbers of its own for each key."""

    def plan(self, base: Dict[str, Tensor], measured: Optional[Tensor] = None) -> Plan:
        """What to do to the base expert, given its tensors by name and what was measured for it."""

    @property
    def measure(self) -> str: ...  # noqa: D102

    def children(self, experts: int, wanted: int, demand_E: Optional[Tensor] = None) -> List[int]:
        """How many children each of many experts has, of so many in all, given how they are in demand."""

    def multiply(self, experts: Dict[str, Tensor], widths: Sequence[int], parent_E: Sequence[int]) -> Plan:
        """What to do to many experts, given their tensors and widths, and the parent of each new one."""


_spawners: Dict[str, Callable[..., Spawner]] = {}


def register_spawner(make: Callable[..., Spawner]) -> None:
    """Say what makes the spawner of a layer that is given none; its arguments are those of ``make_spawner``.

    ``moe`` knows nobody, so whoever knows how experts spawn, ``evolution``, tells it so.
    """
    _spawners["default"] = make


def make_spawner(**options: Any) -> Spawner:
    """The spawner that was registered, with the options ``experts``, ``layer``, ``seed``, ``widths``, ...

    Raises:
        RuntimeError: none was.
    """
    if not _spawners:
        raise RuntimeError("No spawner is registered: import fairseq_evomoe, or give the layer a `spawner`.")
    return _spawners["default"](**options)
