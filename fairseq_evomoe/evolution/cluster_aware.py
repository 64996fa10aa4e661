"""Experts out of clusters of what the base expert sees: cluster-aware upcycling (arXiv 2604.13508).

Only the abstract was read: activations are clustered, each cluster's singular value decomposition makes an
expert, and the centroids are the rows of the gate.  What that is here is ours:

- The clusters are of equal sizes (balanced k-means), so that the gate's loads are about even.
- Of a cluster's tokens the principal directions are the fewest that have ``ENERGY`` of the sum of squares.
  Its expert is the base, but that the share ``strength`` of what lies outside of them is taken from the rows
  of ``w1`` and ``w3``: tokens of the cluster are worked on as before, nearly, and others less and less.
- A row of the gate is the centroid without what it has of the mean of all tokens, which would favour an
  expert whatever the token is, and all rows are scaled so that the logits of the sample have a variance of 1.

Suffixes: N tokens, D their width, E experts, R principal directions.
"""

from dataclasses import dataclass
from typing import List

import torch
from torch import Tensor

from ..moe.running_sums import running_sums
from .clustering import balanced_kmeans

ENERGY = 0.9
STEPS = 20


@dataclass(frozen=True)
class Clusters:
    """What clusters of tokens make of a base expert.

    Attributes:
        direction_ERD: float64, for each expert the principal directions of its cluster, orthonormal rows.
        gate_ED: float32, the rows of the gate.
    """

    direction_ERD: List[Tensor]
    gate_ED: Tensor

    def narrowed(self, expert: int, rows_HD: Tensor, strength: float) -> Tensor:
        """Rows of weights without a share of what lies outside of the cluster's directions."""
        direction_RD = self.direction_ERD[expert].to(rows_HD.device)
        exact = rows_HD.double()
        outside = exact - exact @ direction_RD.t() @ direction_RD
        return (exact - strength * outside).to(rows_HD.dtype)


@torch.no_grad()
def find_clusters(x_ND: Tensor, experts: int, generator: torch.Generator) -> Clusters:
    """The clusters of tokens, one for each expert.

    Args:
        x_ND: tokens, at least as many as experts; the first ones, which would make clusters uneven, are left
            out.
        experts: E.
        generator: of the tokens that clustering starts from.
    """
    x_ND = x_ND[len(x_ND) % experts :].double().cpu()
    cluster_N = balanced_kmeans(x_ND, experts, generator, STEPS)
    mean_D = x_ND.mean(0)
    parts = [x_ND[cluster_N == e] for e in range(experts)]
    gate_ED = torch.stack([part.mean(0) for part in parts]) - mean_D
    if mean_D.norm() > 0:
        gate_ED -= (gate_ED @ mean_D / mean_D.square().sum()).unsqueeze(1) * mean_D
    deviation = (x_ND @ gate_ED.t()).std(dim=1, unbiased=False).square().mean().sqrt()
    gate_ED /= deviation.clamp(min=1e-12)
    return Clusters([_principal(part) for part in parts], gate_ED.float())


def _principal(x_ND: Tensor) -> Tensor:
    """The fewest directions that have ``ENERGY`` of the squares of tokens: (R, D)."""
    _, value_R, direction_RD = torch.linalg.svd(x_ND, full_matrices=False)
    square_R = value_R.square()
    share_R = running_sums(square_R / square_R.sum().clamp(min=1e-300))
    return direction_RD[: int((share_R < ENERGY).sum()) + 1]
