"""Large buffers on the CPU."""

import ctypes
import sys
from typing import Optional

import torch
from torch import Tensor

HUGE = 32 * 2**20
"""Bytes from which glibc always maps fresh memory for a buffer."""

_PAGE = 4096
_MADV_HUGEPAGE = 14
_madvise = None
if sys.platform.startswith("linux"):
    _madvise = getattr(ctypes.CDLL(None), "madvise", None)


def empty(*shape: int, like: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Uninitialised tensor on the device of ``like`` and, unless given, of its dtype.

    Fresh memory costs a page fault for each 4 KiB when it is first touched; for the gradients of many
    experts that is more than their products cost.  Linux is asked for pages of 2 MiB instead, which it
    grants where transparent huge pages are not switched off; elsewhere nothing changes.
    """
    tensor = torch.empty(shape, device=like.device, dtype=dtype or like.dtype)
    size = tensor.numel() * tensor.element_size()
    if _madvise is not None and size >= HUGE and tensor.device.type == "cpu":
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + size) // _PAGE * _PAGE
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)
    return tensor
