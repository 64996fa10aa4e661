"""Whether two systems differ, are level, or cannot be told apart, from the same seeds of both.

What is compared is the logarithm of the ratio of their perplexities, seed by seed (paired). The interval is
Student's, of 95%. Two systems are level if two one-sided tests, each at 5%, both say that the difference is
within the margin (TOST; Schuirmann 1987), which is so if the interval of 90% is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

MARGIN = 0.01
"""The difference in perplexity that does not matter: 1%, up or down as a ratio."""


@dataclass(frozen=True)
class Difference:
    """What one system's perplexity is more than another's, as a share (0.02: 2% worse).

    Attributes:
        mean: the mean over seeds.
        low: end of the interval of 95%; `nan` with one seed.
        high: the other end.
        seeds: how many both have.
        level: whether the difference is within the margin.
    """

    mean: float
    low: float
    high: float
    seeds: int
    level: bool

    @property
    def verdict(self) -> str:
        """`level`, even if the interval excludes 0; `better`, `worse`, `undecided`; empty with one seed."""
        if self.seeds < 2:
            return ""
        if self.level:
            return "level"
        if self.low > 0 or self.high < 0:
            return "worse" if self.low > 0 else "better"
        return "undecided"

    def __str__(self) -> str:
        """As per cents, with the interval if there is one."""
        text = f"{100 * self.mean:+.1f}%"
        return text if self.seeds < 2 else f"{text} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def compare(
    ours: Mapping[int, float], theirs: Mapping[int, float], margin: float = MARGIN
) -> Difference | None:
    """Compare two systems.

    Args:
        ours: the perplexity of each seed.
        theirs: the same of the other system.
        margin: the share that does not matter.

    Returns:
        `None` if they have no seed in common.
    """
    from scipy.stats import t as student

    ratios = [math.log(ours[seed] / theirs[seed]) for seed in sorted({*ours} & {*theirs})]
    if not ratios:
        return None
    mean, n = statistics.mean(ratios), len(ratios)
    if n == 1:
        return Difference(math.expm1(mean), math.nan, math.nan, 1, False)
    error = statistics.stdev(ratios) / math.sqrt(n)
    wide, narrow = (error * float(student.ppf(q, n - 1)) for q in (0.975, 0.95))
    return Difference(
        mean=math.expm1(mean),
        low=math.expm1(mean - wide),
        high=math.expm1(mean + wide),
        seeds=n,
        level=abs(mean) + narrow < math.log1p(margin),
    )
