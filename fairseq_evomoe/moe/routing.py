"""What every router returns, and what it may ask for.

Shape suffixes used throughout ``fairseq_evomoe.moe``:

======  ==========================================================
T       tokens (padding removed)
D       model width
C       width of the embeddings of tokens
E       experts
N       assignments: active (token, expert) pairs
H       hidden units of all experts, laid end to end
======  ==========================================================
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Collection, Dict, Optional, Tuple, Union, cast

import torch
from torch import Tensor

from .noise import uniform
from .ranks import ALONE, Ranks

if TYPE_CHECKING:
    from .slots import Slots


@dataclass(frozen=True)
class Part:
    """Those of a layer's tokens that are routed in one of several passes.

    Attributes:
        number: of the pass, from 0.
        row_P: int64, their places among the layer's tokens.
        rows: T, how many tokens the layer has.
    """

    number: int
    row_P: Tensor
    rows: int


@dataclass(frozen=True)
class RoutingContext:
    """What a router may need and the tokens do not hold, of one forward pass.

    Attributes:
        temperature: temperature of the gate at this update, > 0.
        hard: whether training has reached the router's last stage: the fewest experts for the
            Dense-To-Sparse gate, the frozen assignment for StableMoE.
        token_T: int64, vocabulary index of each token; ``None`` if nobody asked for it or knows it.
        embedding_TC: embedding of each token as the stack of layers looked it up, without gradient; ``None``
            like ``token_T``.
        sequence_T: int64, number of the sequence in the batch to which each token belongs.
        memory: what routers hand on to those of later layers in the same forward pass, by a name of
            their own; a new dictionary for each pass.
        statistics: whether losses and entropy of the gate are wanted; they are not while generating, and a
            router may leave them out then.
        losses: names of the losses that are wanted; ``None``: all.
        causal: whether nothing may depend on later tokens of a sequence, as in a decoder.
        ranks: those whose batches count as one batch, in losses, balanced assignments and capacities.
        noise_key: what random numbers depend on beside the place of a token in the batch of all ranks, so
            that they are the same on any number of ranks; ``None``: they come from the default generator.
        warm_up: whether gates that have no experts yet are to learn; see ``gate_warmup.py``.
        first_row: how many rows all ranks have routed before, in earlier batches of the same update.
        residual_TD: what the layer's output is added to, for routers with passes; ``None``: the tokens.
        part: which of the layer's tokens these are; ``None``: all of them, in the first pass or the only one.
    """

    temperature: float = 1.0
    hard: bool = False
    token_T: Optional[Tensor] = None
    embedding_TC: Optional[Tensor] = None
    sequence_T: Optional[Tensor] = None
    memory: Dict[str, Any] = field(default_factory=dict)
    statistics: bool = True
    losses: Optional[Collection[str]] = None
    causal: bool = False
    ranks: Ranks = ALONE
    noise_key: Optional[Tuple[object, ...]] = None
    warm_up: bool = False
    first_row: int = 0
    residual_TD: Optional[Tensor] = None
    part: Optional[Part] = None

    def wants(self, loss: str) -> bool:
        """Whether a loss is wanted."""
        return self.statistics and (self.losses is None or loss in self.losses)

    def rows_of_ranks(self, rows: int, device: torch.device) -> Tuple[int, int]:
        """How many rows the lower ranks route in this pass, and how many all ranks do.

        The layers of a stack route as many rows each, so that it is asked for once in a pass.
        """
        if self.ranks.size == 1:
            self.memory["rows_of_ranks"] = rows, 0, rows
        elif self.memory.get("rows_of_ranks", (None,))[0] != rows:
            count_W = self.ranks.gather_counts(torch.tensor([rows], device=device)).flatten().tolist()
            self.memory["rows_of_ranks"] = rows, sum(count_W[: self.ranks.rank]), sum(count_W)
        return cast(Tuple[int, int], self.memory["rows_of_ranks"][1:])

    def uniform(self, like: Tensor) -> Tensor:
        """Independent samples of U(0, 1) in the shape of ``like``, (T, K), and its dtype and device.

        With a ``noise_key`` they depend on that, the pass, and the place of a row in the batch of all ranks.
        """
        if self.noise_key is None:
            return torch.rand_like(like)
        rows, columns = like.shape
        key, part = self.noise_key, self.part
        if part is not None:  # the place of a row is that among all, whoever is in this pass
            rows, key = part.rows, (*key, "pass", part.number)
        first = self.first_row + self.rows_of_ranks(rows, like.device)[0]
        drawn = uniform(key, first, rows, columns, like.device).to(like.dtype)
        return drawn if part is None else drawn.index_select(0, part.row_P)

    def of_part(self, part: Part) -> "RoutingContext":
        """What is told of some of the tokens, in a pass of their own."""
        of_tokens = {name: getattr(self, name) for name in ("token_T", "embedding_TC", "sequence_T")}
        selected = {name: x.index_select(0, part.row_P) for name, x in of_tokens.items() if x is not None}
        return replace(self, part=part, residual_TD=None, **selected)


def count_experts(expert_N: Tensor, experts: int) -> Tensor:
    """How often each expert is named: int64, shape (E,).

    On a GPU without `torch.bincount`, which waits there for the largest number; the comparisons take a byte
    for each pair and expert, where a gate has logits of four.
    """
    if expert_N.device.type == "cpu":
        return torch.bincount(expert_N, minlength=experts)
    return (expert_N.unsqueeze(1) == torch.arange(experts, device=expert_N.device)).sum(0)


def at_pairs(value_TE: Tensor, token_N: Tensor, expert_N: Tensor) -> Tensor:
    """The value of each (token, expert) pair, each of which is there once: shape (N,).

    Not by indexing with two tensors, for whose gradient a GPU sorts the pairs.
    """
    return value_TE.reshape(-1).gather(0, token_N * value_TE.shape[1] + expert_N)


@dataclass
class Vocabulary:
    """The dictionary of the tokens that a stack of layers reads.

    Attributes:
        size: V, number of entries.
        count_V: float32, how often each entry occurs in the training data; all 0 if not known.
        dim: C, width of the embeddings; 0 if not known.
    """

    size: int
    count_V: Tensor
    dim: int = 0


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
        probability_TE: float32, the gate's probabilities where the router has any, with gradient.
        balance: scalar, the load-balance loss to report where ``losses`` has only the layer's part of it.
        dropped: pairs that a capacity left out; a number or an int64 scalar.
        slots: mixtures of tokens on which the experts work instead of tokens; ``token_N`` are slots then.
        sent_bytes: what this rank sends to others to carry the tokens to their experts and back.
        phase: 0: of a layer with one expert; 2: in the router's last stage; 1: before that.
        temperature: of the gate.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    tokens: int
    experts: int
    losses: Dict[str, Tensor] = field(default_factory=dict)
    gate_entropy: Optional[Tensor] = None
    probability_TE: Optional[Tensor] = None
    balance: Optional[Tensor] = None
    dropped: Union[int, Tensor] = 0
    slots: Optional["Slots"] = None
    sent_bytes: int = 0
    phase: int = 0
    temperature: float = 1.0

    def load_E(self) -> Tensor:
        """Assignments for each expert: float32, shape (E,)."""
        return count_experts(self.expert_N, self.experts).to(torch.float32)

    def report(self) -> "Report":
        """What the routing of these tokens is like, without gradient."""
        balance = self.losses.get("balance", 1.0) if self.balance is None else self.balance
        return Report(
            tokens=self.tokens,
            assignments=self.token_N.shape[0],
            load_E=self.load_E(),
            balance=torch.as_tensor(balance).detach(),
            gate_entropy=torch.zeros(()) if self.gate_entropy is None else self.gate_entropy,
            dropped=self.dropped,
            sent_bytes=self.sent_bytes,
            phase=self.phase,
            temperature=self.temperature,
        )


@dataclass(frozen=True)
class Report:
    """What a batch tells of its routing, for the logs.

    Attributes:
        tokens: number of tokens that were routed.
        assignments: number of active pairs.
        load_E: float32, active pairs of each expert.
        balance: scalar, the load-balance loss of the batch; 1, that of an even load, if the router has none.
        gate_entropy: scalar, see ``Routing``; 0 if there is no gate.
        dropped: see ``Routing``.
        sent_bytes: see ``Routing``.
        phase: see ``Routing``.
        temperature: see ``Routing``.
    """

    tokens: int
    assignments: int
    load_E: Tensor
    balance: Tensor
    gate_entropy: Tensor
    dropped: Union[int, Tensor]
    sent_bytes: int
    phase: int
    temperature: float
