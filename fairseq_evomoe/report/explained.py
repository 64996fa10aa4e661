"""What decides where a token goes: the token itself, its place, or what stands around it.

A row's routing is the vector of what its pairs count.  Its variance within a group of rows is estimated
without bias, ``s_g^2 = sum_t |r_t - mean_g|^2 / (n_g - 1)``, so that groups of few rows do not seem to
explain anything; groups of one row tell nothing and are left out throughout.
"""

from typing import Any, Dict, Optional, Sequence

import numpy as np

from .sample import Array, Choices
from .sparse import sparse


def variance_within(choices: Choices, group_T: Array, kept_T: Array) -> float:
    """Mean over rows of the variance of the routing within their group.

    Args:
        choices: who got what.
        group_T: number of each row's group.
        kept_T: bool, the rows that count; every group must have at least two of them.
    """
    _, group_K = np.unique(group_T[kept_T], return_inverse=True)
    index_T = np.full(choices.rows, -1)
    index_T[kept_T] = group_K
    group_N = index_T[choices.row_N]
    inside_N = group_N >= 0
    group_N, share_N = group_N[inside_N], choices.share_N[inside_N].astype(np.float64)
    size_G = np.bincount(group_K).astype(np.float64)
    sum_GE = sparse().csr_matrix(
        (share_N, (group_N, choices.expert_N[inside_N])), shape=(len(size_G), choices.experts)
    )
    square_G = np.asarray(sum_GE.multiply(sum_GE).sum(1)).ravel()
    squares_G = np.bincount(group_N, share_N**2, len(size_G))
    variance_G = (squares_G - square_G / size_G) / (size_G - 1)
    return float((size_G * variance_G).sum() / size_G.sum())


def shares(choices: Choices, groupings: Sequence[Array]) -> Optional[Sequence[float]]:
    """Share of the variance that each grouping explains beyond those before it, and what is left in the end.

    Args:
        choices: who got what.
        groupings: number of each row's group; each divides the groups of the one before.

    Returns:
        one number more than groupings, which sum to 1; ``None``: too few rows, or all are routed alike.
    """
    _, group_T, size_G = np.unique(groupings[-1], return_inverse=True, return_counts=True)
    kept_T = size_G[group_T.ravel()] > 1
    if kept_T.sum() < 2:
        return None
    left = [variance_within(choices, np.zeros(choices.rows, dtype=np.int64), kept_T)]
    if left[0] <= 1e-12:
        return None
    for group_T in groupings:
        left.append(min(max(variance_within(choices, group_T, kept_T), 0.0), left[-1]))
    steps = [before - after for before, after in zip(left, left[1:])] + [left[-1]]
    return [step / left[0] for step in steps]


def explained(choices: Choices, token_T: Array, position_T: Array) -> Optional[Dict[str, Any]]:
    """Share of the routing's variance that is explained by a row's token, by its place beyond that, and not.

    What neither explains is due to the context.  A place is a bin of positions: 0, 1, 2-3, 4-7, 8-15, ...

    Args:
        choices: who got what.
        token_T: a number for each row's token (and head).
        position_T: its place in the sequence.

    Returns:
        ``id``, ``position`` and ``context``, which sum to 1; ``position_alone``: what the place explains of
        all rows' variance by itself; ``covered``: share of the rows that the first three are of, whose token
        was seen at such a place at least twice.  ``None``: too few rows, or all are routed alike.
    """
    bin_T = np.floor(np.log2(position_T + 1)).astype(np.int64)
    joint_T = token_T.astype(np.int64) * (bin_T.max(initial=0) + 1) + bin_T
    parts, alone = shares(choices, [token_T, joint_T]), shares(choices, [bin_T])
    if parts is None or alone is None:
        return None
    _, size_G = np.unique(joint_T, return_counts=True)
    return {
        "id": parts[0],
        "position": parts[1],
        "context": parts[2],
        "position_alone": alone[0],
        "covered": float(size_G[size_G > 1].sum() / max(len(joint_T), 1)),
    }
