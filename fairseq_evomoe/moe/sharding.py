"""Which of the ranks that share a layer's experts has which of them, and how all are brought together."""

from typing import Dict, List, Optional, Sequence

import torch
from torch import Tensor

from .experts import Experts, rows_per_expert
from .ranks import Ranks

__all__ = [
    "allocate",
    "attach_ranks",
    "concat_experts",
    "deal_experts",
    "gather_experts",
    "gather_rows",
    "local_rows",
    "rows_per_expert",
    "take_experts",
]


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


def allocate(experts: Experts, widths: Sequence[int], ranks: Ranks) -> None:
    """Let experts have these widths; each rank has room for its own, whose contents are undefined."""
    parallel = ranks.parallel
    experts.allocate(widths, deal_experts(widths, parallel)[ranks.group_rank] if parallel > 1 else None)


def local_rows(experts: Experts, name: str, whole: Tensor) -> Tensor:
    """The rows that this rank has of a tensor of all experts, such as one of a checkpoint."""
    return take_experts(name, whole, experts.widths, experts.local) if experts.sharded else whole


def gather_rows(
    experts: Experts, ranks: Ranks, name: str, local: Tensor, to: Optional[int] = None
) -> Optional[Tensor]:
    """A tensor of all experts, from the rows that each rank has; the ranks must all call this.

    Args:
        experts: those of this rank.
        ranks: that share the experts.
        name: ``w1``, ``b1``, ``w2``, ``b2`` or ``w3``.
        local: this rank's rows of it, or of what has a row for each of its rows.
        to: ``group_rank`` of the only rank that shall get it; ``None``: all.

    Returns:
        the tensor, or ``None`` where it is not wanted.
    """
    if not experts.sharded:
        return local
    widths = experts.widths
    experts_of = deal_experts(widths, ranks.parallel)
    sizes = [sum(rows_per_expert(name, [widths[e] for e in numbers])) for numbers in experts_of]
    parts = ranks.gather_experts(local, sizes, to)
    return concat_experts(name, parts, widths, experts_of) if parts else None


def gather_experts(experts: Experts, ranks: Ranks) -> Dict[str, Tensor]:
    """The tensors of all experts by name; the ranks that share them must all call this."""
    gathered = {}
    for name, tensor in experts.tensors().items():
        whole = gather_rows(experts, ranks, name, tensor)
        assert whole is not None  # every rank has asked for it
        gathered[name] = whole
    return gathered


def attach_ranks(experts: Experts, before: Ranks, ranks: Ranks) -> None:
    """Deal the experts that ``before`` share out anew among ``ranks``; all of them must call this."""
    whole = gather_experts(experts, before)
    allocate(experts, experts.widths, ranks)
    experts.fill({name: local_rows(experts, name, tensor) for name, tensor in whole.items()})
