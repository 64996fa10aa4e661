"""Which experts work together: on the same token in a layer, and from one layer to the next."""

from typing import Any, Dict, Optional

import numpy as np

from .loads import information
from .sample import Array, Choices, LayerSample
from .sparse import sparse


def within(choices: Choices) -> Optional[Array]:
    """How often the rows of one expert have another one, too: float64, (E, E), row i: of those of expert i.

    ``None`` where no row has several experts, or each has all of them.  The diagonal is 1, or 0 for an idle
    expert.
    """
    if choices.dense or len(choices.row_N) == len(np.unique(choices.row_N)):
        return None
    chosen_TE = sparse().csr_matrix(
        (np.ones(len(choices.row_N)), (choices.row_N, choices.expert_N)),
        shape=(choices.rows, choices.experts),
    )
    chosen_TE.data[:] = 1  # where tokens pass experts several times, some have one twice
    count_EE = (chosen_TE.T @ chosen_TE).toarray()
    result: Array = count_EE / np.maximum(count_EE.diagonal(), 1)[:, None]
    return result


def across(first: LayerSample, second: LayerSample) -> Optional[Dict[str, Any]]:
    """Where the rows of each expert of a layer go in a later one; ``None`` if either has one expert.

    Only a row's best expert counts.  ``information``: how much of the choice in the second layer is known to
    who knows that in the first.
    """
    if first.choices is None or second.choices is None or first.side != second.side:
        return None
    one_T, other_T = first.choices.best_T, second.choices.best_T
    kept_T = (one_T >= 0) & (other_T >= 0)
    shape = (first.experts, second.experts)
    count_EE = np.bincount(one_T[kept_T] * shape[1] + other_T[kept_T], minlength=shape[0] * shape[1])
    count_EE = count_EE.reshape(shape).astype(np.float64)
    return {
        "from": first.name,
        "to": second.name,
        "probability": (count_EE / np.maximum(count_EE.sum(1, keepdims=True), 1)).tolist(),
        "information": information(count_EE),
    }
