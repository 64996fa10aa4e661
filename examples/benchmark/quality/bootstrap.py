"""Paired differences between systems, with bootstrap intervals.

Two systems have been trained with the same seeds and tested on the same chunks of text, so that both seeds
and chunks pair up. A draw of the bootstrap takes as many seeds and as many chunks as there are, with
replacement and independently of each other, the same ones for both systems (for crossed
factors: Owen 2007, "The pigeonhole bootstrap"). The interval is that of the percentiles.
"""

from __future__ import annotations

import functools
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

    @property
    def decides(self) -> bool:
        """Whether one system is better; with one seed the interval is of the text alone, and says nothing."""
        return self.seeds > 1 and self.excludes_zero


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

    count, chunks = sums[0].shape[:2]
    draws = compare(*(score(each, *_weights(count, chunks)) for each in sums))
    ones = numpy.ones((1, count)), numpy.ones((1, chunks))
    mean = compare(*(score(each, *ones) for each in sums)).item()
    low, high = numpy.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(mean, low, high, count)


@functools.lru_cache(maxsize=8)
def _weights(seeds: int, chunks: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """How often each draw of the bootstrap takes each seed, (draws, S), and each chunk, (draws, C)."""
    generator = numpy.random.default_rng(0)
    drawn = [
        [numpy.bincount(generator.integers(n, size=n), minlength=n) for n in (seeds, chunks)]
        for _ in range(DRAWS)
    ]
    return tuple(numpy.array(weights, dtype=float) for weights in zip(*drawn))


def _bits(sums_SCK: numpy.ndarray, seed_DS: numpy.ndarray, chunk_DC: numpy.ndarray) -> numpy.ndarray:
    """Mean over seeds of the bits for each token, (D,)."""
    totals_DSK = numpy.tensordot(chunk_DC, sums_SCK, axes=(1, 1))
    return numpy.average(totals_DSK[..., 0] / totals_DSK[..., 1], axis=1, weights=seed_DS)


def _bleu(sums_SCK: numpy.ndarray, seed_DS: numpy.ndarray, chunk_DC: numpy.ndarray) -> numpy.ndarray:
    """Mean over seeds of BLEU, (D,)."""
    totals_DSK = numpy.tensordot(chunk_DC, sums_SCK, axes=(1, 1)).astype(int).tolist()
    scores_DS = [
        [
            BLEU.compute_bleu(
                correct=k[:4], total=k[4:8], sys_len=k[8], ref_len=k[9], smooth_method="exp"
            ).score
            for k in totals_SK
        ]
        for totals_SK in totals_DSK
    ]
    return numpy.average(scores_DS, axis=1, weights=seed_DS)


def _relative_perplexity(ours: numpy.ndarray, theirs: numpy.ndarray) -> numpy.ndarray:
    return 2 ** (ours - theirs) - 1


def _points(ours: numpy.ndarray, theirs: numpy.ndarray) -> numpy.ndarray:
    return ours - theirs
