"""Quantiles of numbers that are spread over batches and ranks, from counts that can be added up."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in bins of equal width.

    Numbers outside of the range count in the first or the last bin.  A quantile is exact up to how the
    numbers are spread within one bin.

    Attributes:
        low: where the first bin begins.
        high: where the last one ends.
        bins: B.
    """

    low: float
    high: float
    bins: int

    def counts(self, value_TE: Tensor) -> Tensor:
        """How many of each column's numbers are in each bin: float32, shape (E, B)."""
        experts = value_TE.shape[1]
        bin_TE = ((value_TE - self.low) * (self.bins / (self.high - self.low))).floor_()
        # what is not finite, fairseq finds after the backward pass, and drops the counts with the update
        index_TE = bin_TE.nan_to_num_(0.0).clamp_(0, self.bins - 1).long()
        counts_EB = torch.zeros(experts, self.bins, device=value_TE.device)
        # not by torch.bincount, for which a GPU waits
        return counts_EB.scatter_add_(1, index_TE.t(), torch.ones_like(index_TE.t(), dtype=torch.float32))

    def exceeded_by(self, share: Tensor, counts_EB: Tensor) -> Tensor:
        """The number that this share of each column's numbers is over.

        Args:
            share: scalar from 0 to 1.
            counts_EB: sums of ``counts``.

        Returns:
            float32, shape (E,).
        """
        below_EB = counts_EB.long().cumsum(1).double()  # whole numbers: the same on every run
        wanted_E1 = (1 - share.double()) * below_EB[:, -1:]
        bin_E1 = (below_EB < wanted_E1).sum(1, keepdim=True).clamp(max=self.bins - 1)
        count_E1 = counts_EB.double().gather(1, bin_E1)
        before_E1 = below_EB.gather(1, bin_E1) - count_E1
        part_E1 = ((wanted_E1 - before_E1) / count_E1.clamp(min=1)).clamp(0, 1)
        width = (self.high - self.low) / self.bins
        return (self.low + (bin_E1 + part_E1) * width).squeeze(1).float()
