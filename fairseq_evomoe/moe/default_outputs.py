"""What an expert usually gives, for the tokens that it does not get: Default MoE (arXiv 2504.12463).

Suffixes: see ``routing.py``.
"""

import torch
from torch import Tensor

from .routing import Routing
from .statistics import Collector


class DefaultOutputs(Collector):
    """For each expert the mean of its outputs, which stands in for it where it is not active.

    With p the gate's probabilities and A the experts of a token, those of the others join its output::

        sum over e not in A of p_e d_e

    so that the loss has a gradient with respect to every p_e, for the cost of a product of T x E and E x D.
    After each update ``d_e`` moves towards the mean output of the tokens that expert e had in it, on all
    ranks; with n the updates in which it had any::

        d_e += max(1 / n, 1 - decay) * (mean - d_e)

    The first updates count alike (ours), so that d does not hang on to the zeros that it starts with.

    Attributes:
        output_ED: d, float32.
        updates_E: n, float32.

    Args:
        experts: E.
        dim: D.
        decay: what is left of d at each update once there have been many.
    """

    output_ED: Tensor
    updates_E: Tensor

    def __init__(self, experts: int, dim: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("output_ED", torch.zeros(experts, dim))
        self.register_buffer("updates_E", torch.zeros(experts))

    def forward(self, routing: Routing) -> Tensor:
        """What stands in for the experts that each token does not have.

        Args:
            routing: with the gate's probabilities, of the experts that may be active.

        Returns:
            float32, shape (T, D), with gradient (float64 for float64 probabilities).
        """
        probability_TE = routing.probability_TE
        assert probability_TE is not None
        absent_TE = torch.ones_like(probability_TE)
        absent_TE.view(-1).index_fill_(0, routing.token_N * routing.experts + routing.expert_N, 0)
        with torch.autocast(device_type=probability_TE.device.type, enabled=False):
            y_TD: Tensor = (probability_TE * absent_TE) @ self.output_ED.to(probability_TE.dtype)
        return y_TD

    @torch.no_grad()
    def watch(self, output_ND: Tensor, expert_N: Tensor) -> None:
        """Count what some pairs' experts gave, before their weights."""
        sum_ED = torch.zeros_like(self.output_ED).index_add_(0, expert_N, output_ND.float())
        count_E = torch.zeros_like(self.updates_E).index_add_(0, expert_N, sum_ED.new_ones(len(expert_N)))
        self.add(torch.cat([sum_ED.flatten(), count_E]))

    def no_sums(self) -> Tensor:
        """See ``Collector``: the E sums of outputs, and of how many."""
        return self.output_ED.new_zeros(self.output_ED.numel() + len(self.updates_E))

    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``; an expert without tokens keeps what it has."""
        sum_ED, count_E = sums_K.split([self.output_ED.numel(), len(self.updates_E)])
        active_E = count_E > 0
        self.updates_E += active_E
        step_E = torch.clamp(1 / self.updates_E.clamp(min=1), min=1 - self.decay) * active_E
        mean_ED = sum_ED.view_as(self.output_ED) / count_E.clamp(min=1).unsqueeze(1)
        self.output_ED += step_E.unsqueeze(1) * (mean_ED - self.output_ED)
