"""What every router returns, and what it may ask for.

Shape suffixes used throughout ``fairseq_evomoe.moe``:

======  ==========================================================
T       tokens (padding removed)
D       model width
E       experts
N       assignments: active (token, expert) pairs
H       hidden units of all experts, laid end to end
======  ==========================================================
"""

from dataclasses import dataclass, field
from typing import Dict, Optional

import torch
from torch import Tensor


@dataclass
class RoutingContext:
    """What a router may need and the tokens do not hold.

    Attributes:
        temperature: temperature of the gate at this update, > 0.
        hard: whether training has reached the stage in which a token goes to one expert only.
    """

    temperature: float = 1.0
    hard: bool = False


@dataclass
class Routing:
    """A sparse assignment of tokens to experts: one entry for each active (token, expert) pair.

    Attributes:
        token_N: int64, index of the token.
        expert_N: int64, index of the expert.
        weight_N: float32, factor of that expert's output in the token's output.
        tokens: T, the number of tokens that were routed.
        experts: E, the number of experts that could be chosen.
        losses: named auxiliary losses, float32 scalars with gradient, unweighted.
        gate_entropy: float32 scalar, entropy in nats of the gate's distribution, summed over tokens.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    tokens: int
    experts: int
    losses: Dict[str, Tensor] = field(default_factory=dict)
    gate_entropy: Optional[Tensor] = None

    def load_E(self) -> Tensor:
        """Assignments for each expert: float32, shape (E,)."""
        return torch.bincount(self.expert_N, minlength=self.experts).to(torch.float32)
