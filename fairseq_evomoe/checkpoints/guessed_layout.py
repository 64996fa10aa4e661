"""Which tensors of a model are parameters, in old checkpoints, which do not say it.

Today's checkpoints say it; see ``saved_optimizer.Layout``.  The list below is of what those without it can
hold, so that it never grows.
"""

from typing import Dict, List, Sequence

import torch
from torch import Tensor

# In a checkpoint under names of their own, but no parameters: fairseq's, those of routers and of what decides
# on the spawn.
_BUFFERS = (
    "_float_tensor version table_V origin_E used_E rejected_D rejected updates magnitude_H losses".split()
)


def guessed_keys(model: Dict[str, Tensor], known: Sequence[str] = ()) -> List[str]:
    """Names of a model's parameters in the order in which an optimizer numbers them, shared ones once.

    Shared parameters are told by their values, since a checkpoint from a GPU has a copy for each name, so
    that of two parameters which happen to be equal one is missing here.

    Args:
        model: its tensors.
        known: names of those that are known to be parameters, which come first.
    """
    keys: List[str] = list(known)
    for key, tensor in model.items():
        is_buffer = key.rsplit(".", 1)[-1] in _BUFFERS
        if key not in keys and not is_buffer and not any(_same(tensor, model[other]) for other in keys):
            keys.append(key)
    return keys


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr():
        return True
    constant = a.numel() == 0 or bool(a.flatten()[0] == a.flatten()[-1])  # such as biases that are all 0
    return not constant and torch.equal(a, b)
