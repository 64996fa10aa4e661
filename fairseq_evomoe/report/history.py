"""One run at several updates: how far the routing has moved, and which expert came from which."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..evolution.merge import unit_features
from .sample import Array, Choices, LayerSample

UNITS = 64
"""Hidden units of an expert that are looked for in those before it."""


def overlap(one: Choices, other: Choices) -> float:
    """How much two routings of the same rows have in common, from 0 to 1.

    ``sum min(share, share') / mean of the sums``: with one expert a row the share of the rows that have the
    same, with several the share of the pairs that both have.
    """
    _, i, j = np.intersect1d(_keys(one), _keys(other), assume_unique=True, return_indices=True)
    common = np.minimum(one.share_N[i], other.share_N[j]).sum(dtype=np.float64)
    total = one.share_N.sum(dtype=np.float64) + other.share_N.sum(dtype=np.float64)
    return float(2 * common / total) if total else 1.0


def _keys(choices: Choices) -> Array:
    keys: Array = choices.row_N.astype(np.int64) * choices.experts + choices.expert_N
    return keys


def parents(
    before: Dict[str, Tensor], widths_before: Sequence[int], after: Dict[str, Tensor], widths: Sequence[int]
) -> Tuple[List[int], List[float]]:
    """The expert of an earlier checkpoint that each of a later one is most like.

    Each hidden unit of the later expert is compared with all of the earlier one, by the cosine of all its
    weights, and its greatest cosine counts: so slices and other orders of units are recognised.  Where the
    number of experts is the same, each is taken to come from the one at its own place.

    Args:
        before: ``w1``, ``b1``, ``w2``, ``b2`` and, if gated, ``w3`` of the experts before.
        widths_before: hidden units of each.
        after: those of the experts afterwards.
        widths: hidden units of each.

    Returns:
        of each later expert, the number of the earlier one, and the mean over (up to ``UNITS``) hidden units
        of the greatest cosine.
    """
    same = len(widths_before) == len(widths)
    old_EKF = [F.normalize(x.float(), dim=1) for x in unit_features(before, widths_before)]
    found, likeness = [], []
    for expert, new_KF in enumerate(unit_features(after, widths)):
        picked = torch.linspace(0, len(new_KF) - 1, min(UNITS, len(new_KF))).round().long()
        new_KF = F.normalize(new_KF[picked].float(), dim=1)
        tried = [expert] if same else range(len(old_EKF))
        scores = {e: (new_KF @ old_EKF[e].t()).max(1).values.mean().item() for e in tried}
        best = max(scores, key=lambda e: (scores[e], -e))
        found.append(best)
        likeness.append(scores[best])
    return found, likeness


def generation(before: Optional[LayerSample], this: LayerSample, update: int) -> Dict[str, Any]:
    """The experts of a layer at an update, with their parents.

    Returns:
        ``update``, ``experts``, ``load`` (share of the rows of each) and, unless it is the first,
        ``parents`` and ``likeness``; see ``parents``.
    """
    load = [1.0] if this.choices is None else (this.choices.load_E / max(this.choices.rows, 1)).tolist()
    widths = [width for width in this.widths if width]
    one: Dict[str, Any] = {"update": update, "experts": len(widths), "load": load[: len(widths)]}
    if before is not None:
        old = [width for width in before.widths if width]
        one["parents"], one["likeness"] = parents(before.tensors, old, this.tensors, widths)
    return one


def movement(layers: Sequence[LayerSample]) -> Dict[str, Any]:
    """How the routing of the same rows changed over a layer's checkpoints, oldest first.

    Returns:
        ``drift``: from each to the next, how much of the routing is another; ``saturation``: of each, how
        much is as in the last (OLMoE, arXiv 2409.02060).  ``None``, where the experts or the rows are others.
    """
    common = [_common(one, layers[-1]) for one in layers]
    steps = [_common(one, other) for one, other in zip(layers, layers[1:])]
    return {"drift": [None if x is None else 1 - x for x in steps], "saturation": common}


def _common(one: LayerSample, other: LayerSample) -> Optional[float]:
    if one.choices is None or other.choices is None:
        return None
    if (one.choices.experts, one.choices.rows) != (other.choices.experts, other.choices.rows):
        return None
    return overlap(one.choices, other.choices)
