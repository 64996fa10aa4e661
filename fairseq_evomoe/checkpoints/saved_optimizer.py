"""The state of an optimizer in a checkpoint, and which part of it belongs to which parameter.

torch numbers an optimizer's parameters, and fairseq's ``--fp16`` lays them end to end in one tensor, so that
the state alone does not tell which parameter it is of.  Each checkpoint of a model with MoE layers therefore
says it, under ``LAYOUT``.
"""

from dataclasses import dataclass
from typing import Any, Callable, Collection, Dict, List, Optional

import torch
from torch import Tensor

from .guessed_layout import guessed_keys

LAYOUT = "moe_optimizer_layout"
"""Key of a checkpoint's ``Layout``, which fairseq leaves alone when it loads the checkpoint."""

_BY_COLUMN = ("exp_avg_sq_col",)
"""Statistics without a row for each row of the parameter: Adafactor's."""


class UnknownLayout(ValueError):
    """An optimizer's state does not tell which of its parts belongs to which parameter."""


@dataclass
class Layout:
    """Where the state of each parameter is in the ``state_dict()`` of an optimizer.

    Attributes:
        keys: what each parameter is called, in the order of its number.
        sizes: number of elements of each, in the ``state_dict()`` that this is the layout of.
        flat: whether they all are stretches of one flat tensor.
    """

    keys: List[str]
    sizes: List[int]
    flat: bool

    def as_dict(self) -> Dict[str, Any]:
        """Plain values, which torch loads without trusting the file."""
        return {"keys": list(self.keys), "sizes": list(self.sizes), "flat": self.flat}

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> "Layout":
        """The inverse of ``as_dict``."""
        return cls(values["keys"], values["sizes"], values["flat"])

    def fits(self, optimizer: Dict[str, Any], model: Dict[str, Tensor]) -> bool:
        """Whether it is that of an optimizer's state whose statistics have rows for the rows of the model's.

        Args:
            optimizer: what the optimizer's ``state_dict`` gave.
            model: the model's tensors; a parameter that is not there is the criterion's.
        """
        numbers = [number for group in optimizer.get("param_groups", []) for number in group["params"]]
        if numbers != list(range(1 if self.flat else len(self.keys))):
            return False
        if any(model[key].numel() != size for key, size in zip(self.keys, self.sizes) if key in model):
            return False
        for number, statistics in optimizer.get("state", {}).items():
            tensors = [x for name, x in statistics.items() if has_rows(name, x)]
            if self.flat:
                fit = all(x.numel() == sum(self.sizes) for x in tensors)
            else:
                shape = model[self.keys[number]].shape if self.keys[number] in model else None
                fit = shape is None or all(x.shape in (shape, shape[:-1]) for x in tensors)
            if not fit:
                return False
        return True


def find_layout(state: Dict[str, Any]) -> Optional[Layout]:
    """The layout of the optimizer's state in a checkpoint: the one that it has, or a guess in an old one.

    Returns:
        ``None`` if it is not known, or not that of the state.
    """
    optimizer, model, saved = state.get("last_optimizer_state"), state["model"], state.get(LAYOUT)
    if saved is not None:
        layout = Layout.from_dict(saved)
    elif optimizer is not None:
        keys = guessed_keys(model)
        numbers = sum(len(group["params"]) for group in optimizer.get("param_groups", []))
        layout = Layout(keys, [model[key].numel() for key in keys], numbers == 1 and len(keys) > 1)
    else:
        return None
    return layout if optimizer is None or layout.fits(optimizer, model) else None


def need_layout(state: Dict[str, Any]) -> Optional[Layout]:
    """As ``find_layout``; ``None`` only for a checkpoint without an optimizer's state.

    Raises:
        UnknownLayout: the checkpoint has a state, and its layout is not known.
    """
    layout = find_layout(state)
    if layout is None and state.get("last_optimizer_state") is not None:
        raise UnknownLayout(
            "The optimizer's state in the checkpoint could not be matched with the parameters: train with "
            "--moe-sharded-checkpoint instead, or save with --no-save-optimizer-state."
        )
    return layout


def parameter_keys(state: Dict[str, Any]) -> List[str]:
    """What the parameters in a checkpoint's model are called, shared ones once."""
    layout, model = find_layout(state), state["model"]
    return guessed_keys(model) if layout is None else [key for key in layout.keys if key in model]


def replace(
    state_dict: Dict[str, Any], layout: Layout, change: Callable[[str, str, Tensor], Tensor]
) -> Dict[str, Any]:
    """A ``state_dict()`` of an optimizer with other statistics.

    Args:
        state_dict: of an optimizer.
        layout: of this ``state_dict``.
        change: ``change(key, name, statistic)`` is what a parameter's statistic becomes, which is a tensor of
            one dimension if ``layout.flat``.
    """
    result = dict(state_dict, state={})
    for number, statistics in state_dict["state"].items():
        changed = result["state"][number] = dict(statistics)
        for name, value in statistics.items():
            if not torch.is_tensor(value) or value.dim() == 0:
                continue
            if not layout.flat:
                changed[name] = change(layout.keys[number], name, value)
            elif value.numel() == sum(layout.sizes):
                parts = zip(layout.keys, value.split(layout.sizes))
                changed[name] = torch.cat([change(key, name, part).reshape(-1) for key, part in parts])
    return result


def replace_rows(
    state_dict: Dict[str, Any],
    layout: Layout,
    model: Dict[str, Tensor],
    change: Callable[[str, Tensor], Tensor],
    gone: Collection[str] = (),
) -> Dict[str, Any]:
    """A ``state_dict()`` of an optimizer of parameters that have other rows.

    Args:
        state_dict: of an optimizer.
        layout: of this ``state_dict``.
        model: the tensors that it is the state of.
        change: ``change(key, rows)`` is what becomes of each statistic that has a row for each row of its
            parameter.
        gone: keys of the parameters that are no more.
    """

    def change_statistic(key: str, name: str, statistic: Tensor) -> Tensor:
        if key in gone:
            return statistic.new_empty(0)
        if key not in model or not has_rows(name, statistic):
            return statistic
        return change(key, statistic.view(model[key].shape) if layout.flat else statistic)

    result = replace(state_dict, layout, change_statistic)
    return result if layout.flat else _without(result, layout, gone)


def _without(state_dict: Dict[str, Any], layout: Layout, gone: Collection[str]) -> Dict[str, Any]:
    """A ``state_dict()`` without some parameters, the others numbered anew."""
    kept = [number for number, key in enumerate(layout.keys) if key not in gone]
    new = {number: i for i, number in enumerate(kept)}
    groups = [
        dict(group, params=[new[number] for number in group["params"] if number in new])
        for group in state_dict["param_groups"]
    ]
    state = {new[number]: each for number, each in state_dict["state"].items() if number in new}
    return dict(state_dict, param_groups=groups, state=state)


def has_rows(name: str, statistic: Any) -> bool:
    """Whether a statistic of that name has a row for each row of its parameter."""
    return torch.is_tensor(statistic) and statistic.dim() > 0 and name not in _BY_COLUMN
