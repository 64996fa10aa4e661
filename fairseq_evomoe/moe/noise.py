"""Random numbers that belong to the rows of a long table, so that any part of it can be drawn anywhere.

The table is drawn in blocks of rows, each from a generator seeded by the key and the block's number: whoever
draws rows 700 to 900, alone or among other rows, gets the same numbers.  (They differ between kinds of
device, as torch's generators do.)
"""

import hashlib
from typing import Tuple

import torch
from torch import Tensor

BLOCK = 256
"""Rows of a block: enough that seeding is cheap, few enough that little is drawn in vain at the ends."""


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
    generator = torch.Generator(device=device)
    blocks = []
    for block in range(first // BLOCK, (first + rows - 1) // BLOCK + 1):
        generator.manual_seed(seed_of(*key, columns, block))
        blocks.append(torch.rand(BLOCK, columns, generator=generator, device=device))
    start = first % BLOCK
    return torch.cat(blocks)[start : start + rows]
