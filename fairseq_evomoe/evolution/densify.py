"""One dense feed-forward network out of many experts: knowledge gathering (OneS, arXiv 2201.10890).

The experts of a layer become one that is as wide as a dense model's feed-forward network.  The paper names
four ways, and refines the result by distillation; what its abstract leaves open is decided here, and ours:

- ``sum``: the sum of the experts' matrices and biases, taken at its word.  Of E equal experts it is not one
  of them but E times each matrix: a start for training, and no model by itself.
- ``average``: their mean.  Of equal experts it is each of them.
- ``topk``: the hidden units with the greatest norm, over all experts at once.  The norm is that of a unit's
  rows of ``w1`` and ``w2`` together; each expert's ``b2`` counts by the share of its units that are kept, so
  that the parts of a network that was split become that network again.  If there are fewer units than the
  dense network has, the others are zero and do nothing.
- ``svd``: the mean of the truncated singular value decompositions of each expert's ``w1`` and ``w2``; biases
  are averaged.  With full rank it is ``average``.

Nothing is weighed by the gate, whose mean weights no checkpoint tells, nor by a scaling factor of the layer,
which makes up for such weights: each expert counts as it is.  Where the two do not make up for each other,
the dense network's output is greater or less than that of the layer.

Shape suffixes: E experts, K hidden units of one expert, H those of all, D width of a token.
"""

from typing import Dict, Mapping, Optional, Sequence

import torch
from torch import Tensor

from ..moe.experts import ROWS_BY_EXPERT
from .merge import MergeError

METHODS = ("sum", "average", "topk", "svd")


def gather_experts(
    tensors: Mapping[str, Tensor],
    widths: Sequence[int],
    hidden: int,
    method: str,
    rank: Optional[int] = None,
) -> Dict[str, Tensor]:
    """One expert out of many.

    Args:
        tensors: ``w1``, ``b1``, ``w2`` and ``b2`` of the experts.
        widths: hidden units of each.
        hidden: hidden units of the expert that is made.
        method: one of ``METHODS``.
        rank: of ``svd``; the hidden units divided by E if not given, and no more than there can be.

    Returns:
        the tensors of the new expert, in the dtypes of the old ones; computed in float64.

    Raises:
        MergeError: widths that the method does not take, or a rank that there cannot be.
    """
    exact = {name: x.double() for name, x in tensors.items()}
    if method == "topk":
        new = _strongest_units(exact, widths, hidden)
    else:
        _check_widths(widths, hidden, method)
        each = {name: x.reshape((len(widths), -1) + x.shape[1:]) for name, x in exact.items()}
        if method == "svd":
            rank = _checked_rank(rank, len(widths), *each["w1"].shape[1:])
            each.update({name: truncated(each[name], rank) for name in ("w1", "w2")})
        new = {name: x.sum(0) if method == "sum" else x.mean(0) for name, x in each.items()}
    return {name: x.to(tensors[name].dtype) for name, x in new.items()}


def _check_widths(widths: Sequence[int], hidden: int, method: str) -> None:
    if set(widths) == {hidden}:
        return
    listed = ", ".join(map(str, sorted(set(widths))))
    raise MergeError(
        f"`method` {method} needs experts as wide as the dense model's feed-forward networks, which have "
        f"{hidden} hidden units, and these have {listed}: use topk."
    )


def _checked_rank(rank: Optional[int], experts: int, width: int, dim: int) -> int:
    most = min(width, dim)
    if rank is None:
        return min(max(width // experts, 1), most)
    if not 1 <= rank <= most:
        raise MergeError(
            f"`rank` must be from 1 to {most}, the rank that an expert's matrices have, but is {rank}."
        )
    return rank


def truncated(matrix_EKD: Tensor, rank: int) -> Tensor:
    """The nearest matrices of a rank: the greatest singular values of each, and their vectors."""
    u_EKR, value_ER, v_ERD = torch.linalg.svd(matrix_EKD, full_matrices=False)
    return (u_EKR[..., :rank] * value_ER[:, None, :rank]) @ v_ERD[:, :rank]


def _strongest_units(tensors: Mapping[str, Tensor], widths: Sequence[int], hidden: int) -> Dict[str, Tensor]:
    """The hidden units with the greatest norm, in the order that they have."""
    norm_H = tensors["w1"].square().sum(1) + tensors["w2"].square().sum(1)
    kept = torch.sort(norm_H, descending=True, stable=True).indices[:hidden].sort().values
    width_E = torch.as_tensor(widths)
    expert_H = torch.arange(len(widths)).repeat_interleave(width_E)
    share_E = torch.bincount(expert_H[kept], minlength=len(widths)).double() / width_E
    new = {ROWS_BY_EXPERT: (share_E @ tensors[ROWS_BY_EXPERT]).unsqueeze(0)}
    for name in ("w1", "b1", "w2"):
        units = tensors[name][kept]
        new[name] = torch.cat([units, units.new_zeros((hidden - len(kept),) + units.shape[1:])])
    return new
