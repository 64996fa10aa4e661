"""The state of an optimizer in a checkpoint: which of its parts belongs to which parameter."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from .optimizer_state import Layout

# in a checkpoint under a name of their own, but no parameters
_BUFFERS = "_float_tensor version table_V origin_E used_E rejected_D rejected updates magnitude_H".split()
_BUFFERS += ["losses"]


class UnknownLayout(ValueError):
    """An optimizer's state does not tell which of its parts belongs to which parameter."""


@dataclass
class ByParameter:
    """The statistics of each parameter.

    Attributes:
        names: of the parameters, in the order in which the optimizer numbers them.
        states: statistics of each.
        flat: whether they were stretches of one flat tensor for all (``--fp16``).
    """

    names: List[str]
    states: List[Dict[str, Any]]
    flat: bool


def by_parameter(optimizer: Dict[str, Any], model: Dict[str, Tensor]) -> Optional[ByParameter]:
    """The statistics of each parameter; ``None`` if it cannot be told which are whose.

    Args:
        optimizer: what the optimizer's ``state_dict`` gave.
        model: the model's tensors.
    """
    groups, state = optimizer.get("param_groups", []), optimizer.get("state", {})
    names = parameter_names(model)
    if len(groups) != 1:
        return None
    flat = len(groups[0]["params"]) == 1 and len(names) > 1
    states = _unflatten(state, model, names) if flat else [state.get(i, {}) for i in groups[0]["params"]]
    return ByParameter(names, states, flat) if _fit(states, model, names) else None


def layout_of_checkpoint(state: Dict[str, Any]) -> Optional[Layout]:
    """Where the state of each parameter is in a checkpoint's optimizer; ``None`` without one.

    Raises:
        UnknownLayout: it cannot be told.
    """
    optimizer, model = state.get("last_optimizer_state"), state["model"]
    if optimizer is None:
        return None
    found = by_parameter(optimizer, model)
    if found is None:
        raise UnknownLayout(
            "The optimizer's state in the checkpoint could not be matched with the parameters: train with "
            "--moe-sharded-checkpoint instead, or save with --no-save-optimizer-state."
        )
    return Layout(found.names, [model[name].numel() for name in found.names], found.flat)


def _fit(states: List[Dict[str, Any]], model: Dict[str, Tensor], names: List[str]) -> bool:
    """Whether there are statistics for each parameter, with rows for its rows."""
    if len(states) != len(names):
        return False
    for statistics, name in zip(states, names):
        shape = model[name].shape
        tensors = [
            x for key, x in statistics.items() if torch.is_tensor(x) and x.dim() and key != "exp_avg_sq_col"
        ]
        if any(x.shape not in (shape, shape[:-1]) for x in tensors):
            return False
    return True


def _unflatten(state: Dict[int, Any], model: Dict[str, Tensor], names: List[str]) -> List[Dict[str, Any]]:
    """Statistics of each parameter out of those of one flat tensor (``--fp16``); none if they do not fit."""
    sizes = [model[name].numel() for name in names]
    result: List[Dict[str, Any]] = [{} for _ in names]
    for key, value in state.get(0, {}).items():
        by_element = torch.is_tensor(value) and value.dim() > 0
        if by_element and value.numel() != sum(sizes):
            return []
        parts = value.split(sizes) if by_element else [value] * len(names)
        for statistics, name, part in zip(result, names, parts):
            statistics[key] = part.view(model[name].shape) if by_element else part
    return result


def flatten(states: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Statistics of one flat tensor out of those of each parameter."""
    first = states[0]
    return {
        key: torch.cat([s[key].reshape(-1) for s in states]) if torch.is_tensor(x) and x.dim() else x
        for key, x in first.items()
    }


def parameter_names(model: Dict[str, Tensor]) -> List[str]:
    """Names of a model's parameters in the order in which an optimizer numbers them, shared ones once.

    Shared parameters are told by their values, since a checkpoint from a GPU has a copy for each name.
    """
    names: List[str] = []
    for name, tensor in model.items():
        if name.rsplit(".", 1)[-1] not in _BUFFERS and not any(
            _same(tensor, model[other]) for other in names
        ):
            names.append(name)
    return names


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr():
        return True
    constant = a.numel() == 0 or bool(a.flatten()[0] == a.flatten()[-1])  # such as biases that are all 0
    return not constant and torch.equal(a, b)
