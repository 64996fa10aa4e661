"""Which values (tokens, words, bins) each expert gets more often than the others do."""

from dataclasses import dataclass
from typing import Any, List

import numpy as np

from .sample import Array, Choices
from .sparse import sparse

PRIOR = 10.0
"""Occurrences of a value, routed like all others, that are added before values are ranked."""


def table(choices: Choices, value_T: Array, values: int) -> Any:
    """How often each expert got each value: sparse, (values, E), float64; negative values are left out."""
    value_N = value_T[choices.row_N]
    kept_N = value_N >= 0
    return sparse().csr_matrix(
        (choices.share_N[kept_N].astype(np.float64), (value_N[kept_N], choices.expert_N[kept_N])),
        shape=(values, choices.experts),
    )


@dataclass(frozen=True)
class Lifted:
    """A value that an expert gets more often than others.

    Attributes:
        value: its number.
        count: how often the expert got it.
        share: of all its occurrences, how many the expert got.
        lift: that, in units of the expert's share of all values; 1: neither more nor less often.
    """

    value: int
    count: float
    share: float
    lift: float


def top_values(
    choices: Choices, value_T: Array, values: int, most: int, at_least: float = 2
) -> List[List[Lifted]]:
    """For each expert the values that it gets more often than others, the most telling first.

    They are ranked by the lift that they would have with ``PRIOR`` occurrences more that are routed like all
    others, so that a value that is often there comes before one that was seen twice.

    Args:
        choices: who got what.
        value_T: value of each row; negative: none.
        values: V.
        most: how many for each expert.
        at_least: how often an expert must have got a value.
    """
    count_VE = table(choices, value_T, values)
    seen_V = np.bincount(value_T[value_T >= 0], minlength=values).astype(np.float64)
    load_E = np.asarray(count_VE.sum(0)).ravel()
    of_experts = count_VE.tocsc()
    found: List[List[Lifted]] = []
    for expert in range(choices.experts):
        part = slice(of_experts.indptr[expert], of_experts.indptr[expert + 1])
        value_K, count_K = of_experts.indices[part], of_experts.data[part]
        usual = load_E[expert] / max(seen_V.sum(), 1)
        if usual == 0:
            found.append([])
            continue
        lift_K = count_K / seen_V[value_K] / usual
        rank_K = (count_K + PRIOR * usual) / (seen_V[value_K] + PRIOR) / usual
        good_K = np.flatnonzero((count_K >= at_least) & (lift_K > 1))
        order = good_K[np.lexsort((value_K[good_K], -count_K[good_K], -rank_K[good_K]))][:most]
        found.append(
            [
                Lifted(
                    int(value_K[i]),
                    float(count_K[i]),
                    float(count_K[i] / seen_V[value_K[i]]),
                    float(lift_K[i]),
                )
                for i in order
            ]
        )
    return found
