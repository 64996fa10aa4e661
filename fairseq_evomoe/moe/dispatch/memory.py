"""Large buffers on the CPU."""

import mmap
import weakref
from collections import defaultdict
from typing import DefaultDict, List

import torch
from torch import Tensor

HUGE = 32 * 2**20
"""Bytes from which glibc maps fresh memory for every buffer, and unmaps it when it is freed."""

_MAPPED = hasattr(mmap, "MAP_PRIVATE")
_waiting: DefaultDict[int, List[mmap.mmap]] = defaultdict(list)


def empty(*shape: int, like: Tensor, reuse: bool = False) -> Tensor:
    """Uninitialised tensor on the device and of the dtype of ``like``.

    Fresh memory costs a page fault for each 4 KiB when it is first touched.  Linux is asked for pages of
    2 MiB for large buffers on the CPU instead, which it grants where transparent huge pages are not switched
    off.  The gradients of many experts, freed after each update, would still take longer to map than to
    compute; with ``reuse``, the memory is kept when the tensor is gone, for the next one of the same size, as
    PyTorch itself does on GPUs.  Memory that waits is given back once another size is needed.

    Args:
        shape: the lengths.
        like: says device and dtype.
        reuse: whether the same size will be needed again and again.
    """
    size = like.element_size()
    for length in shape:
        size *= length
    if size < HUGE or like.device.type != "cpu" or not _MAPPED:
        return torch.empty(shape, device=like.device, dtype=like.dtype)
    buffer = _take(size) if reuse else _map(size)
    # the storage holds the view, so the view goes when the last tensor in the buffer does
    view = memoryview(buffer)
    if reuse:
        weakref.finalize(view, _waiting[size].append, buffer).atexit = False
    return torch.frombuffer(view, dtype=like.dtype).view(shape)


def release() -> None:
    """Give the memory that waits for its next use back to the system."""
    for buffers in list(_waiting.values()):  # other threads may ask for other sizes meanwhile
        buffers.clear()


def _take(size: int) -> mmap.mmap:
    try:
        return _waiting[size].pop()
    except IndexError:
        release()
        return _map(size)


def _map(size: int) -> mmap.mmap:
    # private, so that a forked process does not write to its parent's gradients
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them
    return buffer
