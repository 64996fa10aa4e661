"""Random numbers that belong to the rows of a long table, so that any part of it can be drawn anywhere.

The table is drawn in blocks of rows, each from a generator seeded by the key and the block's number: whoever
draws rows 700 to 900, alone or among other rows, gets the same numbers.  (They differ between kinds of
device, as torch's generators and the size of a block do.)
"""

import hashlib
from typing import Tuple

import torch
from torch import Tensor

BLOCK = 256
"""Rows of a block on a CPU: enough that seeding is cheap, few enough that little is drawn in vain."""

_NUMBERS = 2**22  # in a block on a GPU, where a launch takes as long as drawing some millions


def block_rows(columns: int, device: torch.device) -> int:
    """Rows of a block of so many columns where it is drawn."""
    return BLOCK if device.type == "cpu" else max(_NUMBERS // columns, 1)


def seed_of(*key: object) -> int:
    """A seed from 0 to 2^63 - 1 for a key of numbers and texts."""
    number = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
    return number >> 1


def uniform(key: Tuple, first: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Rows ``first`` to ``first + rows - 1`` of the table of U(0, 1) that a key has.

    Args:
        key: numbers and texts.
        first: number of the first row.
        rows: T.
        columns: K, which is a part of the key.
        device: where to draw.

    Returns:
        float32, (T, K).
    """
    if rows == 0:
        return torch.empty(0, columns, device=device)
    generator, size = torch.Generator(device=device), block_rows(columns, device)
    blocks = []
    for block in range(first // size, (first + rows - 1) // size + 1):
        generator.manual_seed(seed_of(*key, columns, block))
        blocks.append(torch.rand(size, columns, generator=generator, device=device))
    start = first % size
    return torch.cat(blocks)[start : start + rows]
