"""Functions that a linear gate may have before and behind its linear map."""

from enum import Enum
from typing import Callable, Dict

import torch
from torch import Tensor
from torch.nn import functional as F


class GateActivation(str, Enum):
    """A function of single numbers; identity: none."""

    identity = "identity"
    sigmoid = "sigmoid"
    tanh = "tanh"
    gelu = "gelu"
    relu = "relu"


_FUNCTIONS: Dict[GateActivation, Callable[[Tensor], Tensor]] = {
    GateActivation.sigmoid: torch.sigmoid,
    GateActivation.tanh: torch.tanh,
    GateActivation.gelu: F.gelu,
    GateActivation.relu: torch.relu,
}


def activate(x: Tensor, how: GateActivation) -> Tensor:
    """``x`` behind the function, in float32 (float64 for float64); ``x`` itself with identity."""
    if how == GateActivation.identity:
        return x
    return _FUNCTIONS[how](x if x.dtype == torch.float64 else x.float())
