"""What gates that see the embedding of a token are tried with."""

import torch

from fairseq_evomoe.moe import Vocabulary

LINEAR_ROUTERS = ["dts", "switch", "topk", "top-p"]
WIDTH = 5


def vocabulary(dim=WIDTH):
    return Vocabulary(11, torch.zeros(11), dim)


def batch(count=30, dim=4):
    torch.manual_seed(1)
    x = torch.randn(count, dim, dtype=torch.float64)
    return x, torch.randn(count, WIDTH, dtype=torch.float64) * 3 + 1
