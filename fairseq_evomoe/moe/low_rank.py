"""Low-rank experts beside a linear layer, softly mixed: Omni-SMoLA (arXiv 2312.00968).

Only the paper's abstract could be read: low-rank experts that are mixed as in Soft MoE and added to what a
backbone computes.  That they stand beside its linear layers, their first matrices at random and their second
ones at zero, as LoRA's (arXiv 2106.09685), is ours.

Suffixes: see ``routing.py`` and ``slots.py``; besides, R the rank and O the width of the output.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn

from .loading import StateMismatch
from .options import OptionError, Options, option
from .routers.router import fill_uniform
from .routers.soft import SoftRouter
from .routing import RoutingContext


class Beside(str, Enum):
    """The linear layers that low-rank experts stand beside."""

    ffn = "ffn"
    attention = "attention"
    all = "all"


@dataclass(frozen=True)
class LowRankOptions(Options):
    """Low-rank experts in place of feed-forward ones; the names are flat."""

    rank: int = option(
        0,
        "Rank of low-rank experts that stand beside linear layers of the model, in place of feed-forward "
        "experts (SMoLA); needs moe-router soft, which mixes them, and an encoder; 0: there are none.",
        at_least=0,
    )
    beside: Beside = option(
        "all",
        "The linear layers that low-rank experts stand beside, in every moe-freq-th layer of the encoder, "
        "with moe-rank: the two of the feed-forward network (ffn), the four of self-attention (attention), "
        "or all of them.",
    )


class LowRankExperts(nn.Module):
    """What low-rank experts add to the output of a linear layer.

    With the slots of Soft MoE (arXiv 2308.00951), each a mixture of the tokens of a sequence::

        slot_s = sum over tokens t of dispatch_ts x_t
        y_t = sum over slots s of combine_ts slot_s A_e B_e,    e the expert of slot s

    ``B`` is zero at first, so that a model with such experts starts as the one without.  A token's output
    depends on later tokens, hence for encoders only.

    Attributes:
        router: mixes tokens into slots and outputs into tokens; see ``SoftRouter``.
        down_EDR: the experts' first matrices, A.
        up_ERO: their second ones, B.

    Args:
        dim: D, width of the linear layer's input.
        out_dim: O, width of its output.
        experts: E, number of experts.
        rank: R.
        slots: of each expert, for each sequence.

    Raises:
        OptionError: a rank with which nothing would be low-rank, or no rank.
    """

    def __init__(self, dim: int, out_dim: int, experts: int, rank: int, slots: int = 1) -> None:
        super().__init__()
        if not 1 <= rank <= min(dim, out_dim):
            raise OptionError(
                "rank",
                f"`rank` must be from 1 to {min(dim, out_dim)}, the smaller width of a linear layer of {dim} "
                f"inputs and {out_dim} outputs, but is {rank}.",
            )
        self.router = SoftRouter(dim, experts, slots=slots)
        self.down_EDR = nn.Parameter(torch.empty(experts, dim, rank))
        self.up_ERO = nn.Parameter(torch.empty(experts, rank, out_dim))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill the parameters: slots as Soft MoE's, A from U(-1/sqrt(D), 1/sqrt(D)), B with zeros."""
        self.router.initialize(generator)
        fill_uniform(self.down_EDR, self.down_EDR.shape[1] ** -0.5, generator)
        self.up_ERO.zero_()

    def forward(self, x_TD: Tensor, sequence_T: Optional[Tensor] = None) -> Tensor:
        """What is added to the linear layer's output.

        Args:
            x_TD: the linear layer's input, without padding.
            sequence_T: int64, a number of the sequence of each token; ``None``: they are one.

        Returns:
            shape (T, O), dtype of ``x_TD``.
        """
        slots = self.router(x_TD, RoutingContext(sequence_T=sequence_T, statistics=False)).slots
        sequences = slots.dispatch_BSL.shape[0]
        experts, dim, _ = self.down_EDR.shape
        slot_BEKD = slots.mix(x_TD).view(sequences, experts, self.router.slots, dim)
        slot_END = slot_BEKD.transpose(0, 1).reshape(experts, -1, dim)
        out_ENO = torch.bmm(torch.bmm(slot_END, self.down_EDR), self.up_ERO)
        out_EBKO = out_ENO.view(experts, sequences, self.router.slots, self.up_ERO.shape[2])
        out_SO = out_EBKO.transpose(0, 1).flatten(0, 2)
        return slots.spread(out_SO).to(x_TD.dtype)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        found = {name: state_dict.get(prefix + name) for name in self.state_dict()}
        if not any(tensor is not None for tensor in found.values()):  # that of a model without experts
            for name, tensor in self.state_dict().items():
                state_dict[prefix + name] = tensor
        for name, own in self.state_dict().items():
            tensor = found[name]
            if tensor is not None and tensor.shape != own.shape:
                raise StateMismatch(
                    "rank",
                    f"The checkpoint's low-rank experts have a {name} of shape {tuple(tensor.shape)} at "
                    f"{prefix.rstrip('.')}, and the model's have {tuple(own.shape)}: give the `rank`, "
                    "`experts` and `slots` that it was trained with.",
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
