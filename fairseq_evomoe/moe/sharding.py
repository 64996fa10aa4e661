"""Which of the ranks that share a layer's experts has which of them, and where their rows are."""

from typing import Dict, List, Optional, Sequence

import torch
from torch import Tensor

ROWS_BY_EXPERT = "b2"
"""The tensor of ``Experts`` with one row for each expert; the others have one for each hidden unit."""


def deal_experts(widths: Sequence[int], ranks: int) -> List[List[int]]:
    """Deal experts out so that the ranks have about as many hidden units each.

    The widest expert first, each goes to the rank with the fewest hidden units so far, of those to that with
    the fewest experts: of equally wide ones, rank i gets experts i, i + ranks, ...

    Args:
        widths: hidden units of each expert.
        ranks: number of ranks; those beyond the number of experts get none.

    Returns:
        numbers of the experts of each rank, ascending.
    """
    experts_of: List[List[int]] = [[] for _ in range(ranks)]
    units = [0] * ranks
    for expert in sorted(range(len(widths)), key=lambda e: -widths[e]):
        # no rank may stay empty, whatever the widths
        rank = min(range(ranks), key=lambda r: (bool(experts_of[r]), units[r], len(experts_of[r])))
        experts_of[rank].append(expert)
        units[rank] += widths[expert]
    return [sorted(experts) for experts in experts_of]


def rows_per_expert(name: str, widths: Sequence[int]) -> List[int]:
    """Number of rows that each expert has in a tensor of ``Experts``.

    Args:
        name: ``w1``, ``b1``, ``w2``, ``b2`` or ``w3``.
        widths: hidden units of each expert.
    """
    return [1] * len(widths) if name == ROWS_BY_EXPERT else list(widths)


def take_experts(name: str, whole: Tensor, widths: Sequence[int], experts: Sequence[int]) -> Tensor:
    """The rows of some experts, in their order, out of those of all experts."""
    parts = whole.split(rows_per_expert(name, widths))
    return torch.cat([whole[:0]] + [parts[e] for e in experts])


def concat_experts(
    name: str,
    parts: Sequence[Tensor],
    widths: Sequence[int],
    experts_of: Sequence[Sequence[int]],
    experts: Optional[Sequence[int]] = None,
) -> Tensor:
    """The rows of experts out of those that each rank has.

    Args:
        name: see ``rows_per_expert``.
        parts: rows of the experts of each rank.
        widths: hidden units of each expert.
        experts_of: numbers of the experts of each rank.
        experts: those to take, in this order; ``None``: all.
    """
    rows = rows_per_expert(name, widths)
    pieces: Dict[int, Tensor] = {}
    for part, own in zip(parts, experts_of):
        pieces.update(zip(own, part.split([rows[e] for e in own])))
    wanted = range(len(widths)) if experts is None else experts
    return torch.cat([parts[0][:0]] + [pieces[e] for e in wanted])
