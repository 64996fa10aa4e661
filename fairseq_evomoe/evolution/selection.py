"""Which expert becomes how many, when the experts of a layer multiply.

That there be more of the experts with a greater utility, which comes from gradients, is from Expert
Upcycling (arXiv 2604.19835), of which only the abstract was read: what the utility is, and how many children
it gives, is ours.
"""

from enum import Enum
from typing import List, Optional

from torch import Tensor


class Select(str, Enum):
    """What the number of an expert's children is proportional to."""

    even = "even"
    load = "load"
    gradient = "gradient"


def allot(experts: int, children: int, demand_E: Optional[Tensor] = None) -> List[int]:
    """How many children each expert has: at least one, as the demand says, and as many as are wanted in all.

    Each further child is given to the expert whose demand for each child that it has is the greatest, of
    equal ones to the first (Adams' method of apportionment), so that the greatest demand for any child is as
    small as it can be.

    Args:
        experts: E, number of experts.
        children: of all of them; at least E.
        demand_E: at least 0; ``None``, or no demand at all: that of all experts is equal.

    Raises:
        ValueError: fewer children than experts.
    """
    if children < experts:
        raise ValueError(f"{experts} experts cannot have {children} children, of which each has one")
    demand = [1.0] * experts if demand_E is None else demand_E.double().cpu().clamp(min=0).tolist()
    if not any(demand):
        demand = [1.0] * experts
    counts = [1] * experts
    for _ in range(children - experts):
        best = max(range(experts), key=lambda e: (demand[e] / counts[e], -e))
        counts[best] += 1
    return counts
