"""Even loads without a loss: a bias of each expert that counts for choosing only.

Suffixes: see ``routing.py``.
"""

import math
from enum import Enum

import torch
from torch import Tensor

from .quantile import Histogram
from .statistics import Collector


class Balance(str, Enum):
    """What keeps the experts' loads even."""

    loss = "loss"
    bias = "bias"
    quantile = "quantile"


class LoadBias(Collector):
    """What is added to the experts' scores when a token's experts are chosen, and to nothing else.

    After each update, by the choices of all its tokens:

    ``bias`` (loss-free balancing, arXiv 2408.15664): with the load ``n_e``, how many tokens have expert e::

        b_e += u sign(mean_e n_e - n_e)

    ``quantile`` (J. Su, kexue.fm/archives/11619, a step to the solution of his linear programme): with
    ``a_t`` the highest score plus bias of an expert that token t does not have, and k the mean number of
    experts of a token, ``-b_e`` becomes the number that ``s_te - a_t`` is over for k / E of the tokens: with
    that bias, and the same ``a_t``, each expert would have had as many.  There is no step size.  The
    quantile is that of a histogram, which ranks can add up (ours).

    Either is then shifted so that its mean is 0, which is ours: it does not change which experts are the
    best, but matters where scores are compared with a threshold.

    Attributes:
        bias_E: b, float32.

    Args:
        experts: E.
        how: ``bias`` or ``quantile``.
        rate: u, for ``bias``.
    """

    HISTOGRAM = Histogram(low=-1.0, high=1.0, bins=1024)

    bias_E: Tensor

    def __init__(self, experts: int, how: Balance, rate: float) -> None:
        super().__init__()
        self.how, self.rate = how, rate
        self.register_buffer("bias_E", torch.zeros(experts))

    def choice(self, score_TE: Tensor) -> Tensor:
        """What experts are chosen by: scores from 0 to 1 plus the bias, without gradient."""
        return score_TE.detach() + self.bias_E.to(score_TE.dtype)

    @torch.no_grad()
    def watch(self, score_TE: Tensor, choice_TE: Tensor, chosen_TE: Tensor) -> None:
        """Count what was chosen.

        Args:
            score_TE: scores.
            choice_TE: what ``choice`` has made of them.
            chosen_TE: bool, the experts that each token has.
        """
        load_E = chosen_TE.sum(0).float()
        if self.how == Balance.bias:
            self.add(load_E)
            return
        others_T = choice_TE.masked_fill(chosen_TE, -math.inf).amax(1)
        # a token that has all experts would have them down to the worst
        limit_T = torch.where(torch.isinf(others_T), choice_TE.amin(1), others_T)
        counts_EB = self.HISTOGRAM.counts(score_TE - limit_T.unsqueeze(1))
        self.add(torch.cat([load_E, counts_EB.flatten()]))

    def no_sums(self) -> Tensor:
        """See ``Collector``: the E loads, and for ``quantile`` the E histograms."""
        size = 1 if self.how == Balance.bias else 1 + self.HISTOGRAM.bins
        return self.bias_E.new_zeros(self.bias_E.shape[0] * size)

    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``; an update without tokens changes nothing."""
        experts = self.bias_E.shape[0]
        load_E = sums_K[:experts]
        if not load_E.any():
            return
        if self.how == Balance.bias:
            self.bias_E += self.rate * torch.sign(load_E.mean() - load_E)
        else:
            counts_EB = sums_K[experts:].view(experts, -1)
            share = load_E.mean() / counts_EB[0].sum()
            self.bias_E.copy_(-self.HISTOGRAM.exceeded_by(share, counts_EB))
        self.bias_E -= self.bias_E.mean()
