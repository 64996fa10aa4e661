"""Which leaf of a tree is which expert, learned: COMET's local search (arXiv 2306.02824).

Suffixes: see ``routing.py``; L: leaves, of which there are as many as experts.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from .assignment import balanced_assignment
from .noise import uniform
from .statistics import Collector


class LeafOrder(Collector):
    """A matrix that says which leaf is which expert: nearly a permutation at first, and one in the end.

    In the first ``updates`` of training it is doubly stochastic, and learns by its gradient::

        sinkhorn((score + 0.01 gumbel) / tau),   tau = 10^(-3 - 4 n / N)

    after n of N updates, with 20 + 130 n / N rounds in which rows and then columns are divided by their sums
    (G. Mena et al., arXiv 1802.08665), as in the authors' code.  Afterwards, and in evaluation, it is the
    permutation with the greatest sum of scores.  It is one for all trees of a gate, and less than 1e-5 counts
    as 0, so that experts are not computed for nothing; both are ours.

    Attributes:
        score_LE: learned; undefined until somebody fills it.
        expert_L: int64, the expert of each leaf.
        made: float32 scalar, n.

    Args:
        experts: E.
        updates: N.
    """

    NOISE, LEAST = 0.01, 1e-5

    expert_L: Tensor
    made: Tensor

    def __init__(self, experts: int, updates: int) -> None:
        super().__init__()
        self.updates = updates
        self.score_LE = nn.Parameter(torch.empty(experts, experts))
        self.register_buffer("expert_L", torch.arange(experts))
        self.register_buffer("made", torch.zeros(()))

    @property
    def searching(self) -> bool:
        """Whether the order is learned in this pass."""
        return self.training and float(self.made) < self.updates

    def forward(self, weight_TL: Tensor, noise_key: Optional[Tuple[object, ...]]) -> Tensor:
        """The weights of experts, of those of leaves: (T, E), rows sum to 1.

        Args:
            weight_TL: rows sum to 1.
            noise_key: what the noise depends on; ``None``: it comes from the default generator.
        """
        if not self.searching:
            # without effect, but so that every parameter has a gradient
            nothing = 0 * self.score_LE.sum().to(weight_TL.dtype) if self.training else 0
            return weight_TL[:, self.expert_L.argsort()] + nothing
        self.add(self.made.new_ones(1))
        with torch.autocast(device_type=weight_TL.device.type, enabled=False):
            weight_TE = weight_TL @ self.matrix(noise_key).to(weight_TL.dtype)
        return weight_TE / weight_TE.sum(-1, keepdim=True)

    def matrix(self, noise_key: Optional[Tuple[object, ...]]) -> Tensor:
        """Doubly stochastic as far as the rounds go: float64, shape (L, E)."""
        score_LE, share = self.score_LE.double(), float(self.made) / self.updates
        if noise_key is None:
            uniform_LE = torch.rand_like(score_LE)
        else:
            rows, columns = score_LE.shape
            uniform_LE = uniform((*noise_key, "leaves"), 0, rows, columns, score_LE.device).double()
        gumbel_LE = -(-uniform_LE.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        log_LE = (score_LE + self.NOISE * gumbel_LE) / 10 ** (-3 - 4 * share)
        for _ in range(int(20 + 130 * share)):
            log_LE = log_LE - log_LE.logsumexp(1, keepdim=True)
            log_LE = log_LE - log_LE.logsumexp(0, keepdim=True)
        matrix_LE = log_LE.exp()
        return matrix_LE.masked_fill(matrix_LE < self.LEAST, 0)

    def no_sums(self) -> Tensor:
        """See ``Collector``: the number of passes."""
        return self.made.new_zeros(1)

    @torch.no_grad()
    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``: the permutation is that of the scores now."""
        if sums_K[0] > 0:
            self.made += 1
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Let each leaf have the expert that it has where the sum of the scores is the greatest."""
        self.expert_L.copy_(balanced_assignment(self.score_LE.detach().cpu()))
