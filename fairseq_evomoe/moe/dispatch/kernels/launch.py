"""Run a Triton kernel, if there is Triton, on the device that its tensors are on."""

from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no kernels
    triton = None

look_up = False
"""Whether `launch` finds by itself what Triton has compiled: sooner, but not measured on a GPU yet."""

_compiled: Dict[Tuple[Any, ...], Any] = {}


def usable(x: Tensor) -> bool:
    """Whether the kernels run where ``x`` is: on a GPU, with Triton, and not while PyTorch compiles."""
    if triton is None or x.device.type != "cuda" or not hasattr(torch, "compiler"):  # PyTorch before 2.1
        return False
    return not torch.compiler.is_compiling()


def cdiv(size: int, block: int) -> int:
    """So many blocks cover the size; Triton's own function takes as long as a launch."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The smallest one that is not less; the size is at least 1."""
    return 1 << (size - 1).bit_length()


def launch(
    kernel: Any,
    grid: Tuple[int, int],
    tensors: Sequence[Optional[Tensor]],
    sizes: Tuple[int, ...],
    constants: Tuple[Any, ...],
) -> None:
    """Run a kernel on its first tensor's device.

    Args:
        kernel: what ``triton.jit`` has made.
        grid: number of programs.
        tensors: its first arguments; not the first, but others may be ``None``.
        sizes: the next ones, which a program is not compiled for, but for whether they are 1 or multiples
            of 16.
        constants: the last ones, for each of which it is.
    """
    first = tensors[0]
    assert first is not None
    device = first.device.index
    if first.is_cuda and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, sizes, constants)
    if not (look_up and first.is_cuda):
        kernel[grid](*tensors, *sizes, *constants)
        return
    # all that the compiled code may depend on
    key = (
        *(id(kernel), device, constants),
        *[None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors],
        *[n if n == 1 else (n % 16 == 0, n < 2**31) for n in sizes],
    )
    found = _compiled.get(key)
    if found is None:
        _compiled[key] = kernel[grid](*tensors, *sizes, *constants)
    else:
        found[(*grid, 1)](*tensors, *sizes, *constants)
