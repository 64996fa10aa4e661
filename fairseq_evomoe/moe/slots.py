"""Slots of Soft MoE (arXiv 2308.00951): experts that work on mixtures of a sequence's tokens.

Suffixes: see ``routing.py``; besides, B sequences, L tokens of the longest one, S slots of a sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .capacity import position


@dataclass
class Slots:
    """How tokens are mixed into slots and the experts' outputs for the slots into the tokens' outputs.

    Slot s of sequence b is row ``b S + s`` of what the experts get.

    Attributes:
        row_T: int64, row of each token among the ``B L`` of the padded sequences.
        dispatch_BSL: float32, share of each token in each slot; 0 for padding, rows sum to 1.
        combine_BLS: float32, share of each slot in each token's output; rows of tokens sum to 1.
    """

    row_T: Tensor
    dispatch_BSL: Tensor
    combine_BLS: Tensor

    @classmethod
    def from_logits(cls, logits_TS: Tensor, sequence_T: Tensor) -> "Slots":
        """Softmax over a sequence's tokens for each slot, and over its slots for each token.

        Args:
            logits_TS: affinity of tokens and slots, (T, S).
            sequence_T: int64, a number of the sequence of each token, in any order.
        """
        tokens, slots = logits_TS.shape
        # numbered anew, so that every sequence has a token
        present_B, sequence_T = sequence_T.unique(return_inverse=True)
        sequences = present_B.shape[0]
        position_T = position(sequence_T, sequences)
        length = int(position_T.max()) + 1 if tokens else 0
        row_T = sequence_T * length + position_T
        padded = logits_TS.new_full((sequences * length, slots), float("-inf"))
        dispatch = padded.index_copy(0, row_T, logits_TS).view(sequences, length, slots).softmax(1)
        combine = _pad(logits_TS.softmax(-1), row_T, sequences, length)
        return cls(row_T, dispatch.transpose(1, 2), combine)

    def mix(self, x_TD: Tensor) -> Tensor:
        """What the experts get: shape (B S, D), dtype of ``x_TD``."""
        sequences, _, length = self.dispatch_BSL.shape
        x_BLD = _pad(x_TD.to(self.dispatch_BSL.dtype), self.row_T, sequences, length)
        return torch.bmm(self.dispatch_BSL, x_BLD).flatten(0, 1).to(x_TD.dtype)

    def spread(self, y_ND: Tensor) -> Tensor:
        """The tokens' outputs from those of the slots: shape (T, D)."""
        sequences, _, slots = self.combine_BLS.shape
        y_BSD = y_ND.to(self.combine_BLS.dtype).view(sequences, slots, y_ND.shape[1])
        return torch.bmm(self.combine_BLS, y_BSD).flatten(0, 1)[self.row_T]


def _pad(x_TD: Tensor, row_T: Tensor, sequences: int, length: int) -> Tensor:
    """Rows of tokens as (B, L, D), with zeros for padding."""
    padded = x_TD.new_zeros(sequences * length, x_TD.shape[1])
    return padded.index_copy(0, row_T, x_TD).view(sequences, length, x_TD.shape[1])
