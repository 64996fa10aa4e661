"""Carry tokens to experts on other ranks and the experts' outputs back (expert parallelism).

A token travels once to each rank that has any of its experts, however many it has there, and one row comes
back: the weighted sum of their outputs.  Splits are uneven and nothing is padded or dropped.  The numbers of
rows go ahead, once for each layer; rows then travel while the caller computes something else::

    shipment = send(x_TD, routing, experts, ranks)
    y_TD = shared_expert(x_TD)
    y_TD = y_TD + shipment.receive()

The gradients take the same ways back, and while those of the outputs travel, autograd computes those of what
was computed meanwhile.

Suffixes: see ``routing.py``; besides, R rows that this rank sends, S rows that it receives, P ranks.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, List, Optional, Protocol, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..experts import Experts
from ..ranks import Ranks
from ..routing import Routing
from ..sharding import deal_experts
from .compression import LSH, Buckets
from .local import outputs, sum_of_outputs


@dataclass(frozen=True)
class Transport:
    """How tokens travel.

    Attributes:
        dtype: of tokens, outputs and their gradients on the way; ``None``: their own.
        lsh: sends means of similar tokens instead of tokens (LSH-MoE), if given.
    """

    dtype: Optional[torch.dtype] = None
    lsh: Optional[LSH] = None


class Shipment(Protocol):
    """Tokens that are under way."""

    sent_bytes: int
    """What this rank sends to others for this batch, in all exchanges, there and back; while training, with
    those of the backward pass."""

    def receive(self) -> Tensor:
        """Apply the experts and return the tokens' outputs: (T, D), dtype of the tokens."""


def send(
    x_TD: Tensor, routing: Routing, experts: Experts, ranks: Ranks, transport: Transport = Transport()
) -> Shipment:
    """Send tokens to the ranks that have their experts.  All ranks that share the experts must call this.

    Args:
        x_TD: tokens, shape (T, D); T may be 0.
        routing: the active (token, expert) pairs.
        experts: those of this rank.
        ranks: P > 1 of them share the experts.
        transport: how tokens travel.
    """
    slots = routing.slots
    x_TD = x_TD if slots is None else slots.mix(x_TD)
    kind = _WeightedSums if transport.lsh is None else _BucketMeans
    shipment = kind(x_TD, routing, experts, ranks, transport)
    return shipment if slots is None else _Spread(shipment, slots)


class _Spread:
    """The tokens' outputs from those of the slots."""

    def __init__(self, shipment: Shipment, slots: Any) -> None:
        self.shipment = shipment
        self.slots = slots
        self.sent_bytes = shipment.sent_bytes

    def receive(self) -> Tensor:
        y_ND = self.shipment.receive()
        return self.slots.spread(y_ND).to(y_ND.dtype)


