"""Balanced k-means."""

import torch
from torch import Tensor

from ..moe.assignment import balanced_assignment


@torch.no_grad()
def balanced_kmeans(x_ND: Tensor, clusters: int, generator: torch.Generator, steps: int = 100) -> Tensor:
    """Clusters of equal sizes of points around their means.

    Starts from random points as means and goes, as Lloyd's algorithm, from the best assignment to the means
    and back until nothing changes.  With equal sizes the assignment of the smallest squared distances is
    that of the largest dot products, since the squares of the means add the same for every assignment.

    Args:
        x_ND: points, shape (N, D).
        clusters: K; divides N.
        generator: chooses the points to start from; nothing else is random.
        steps: the largest number of iterations.

    Returns:
        int64, shape (N,), on the CPU: the cluster of each point.
    """
    points = x_ND.shape[0]
    if points % clusters != 0:
        raise ValueError(f"{points} points cannot be {clusters} clusters of equal sizes")
    x_ND = x_ND.double().cpu()
    mean_KD = x_ND[torch.randperm(points, generator=generator)[:clusters]]
    cluster_N = torch.full((points,), -1)
    for _ in range(steps):
        before_N, cluster_N = cluster_N, balanced_assignment(x_ND @ mean_KD.t())
        if torch.equal(before_N, cluster_N):
            break
        mean_KD = torch.zeros_like(mean_KD).index_add_(0, cluster_N, x_ND) * (clusters / points)
    return cluster_N
