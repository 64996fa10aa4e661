"""Experts that cost next to nothing, beside those that work (MoE++, arXiv 2410.07348).

Suffixes: see ``routing.py``; Z: free experts, C: those of them that are constant.
"""

from typing import Optional

import torch
from torch import Tensor, nn


class FreeExperts(nn.Module):
    """Zero, copy and constant experts, in this order, and their rows of the gate.

    For a token x a zero expert has nothing to say, a copy expert gives x, and a constant one::

        a_1 x + a_2 v,   a = softmax(M x)

    with a vector v and a matrix M, (2, D), of its own.

    Attributes:
        weight: rows of a linear gate, shape (Z, D).
        constant_CD: v; ``None`` without constant experts.
        mixing: M of each, shape (2 C, D); ``None`` without constant experts.
        count: Z.

    Args:
        dim: D, width of a token.
        zero: number of zero experts.
        copy: number of copy experts.
        constant: C.
    """

    constant_CD: Optional[nn.Parameter]
    mixing: Optional[nn.Parameter]

    def __init__(self, dim: int, zero: int, copy: int, constant: int) -> None:
        super().__init__()
        self.zero, self.copy, self.constant = zero, copy, constant
        self.count = zero + copy + constant
        self.weight = nn.Parameter(torch.empty(self.count, dim))
        self.register_parameter("constant_CD", None)
        self.register_parameter("mixing", None)
        if constant:
            self.constant_CD = nn.Parameter(torch.empty(constant, dim))
            self.mixing = nn.Parameter(torch.empty(2 * constant, dim))

    def forward(self, x_TD: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
        """The weighted outputs of some pairs, added up for each token.

        Args:
            x_TD: tokens.
            token_N: int64, token of each pair.
            expert_N: int64, free expert of each pair, each of which is there once.
            weight_N: float32, factor of its output.

        Returns:
            (T, D), dtype of ``x_TD``.
        """
        pairs = torch.zeros(x_TD.shape[0] * self.count, dtype=weight_N.dtype, device=x_TD.device)
        weight_TZ = pairs.index_add(0, token_N * self.count + expert_N, weight_N).view(-1, self.count)
        _, copy_TZ, constant_TC = weight_TZ.split([self.zero, self.copy, self.constant], dim=1)
        kept_T1 = copy_TZ.sum(1, keepdim=True)
        y_TD = x_TD.to(weight_N.dtype)
        if self.constant_CD is None or self.mixing is None:
            return (kept_T1 * y_TD).to(x_TD.dtype)
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            mixing_TC2 = (y_TD @ self.mixing.to(y_TD.dtype).t()).view(-1, self.constant, 2).softmax(-1)
            kept_T1 = kept_T1 + (constant_TC * mixing_TC2[:, :, 0]).sum(1, keepdim=True)
            added_TD = (constant_TC * mixing_TC2[:, :, 1]) @ self.constant_CD.to(y_TD.dtype)
        return (kept_T1 * y_TD + added_TD).to(x_TD.dtype)
