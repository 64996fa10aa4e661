"""Running sums that are the same on every run."""

import torch
from torch import Tensor

_ONE = 2.0**52


def running_sums(share_TE: Tensor) -> Tensor:
    """``share_TE.cumsum(-1)`` of numbers from 0 to 1, without gradient.

    A GPU adds floating-point numbers in no fixed order there, which PyTorch refuses under
    ``torch.use_deterministic_algorithms``; whole numbers have the same sum in any order.
    """
    share_TE = share_TE.detach()
    if not torch.are_deterministic_algorithms_enabled():
        return share_TE.cumsum(-1)
    sum_TE = (share_TE.double() * _ONE).round().long().cumsum(-1)
    return (sum_TE.double() / _ONE).to(share_TE.dtype)