class _WeightedSums:
    """A row for each token and rank that has experts of it; the weights travel with it."""

    def __init__(
        self, x_TD: Tensor, routing: Routing, experts: Experts, ranks: Ranks, transport: Transport
    ) -> None:
        self.experts = experts
        plan = _destinations(tuple(experts.widths), ranks.parallel, x_TD.device)
        expert_N, order_N = plan.sort(routing.expert_N)
        token_N, weight_N = routing.token_N[order_N], routing.weight_N[order_N]

        # one row for each token and rank
        tokens = max(x_TD.shape[0], 1)
        row_R, row_N = torch.unique(plan.rank_E[expert_N] * tokens + token_N, return_inverse=True)
        rank_R, self.token_R = row_R // tokens, row_R % tokens
        row_P = torch.bincount(rank_R, minlength=ranks.parallel)
        first_P = row_P.cumsum(0) - row_P

        counts = plan.exchange_counts(row_P, torch.bincount(expert_N, minlength=routing.experts), ranks)
        sent_RD = x_TD.index_select(0, self.token_R)
        # the number of a row is exact in float32 up to 16 million rows for one rank
        number_N = row_N - first_P[plan.rank_E[expert_N]]
        pair_N2 = torch.stack([weight_N, number_N.to(weight_N.dtype)], 1)

        sent, received = counts.wait()
        self.counts = received
        row_trip = _Trip(ranks, sent.rows, received.rows, transport.dtype)
        pair_trip = _Trip(ranks, sent.pairs, received.pairs)
        self.rows = row_trip.start(sent_RD)
        self.pairs = pair_trip.start(pair_N2)
        self.back = _Trip(ranks, received.rows, sent.rows, transport.dtype)
        self.like = x_TD
        self.sent_bytes = counts.sent_bytes + sum(
            trip.sent_bytes(rows) for trip, rows in ((row_trip, sent_RD), (pair_trip, pair_N2))
        )
        self.sent_bytes += self.back.sent_bytes(sent_RD)

    def receive(self) -> Tensor:
        counts, pair_S2 = self.counts, self.pairs.finish()
        expert_M = counts.experts(pair_S2.device)
        first_M = _repeat(counts.first_rows, counts.pairs, pair_S2.device)
        row_M = pair_S2[:, 1].detach().to(torch.int64) + first_M
        x_SD = self.rows.finish()
        y_SD = sum_of_outputs(x_SD, row_M, expert_M, pair_S2[:, 0], self.experts)
        y_RD = self.back.start(y_SD.to(self.like.dtype)).finish()
        sums = torch.promote_types(y_RD.dtype, torch.float32)
        y_TD = torch.zeros(self.like.shape, dtype=sums, device=self.like.device)
        return y_TD.index_add(0, self.token_R, y_RD.to(sums)).to(self.like.dtype)


class _BucketMeans:
    """A row for each bucket of similar tokens of an expert: LSH-MoE, see ``lsh.py``."""

    def __init__(
        self, x_TD: Tensor, routing: Routing, experts: Experts, ranks: Ranks, transport: Transport
    ) -> None:
        assert transport.lsh is not None
        self.experts, self.like = experts, x_TD
        plan = _destinations(tuple(experts.widths), ranks.parallel, x_TD.device)
        expert_N, order_N = plan.sort(routing.expert_N)
        self.token_N, self.weight_N = routing.token_N[order_N], routing.weight_N[order_N]
        self.buckets: Buckets = transport.lsh.buckets(
            x_TD.index_select(0, self.token_N), plan.position_E[expert_N]
        )

        expert_B = plan.by_position(self.buckets.group_B)
        row_P = torch.bincount(plan.rank_E[expert_B], minlength=ranks.parallel)
        counts = plan.exchange_counts(row_P, torch.bincount(expert_B, minlength=routing.experts), ranks)
        mean_BD = self.buckets.mean_BD
        sent, received = counts.wait()
        self.counts = received
        trip = _Trip(ranks, sent.rows, received.rows, transport.dtype)
        self.rows = trip.start(mean_BD)
        self.back = _Trip(ranks, received.rows, sent.rows, transport.dtype)
        self.sent_bytes = counts.sent_bytes + trip.sent_bytes(mean_BD) + self.back.sent_bytes(mean_BD)

    def receive(self) -> Tensor:
        expert_S, order_S = torch.sort(self.counts.experts(self.like.device), stable=True)
        out_SD = outputs(self.rows.finish()[order_S], expert_S, self.experts)
        out_SD = torch.empty_like(out_SD).index_copy(0, order_S, out_SD).to(self.like.dtype)
        out_ND = self.buckets.spread(self.back.start(out_SD).finish())
        sums = torch.promote_types(out_ND.dtype, torch.float32)
        y_TD = torch.zeros(self.like.shape, dtype=sums, device=self.like.device)
        weighted_ND = out_ND * self.weight_N.unsqueeze(1)
        return y_TD.index_add(0, self.token_N, weighted_ND.to(sums)).to(self.like.dtype)


