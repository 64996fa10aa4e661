"""Means of similar tokens instead of tokens, found by locality-sensitive hashing (LSH-MoE)."""

from dataclasses import dataclass
from typing import Tuple

import torch
from torch import Tensor

from ..noise import seed_of


@dataclass
class Buckets:
    """Tokens of one expert that are similar make a bucket.

    Attributes:
        x_ND: the tokens.
        bucket_N: int64, bucket of each.
        group_B: int64, the group (expert) of each bucket, ascending.
        mean_BD: mean of each bucket's tokens, with gradient.
    """

    x_ND: Tensor
    bucket_N: Tensor
    group_B: Tensor
    mean_BD: Tensor

    def spread(self, out_BD: Tensor) -> Tensor:
        """The tokens' outputs from those of the means: ``E(mean) + (x - mean)``, shape (N, D)."""
        residual_ND = self.x_ND - self.mean_BD.index_select(0, self.bucket_N)
        return out_BD.index_select(0, self.bucket_N) + residual_ND


@dataclass(frozen=True)
class LSH:
    """Cross-polytope hashing: a hash of x is the signed index of the largest ``|R x|``, R random.

    Tokens are in one bucket if all their hashes are the same.

    Attributes:
        hashes: number of hashes; more of them make smaller buckets.
        dim: rows of each R, half the values of a hash; 0: the width of a token, as of a rotation.
        key: numbers and texts that R depends on.
    """

    hashes: int = 6
    dim: int = 0
    key: Tuple = ()

    def buckets(self, x_ND: Tensor, group_N: Tensor) -> Buckets:
        """Sort tokens into buckets.

        Args:
            x_ND: tokens, shape (N, D).
            group_N: int64, group of each, ascending; buckets are within a group.
        """
        count = x_ND.shape[0]
        bucket_N = group_N
        for hash_N in self.hash(x_ND.detach()):
            # numbered anew after each hash, so that the numbers stay small
            bucket_N = torch.unique(bucket_N * 2 * self._rows(x_ND) + hash_N, return_inverse=True)[1]
        buckets = int(bucket_N.max()) + 1 if count else 0
        group_B = group_N.new_zeros(buckets).index_copy(0, bucket_N, group_N)
        sums = torch.promote_types(x_ND.dtype, torch.float32)
        sum_BD = torch.zeros(buckets, x_ND.shape[1], dtype=sums, device=x_ND.device)
        sum_BD = sum_BD.index_add(0, bucket_N, x_ND.to(sums))
        count_B1 = torch.bincount(bucket_N, minlength=buckets).unsqueeze(1)
        return Buckets(x_ND, bucket_N, group_B, (sum_BD / count_B1).to(x_ND.dtype))

    def hash(self, x_ND: Tensor) -> Tensor:
        """The hashes of tokens: int64, shape (hashes, N), from 0 to twice the rows of R."""
        rows = self._rows(x_ND)
        random_KD = self._projection(self.hashes * rows, x_ND.shape[1]).to(x_ND.device)
        rotated_NHR = (x_ND.float() @ random_KD.t()).view(x_ND.shape[0], self.hashes, rows)
        index_NH = rotated_NHR.abs().argmax(-1)
        negative_NH = rotated_NHR.gather(-1, index_NH.unsqueeze(-1)).squeeze(-1) < 0
        return (index_NH + rows * negative_NH).t()

    def _rows(self, x_ND: Tensor) -> int:
        return self.dim or x_ND.shape[1]

    def _projection(self, rows: int, dim: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("lsh", *self.key, rows, dim))
        return torch.randn(rows, dim, generator=generator)
