"""The processes that train one model together, as far as an MoE layer needs to know them.

Every process ("rank") has a batch of its own; the losses and assignments of routers are those of all batches
as one.  The experts of a layer are either on every rank or, with *expert parallelism*, shared out among P
consecutive ranks, which then exchange tokens (``exchange.py``); the ranks that have the same experts are
replicas of each other.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Ranks:
    """Groups of processes; a process alone is ``ALONE``.

    Attributes:
        size: W, number of ranks.
        rank: number of this one.
        parallel: P, number of ranks that share the experts of a layer; 1: each has them all.
        group: all ranks, for nothing but this.
        expert_group: the P ranks that share experts with this one, ``rank - place`` and the next ones.
        replica_group: the W / P ranks that have the same experts as this one.
    """

    size: int = 1
    rank: int = 0
    parallel: int = 1
    group: Any = None
    expert_group: Any = None
    replica_group: Any = None

    @classmethod
    def of_group(cls, group: Any, parallel: int = 1, timeout: Optional[timedelta] = None) -> "Ranks":
        """Divide the ranks of a process group.  All of them must call this, with the same arguments.

        Args:
            group: of torch.distributed.
            parallel: P, a divisor of the number of ranks.
            timeout: how long a rank waits for the others; ``None``: as torch does.

        Raises:
            ValueError: it is none.
        """
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        if parallel < 1 or size % parallel:
            raise ValueError(f"parallel must divide the number of ranks {size}, but is {parallel}")
        # a group of its own, since whoever adds up gradients on the given one does so while the backward pass
        # goes on, at other moments on each rank
        own = _new_groups(group, [list(range(size))], rank, timeout)
        expert_group = replica_group = None
        if parallel > 1:
            sharing = [list(range(first, first + parallel)) for first in range(0, size, parallel)]
            replicas = [list(range(place, size, parallel)) for place in range(parallel)]
            expert_group = _new_groups(group, sharing, rank, timeout)
            replica_group = _new_groups(group, replicas, rank, timeout)
        return cls(size, rank, parallel, own, expert_group, replica_group)

    @property
    def group_rank(self) -> int:
        """Number of this rank among those that share the experts."""
        return self.rank % self.parallel

    def total(self, *values: Union[Tensor, float]) -> List[Tensor]:
        """Sums over all ranks, by one all-reduce; gradients flow back to all of them.

        Args:
            values: floating-point tensors of one device, each of the same shape on every rank, and numbers.
        """
        first = next(value for value in values if torch.is_tensor(value))
        # not new_tensor, which on a GPU waits until the number is copied there
        tensors = [value if torch.is_tensor(value) else first.new_full((), float(value)) for value in values]
        if self.size == 1:
            return tensors
        flat = _AllReduce.apply(torch.cat([tensor.reshape(-1) for tensor in tensors]), self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]

    def gather_counts(self, count_K: Tensor) -> Tensor:
        """The counts of every rank: int64, (K,) -> (W, K)."""
        if self.size == 1:
            return count_K.unsqueeze(0)
        parts = [torch.empty_like(count_K) for _ in range(self.size)]
        dist.all_gather(parts, count_K.contiguous(), group=self.group)
        return torch.stack(parts)

    def gather_rows(self, rows: Tensor) -> List[Tensor]:
        """The rows of every rank, without gradient: (T, ...) -> W tensors (T', ...)."""
        if self.size == 1:
            return [rows]
        count_W = self.gather_counts(torch.tensor([rows.shape[0]], device=rows.device)).flatten().tolist()
        # all_gather takes tensors of one shape
        padded = rows.new_zeros((max(count_W),) + rows.shape[1:])
        padded[: rows.shape[0]] = rows.detach()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return [part[:count] for part, count in zip(parts, count_W)]

    def gather_experts(self, rows: Tensor, sizes: Sequence[int], to: Optional[int] = None) -> List[Tensor]:
        """What each of the ranks that share the experts has.

        Args:
            rows: this rank's, of any number.
            sizes: number of rows of each of the P ranks.
            to: place of the only rank that shall get them; ``None``: all.

        Returns:
            P tensors on the device of ``rows``; an empty list where they are not wanted.
        """
        if self.parallel == 1:
            return [rows]
        first = self.rank - self.group_rank
        parts = [rows.new_empty((size,) + rows.shape[1:]) for size in sizes]
        parts[self.group_rank].copy_(rows)
        for place, part in enumerate(parts):
            if to is None:
                dist.broadcast(part, self._global(first + place), group=self.expert_group)
            elif place != to and self.group_rank == place:
                dist.send(part, self._global(first + to), group=self.expert_group)
            elif place != to and self.group_rank == to:
                dist.recv(part, self._global(first + place), group=self.expert_group)
        return parts if to is None or self.group_rank == to else []

    def _global(self, rank: int) -> int:
        return _global_rank(self.group, rank)

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self  # a process group is no data: a copy of a model, such as an EMA, has the same


ALONE = Ranks()


def _global_rank(group: Any, rank: int) -> int:
    if group is None or group is dist.group.WORLD:
        return rank
    convert = getattr(dist, "get_global_rank", None)
    if convert is None:  # torch 1.12
        convert = dist.distributed_c10d._get_global_rank
    return convert(group, rank)


def _new_groups(group: Any, parts: List[List[int]], rank: int, timeout: Optional[timedelta]) -> Any:
    """Make a process group of each part, as every rank must, and return the one that has ``rank``."""
    limit: Any = {} if timeout is None else {"timeout": timeout}  # torch 1.12 takes no None
    made = [dist.new_group([_global_rank(group, member) for member in part], **limit) for part in parts]
    return next(new for new, part in zip(made, parts) if rank in part)


class _AllReduce(torch.autograd.Function):
    """A sum over ranks: the gradient of each rank's part is the sum of the ranks' gradients of the sum."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, group: Any) -> Tensor:
        ctx.group = group
        flat = flat.clone()
        dist.all_reduce(flat, group=group)
        return flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