class _Destinations:
    """Where the experts of a layer are.

    Attributes:
        experts_of: numbers of the experts of each rank.
        rank_E: int64, the place of the rank that has each expert.
        position_E: int64, the place of each expert if those of the first rank are listed first, ...
        order_E: int64, the experts in that order.
    """

    def __init__(self, widths: Sequence[int], parallel: int, device: torch.device) -> None:
        self.experts_of = deal_experts(widths, parallel)
        order = [expert for own in self.experts_of for expert in own]
        rank_of = {expert: place for place, own in enumerate(self.experts_of) for expert in own}
        self.order_E = torch.tensor(order, device=device)
        self.rank_E = torch.tensor([rank_of[e] for e in range(len(order))], device=device)
        self.position_E = torch.empty_like(self.order_E)
        self.position_E[self.order_E] = torch.arange(len(order), device=device)

    def sort(self, expert_N: Tensor) -> Tuple[Tensor, Tensor]:
        """Pairs in the order of ranks and their experts: the expert of each, and where each was."""
        position_N, order_N = torch.sort(self.position_E[expert_N], stable=True)
        return self.order_E[position_N], order_N

    def by_position(self, position_N: Tensor) -> Tensor:
        """The experts at places."""
        return self.order_E[position_N]

    def exchange_counts(self, row_P: Tensor, pair_E: Tensor, ranks: Ranks) -> "_CountsUnderWay":
        """Tell the other ranks how much they will get.

        Args:
            row_P: int64, rows for each rank.
            pair_E: int64, pairs for each expert.
            ranks: that share the experts.
        """
        pairs_P = pair_E[self.order_E].split([len(own) for own in self.experts_of])
        parts = [part for row, pairs in zip(row_P.split(1), pairs_P) for part in (row, pairs)]
        return _CountsUnderWay(torch.cat(parts), self.experts_of, ranks)


# made once for each kind of layer: a few tensors, which would otherwise be copied to the device each time
_destinations = functools.lru_cache(maxsize=64)(_Destinations)


@dataclass
class _Counts:
    """What goes to, or comes from, each of the ranks.

    Attributes:
        rows: number of rows, by rank.
        pairs: number of pairs, by rank.
        pairs_of: number of pairs of each of the rank's experts, by rank.
    """

    rows: List[int]
    pairs: List[int]
    pairs_of: List[List[int]]

    @classmethod
    def parse(cls, numbers: List[int], experts: List[int]) -> "_Counts":
        rows, pairs_of = [], []
        for count in experts:
            rows.append(numbers[0])
            pairs_of.append(numbers[1 : count + 1])
            numbers = numbers[count + 1 :]
        return cls(rows, [sum(pairs) for pairs in pairs_of], pairs_of)

    @property
    def first_rows(self) -> List[int]:
        """Number of the first row of each rank."""
        return [sum(self.rows[:place]) for place in range(len(self.rows))]

    def experts(self, device: torch.device) -> Tensor:
        """The receiver's number of the expert of each pair: int64."""
        numbers = [e for pairs in self.pairs_of for e in range(len(pairs))]
        return _repeat(numbers, [count for pairs in self.pairs_of for count in pairs], device)


def _repeat(values: List[int], counts: List[int], device: torch.device) -> Tensor:
    pairs = torch.tensor([values, counts], dtype=torch.int64)
    return torch.repeat_interleave(pairs[0], pairs[1]).to(device)


