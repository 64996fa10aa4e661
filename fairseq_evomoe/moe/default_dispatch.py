"""How Default MoE (arXiv 2504.12463) learns in training what each expert usually gives.

Apart from ``default_outputs.py``, which evaluation needs and which knows no dispatch.
"""

import torch
from torch import Tensor

from .default_outputs import DefaultOutputs
from .dispatch.local import outputs
from .experts import Experts
from .routing import Routing


def dispatch_and_watch(x_TD: Tensor, routing: Routing, experts: Experts, defaults: DefaultOutputs) -> Tensor:
    """What ``dispatch`` returns, while ``defaults`` sees each expert's outputs, before they are summed.

    Each rank must have all experts.
    """
    expert_N, order_N = torch.sort(routing.expert_N, stable=True)
    token_N, weight_N = routing.token_N[order_N], routing.weight_N[order_N]
    output_ND = outputs(x_TD.index_select(0, token_N), expert_N, experts)
    defaults.watch(output_ND.detach(), expert_N)
    weighted_ND = output_ND * weight_N.unsqueeze(1)
    return weighted_ND.new_zeros(x_TD.shape).index_add(0, token_N, weighted_ND).to(x_TD.dtype)
