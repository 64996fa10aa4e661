"""Balanced k-means."""

import pytest
import torch

from fairseq_evomoe.evolution.clustering import balanced_kmeans


def test_points_that_cannot_be_divided_evenly_are_refused():
    with pytest.raises(ValueError, match="7 points cannot be 2 clusters of equal sizes"):
        balanced_kmeans(torch.randn(7, 3), 2, torch.Generator().manual_seed(0))
