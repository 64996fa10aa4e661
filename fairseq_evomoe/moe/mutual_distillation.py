"""Mutual distillation among experts: MoDE (arXiv 2402.00893)."""

from typing import Tuple

import torch
from torch import Tensor

from .experts import Experts
from .ranks import ALONE, Ranks
from .routing import Routing


def dispatch_and_compare(
    x_TD: Tensor, routing: Routing, experts: Experts, ranks: Ranks = ALONE
) -> Tuple[Tensor, Tensor]:
    """What ``dispatch`` returns, and how far apart the experts of a token are.

    The loss is the mean over all active pairs and dimensions of the squared distance between the output of
    the pair's expert, before its weight, and the mean of the outputs that the token gets.  It is 0 for a
    token with one expert.  Each rank must have all experts.

    Returns:
        output, shape (T, D), dtype of ``x_TD``; loss, float32 scalar (float64 for float64 tokens).
    """
    expert_N, order_N = torch.sort(routing.expert_N, stable=True)
    token_N, weight_N = routing.token_N[order_N], routing.weight_N[order_N]
    counts = torch.bincount(expert_N, minlength=routing.experts).tolist()
    output_ND = experts(x_TD[token_N], counts)
    output_ND = output_ND if output_ND.dtype == torch.float64 else output_ND.float()

    zero_TD = output_ND.new_zeros(x_TD.shape)
    y_TD = zero_TD.index_add(0, token_N, output_ND * weight_N.unsqueeze(1)).to(x_TD.dtype)
    count_T = torch.bincount(token_N, minlength=routing.tokens).clamp(min=1).to(output_ND.dtype)
    mean_TD = zero_TD.index_add(0, token_N, output_ND) / count_T.unsqueeze(1)
    squares_ND = (output_ND - mean_TD[token_N]).square()
    total, count = ranks.total(squares_ND.sum(), squares_ND.numel())
    return y_TD, total / count.clamp(min=1)
