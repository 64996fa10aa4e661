"""Widths of experts of different sizes (HMoE, arXiv 2408.10681)."""

from typing import List, Sequence

MULTIPLE = 8
"""Widths are multiples of this, which products on accelerators ask for."""

NAMES = ("uniform", "arithmetic", "geometric", "hybrid")


def size_ratios(sizes: str, experts: int) -> List[float]:
    """Relative sizes of the experts.

    The paper gives those of 8 experts: arithmetic 9, 11, ..., 23; geometric 1, 2, ..., 128; hybrid
    1, 1, 1, 1, 2, 2, 4, 4.  For other numbers the progressions keep their ends and the hybrid its shares.

    Args:
        sizes: one of ``NAMES``, or E numbers greater than 0 with commas between.
        experts: E.

    Raises:
        ValueError: anything else.
    """
    place = [i / max(experts - 1, 1) for i in range(experts)]
    if sizes == "uniform":
        return [1.0] * experts
    if sizes == "arithmetic":
        return [9 + 14 * p for p in place]
    if sizes == "geometric":
        return [128**p for p in place]
    if sizes == "hybrid":
        return [1.0 if 2 * i < experts else 2.0 if 4 * i < 3 * experts else 4.0 for i in range(experts)]
    try:
        ratios = [float(part) for part in sizes.strip("[]() ").split(",")]
    except ValueError:
        ratios = []
    if len(ratios) != experts or not all(0 < r < float("inf") for r in ratios):
        raise ValueError(
            "expert_sizes must be one of {} or {} numbers greater than 0 with commas between, but are "
            "{!r}".format(", ".join(NAMES), experts, sizes)
        )
    return ratios


def expert_widths(ratios: Sequence[float], total: int) -> List[int]:
    """Hidden units of each expert: in these proportions, multiples of 8 that sum to the total.

    A total that is no multiple of 8 is rounded to the nearest one.  Equal ratios give equal widths as they
    are, whatever they are a multiple of, if they divide the total.

    Raises:
        ValueError: a total that leaves an expert without hidden units.
    """
    experts = len(ratios)
    if len(set(ratios)) == 1 and total % experts == 0 and total > 0:
        return [total // experts] * experts
    units = round(total / MULTIPLE)
    if units < experts:
        raise ValueError(
            f"total_ffn_dim must be at least {experts * MULTIPLE} for {experts} experts, but is {total}"
        )
    # one block for each expert first, and the largest remainders last, so that the sum is exact
    exact = [r / sum(ratios) * units for r in ratios]
    blocks = [max(int(e), 1) for e in exact]
    while sum(blocks) != units:
        step = 1 if sum(blocks) < units else -1
        movable = [i for i in range(experts) if step > 0 or blocks[i] > 1]
        i = max(movable, key=lambda i: step * (exact[i] - blocks[i]))
        blocks[i] += step
    return [MULTIPLE * b for b in blocks]
