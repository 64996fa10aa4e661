"""Tokens split into sub-tokens around the experts: MH-MoE (arXiv 2404.15045)."""

from torch import Tensor, nn

from .options import OptionError


class MultiHead(nn.Module):
    """``x -> split(x W_head) -> experts -> concatenate -> W_merge``.

    Each token becomes h sub-tokens of width D / h, which are routed for themselves.

    Args:
        dim: D, width of a token.
        heads: h, a divisor of D.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise OptionError("heads", f"`heads` must divide the width {dim}, but is {heads}.")
        self.heads = heads
        self.head = nn.Linear(dim, dim)
        self.merge = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.head.weight, gain=0.5**0.5)
        nn.init.xavier_uniform_(self.merge.weight)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.merge.bias)

    def split_heads(self, x_TD: Tensor) -> Tensor:
        """Shape (T, D) -> (T h, D / h): the sub-tokens of a token follow each other."""
        tokens, dim = x_TD.shape
        return self.head(x_TD).reshape(tokens * self.heads, dim // self.heads)

    def merge_heads(self, x_SD: Tensor, tokens: int) -> Tensor:
        """Shape (T h, D / h) -> (T, D)."""
        return self.merge(x_SD.reshape(tokens, self.heads * x_SD.shape[1]))

    def repeat(self, value_T: Tensor) -> Tensor:
        """What holds for a token, for each of its sub-tokens."""
        return value_T.repeat_interleave(self.heads, dim=0)
