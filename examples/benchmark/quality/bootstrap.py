"""Paired differences between systems, with bootstrap intervals.

Two systems have been trained with the same seeds and tested on the same chunks of text, so that both seeds
and chunks pair up. A draw of the bootstrap takes as many seeds and as many chunks as there are, with
replacement and independently of each other, the same ones for both systems (for crossed
factors: Owen 2007, "The pigeonhole bootstrap"). The interval is that of the percentiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from sacrebleu.metrics import BLEU

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """What one system has more than another.

    Attributes:
        mean: the difference itself; of perplexities the ratio less 1.
        low: lower end of the interval.
        high: upper end.
        seeds: how many seeds both systems have.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does."""
        return self.low > 0 or self.high < 0


def difference(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Difference:
    """The paired difference of two systems on the test set, over the seeds that both have.

    Args:
        ours: records of one system; see `evaluate.py`.
        theirs: records of the other.

    Returns:
        with BLEU the difference in points, else the relative difference of the perplexities, each the
        perplexity of the mean loss over seeds.

    Raises:
        ValueError: no seed in common, or other test sets.
    """
    first, second = ({record["seed"]: record for record in records} for records in (ours, theirs))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError("the two systems have no seed in common")
    name = "bleu_chunks" if "bleu_chunks" in first[seeds[0]]["test"] else "chunks"
    sums = [
        numpy.array([each[seed]["test"][name] for seed in seeds], dtype=float) for each in (first, second)
    ]
    if sums[0].shape != sums[1].shape:
        raise ValueError("the two systems were tested on other texts")
    score = _bleu if name == "bleu_chunks" else _bits
    compare = _points if name == "bleu_chunks" else _relative_perplexity

    generator = numpy.random.default_rng(0)
    draws = numpy.empty(DRAWS)
    count, chunks = sums[0].shape[:2]
    for draw in range(DRAWS):
        seed_weights = numpy.bincount(generator.integers(count, size=count), minlength=count)
        chunk_weights = numpy.bincount(generator.integers(chunks, size=chunks), minlength=chunks)
        draws[draw] = compare(*(score(each, seed_weights, chunk_weights) for each in sums))
    ones = numpy.ones(count), numpy.ones(chunks)
    low, high = numpy.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(compare(*(score(each, *ones) for each in sums)), low, high, count)


def _bits(sums_SCK: numpy.ndarray, seed_weights: numpy.ndarray, chunk_weights: numpy.ndarray) -> float:
    """Mean over seeds of the bits for each token."""
    totals_SK = numpy.tensordot(sums_SCK, chunk_weights, axes=(1, 0))
    return float(numpy.average(totals_SK[:, 0] / totals_SK[:, 1], weights=seed_weights))


def _bleu(sums_SCK: numpy.ndarray, seed_weights: numpy.ndarray, chunk_weights: numpy.ndarray) -> float:
    """Mean over seeds of BLEU."""
    totals_SK = numpy.tensordot(sums_SCK, chunk_weights, axes=(1, 0))
    scores = [
        BLEU.compute_bleu(
            correct=list(k[:4]), total=list(k[4:8]), sys_len=int(k[8]), ref_len=int(k[9]), smooth_method="exp"
        ).score
        for k in totals_SK
    ]
    return float(numpy.average(scores, weights=seed_weights))


def _relative_perplexity(ours: float, theirs: float) -> float:
    return 2 ** (ours - theirs) - 1


def _points(ours: float, theirs: float) -> float:
    return ours - theirs