class _CountsUnderWay:
    """The exchange of the numbers of rows and pairs, while something else is computed."""

    def __init__(self, sent: Tensor, experts_of: List[List[int]], ranks: Ranks) -> None:
        self.experts = [len(own) for own in experts_of]
        self.local = self.experts[ranks.group_rank]
        self.sent = sent
        self.received = sent.new_empty(ranks.parallel * (1 + self.local))
        send = [1 + count for count in self.experts]
        receive = [1 + self.local] * ranks.parallel
        self.work = dist.all_to_all_single(
            self.received, sent, receive, send, group=ranks.expert_group, async_op=True
        )
        self.sent_bytes = (sent.numel() - send[ranks.group_rank]) * sent.element_size()

    def wait(self) -> Tuple[_Counts, _Counts]:
        """What this rank sends and what it receives."""
        self.work.wait()
        numbers = torch.cat([self.sent, self.received]).tolist()
        split = self.sent.numel()
        sent = _Counts.parse(numbers[:split], self.experts)
        return sent, _Counts.parse(numbers[split:], [self.local] * len(self.experts))


class _Trip:
    """One exchange of rows between the ranks that share experts, and of their gradients.

    Args:
        ranks: P of them.
        send: number of rows for each.
        receive: number of rows from each.
        dtype: on the way; ``None``: that of the rows.
    """

    def __init__(
        self, ranks: Ranks, send: List[int], receive: List[int], dtype: Optional[torch.dtype] = None
    ) -> None:
        self.ranks = ranks
        self.splits = send, receive
        self.dtype = dtype
        self.work: Any = None
        self.kept: Optional[Tensor] = None

    def start(self, rows: Tensor) -> "_UnderWay":
        """Send rows."""
        sent = _Start.apply(rows, self)
        return _UnderWay(self, sent, self.exchange(sent.detach(), forward=True), rows.dtype)

    def exchange(self, rows: Tensor, forward: bool) -> Tensor:
        """Begin an exchange; the result is filled once ``wait`` has returned."""
        send, receive = self.splits if forward else self.splits[::-1]
        rows = rows.contiguous()
        result = rows.new_empty((sum(receive),) + rows.shape[1:])
        self.work = dist.all_to_all_single(
            _bits(result), _bits(rows), receive, send, group=self.ranks.expert_group, async_op=True
        )
        self.kept = rows
        return result

    def wait(self) -> None:
        """Finish the exchange that was begun."""
        self.work.wait()
        self.work = self.kept = None

    def sent_bytes(self, like: Tensor) -> int:
        """What this rank sends to others of rows like these, with gradients if there are any."""
        send, receive = (sum(split) - split[self.ranks.group_rank] for split in self.splits)
        size = torch.empty((), dtype=self.dtype or like.dtype).element_size()
        rows = send + receive if torch.is_grad_enabled() and like.requires_grad else send
        return rows * math.prod(like.shape[1:]) * size


def _bits(rows: Tensor) -> Tensor:
    # Gloo of torch 1.12 cannot move bfloat16, but numbers of the same size
    return rows.view(torch.float16) if rows.dtype == torch.bfloat16 else rows


@dataclass
class _UnderWay:
    """Rows that were sent and those that come instead.

    Attributes:
        trip: their exchange.
        sent: the rows in the dtype that they have on the way.
        coming: filled once the exchange is finished.
        dtype: of the rows before.
    """

    trip: _Trip
    sent: Tensor
    coming: Tensor
    dtype: torch.dtype

    def finish(self) -> Tensor:
        """The rows that have come, in the dtype of those that were sent."""
        return _Finish.apply(self.sent, self.coming, self.trip).to(self.dtype)


class _Start(torch.autograd.Function):
    """The rows in the dtype of the trip; the last of the backward pass of an exchange."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        ctx.trip, ctx.dtype = trip, rows.dtype
        return rows.view_as(rows) if trip.dtype in (None, rows.dtype) else rows.to(trip.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        # begun by _Finish.backward; nothing has read it yet
        ctx.trip.wait()
        return grad.to(ctx.dtype), None


class _Finish(torch.autograd.Function):
    """What has come for the rows that were sent; the first of the backward pass of an exchange."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, coming: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.wait()
        return coming.view_as(coming)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        return ctx.trip.exchange(grad, forward=False), None, None
