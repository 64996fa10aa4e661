"""Widths of experts of different sizes (HMoE, arXiv 2408.10681)."""

from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence

from ..moe.options import OptionError, Options, option

MULTIPLE = 8
"""Widths are multiples of this, which products on accelerators ask for."""

NAMES = ("uniform", "arithmetic", "geometric", "hybrid")


@dataclass(frozen=True)
class SizeOptions(Options):
    """How wide the experts are; the names are flat."""

    expert_sizes: str = option(
        "uniform",
        "Relative hidden widths of the experts (HMoE): uniform, arithmetic, geometric, hybrid, or one "
        "number for each expert with commas between.",
    )
    total_ffn_dim: Optional[str] = option(
        None,
        "Hidden units of all experts together, or 8x for eight times the ffn-embed-dim; if not given, "
        "moe-experts times the ffn-embed-dim, and the ffn-embed-dim itself with moe-spawn-method split.",
    )

    def contradictions(self, experts: int) -> Iterator[OptionError]:
        """See the parent."""
        for find in (lambda: size_ratios(self.expert_sizes, experts), lambda: self.total(1)):
            try:
                find()
            except OptionError as error:
                yield error

    def total(self, ffn_dim: int) -> Optional[int]:
        """Hidden units of all experts together, if given; ``8x`` is in units of ``ffn_dim``."""
        if self.total_ffn_dim is None:
            return None
        text = self.total_ffn_dim
        number = text[:-1] if text.endswith("x") else text
        if not number.isdecimal() or int(number) < 1:
            raise OptionError(
                "total_ffn_dim",
                "`total_ffn_dim` must be a whole number greater than 0, or one followed by x, but is "
                f"{text}.",
            )
        return int(number) * (ffn_dim if text.endswith("x") else 1)

    def widths(self, experts: int, ffn_dim: int, split: bool = False) -> List[int]:
        """Hidden units of each expert.

        Args:
            experts: E.
            ffn_dim: hidden units of the base expert.
            split: whether they are divided among the experts unless a total is given.

        Raises:
            OptionError: sizes or totals that make no such experts.
        """
        total = self.total(ffn_dim) or (ffn_dim if split else experts * ffn_dim)
        return expert_widths(size_ratios(self.expert_sizes, experts), total)


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
        raise OptionError(
            "expert_sizes",
            f"`expert_sizes` must be one of {', '.join(NAMES)} or {experts} numbers greater than 0 with "
            f"commas between, but are {sizes!r}.",
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
        raise OptionError(
            "total_ffn_dim",
            f"`total_ffn_dim` must be at least {experts * MULTIPLE} for {experts} experts, but is {total}.",
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
