"""How MoE layers have routed a batch, for whoever asks before the batch goes through.

A layer keeps nothing of a batch, so that several threads may use it.  Who wants to know opens a record::

    with record() as routings:
        y = model(x)
    loss = loss_of(y) + routings.auxiliary_loss()

A record is one of this thread and this context alone.  The passes that activation checkpointing repeats while
gradients are computed come after the record is closed, and are not in it.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Dict, Iterator, Tuple

import torch
from torch import Tensor

from .routing import Routing

if TYPE_CHECKING:
    from .layer import MoELayer


class Record(Dict["MoELayer", Routing]):
    """The last routing of each layer that has run; one that was skipped is not there."""

    def weighted_losses(self) -> Iterator[Tuple[float, Tensor]]:
        """Weight and value of each auxiliary loss whose weight is not 0, layer by layer."""
        for layer, routing in self.items():
            for name, value in routing.losses.items():
                weight = layer.loss_weights.get(name, 0.0)
                if weight > 0:
                    yield weight, value

    def auxiliary_loss(self) -> Tensor:
        """The sum of all auxiliary losses by their weights: a scalar with gradient, 0 if there are none."""
        return sum((weight * value for weight, value in self.weighted_losses()), torch.zeros(()))


_records: ContextVar[Tuple[Record, ...]] = ContextVar("records", default=())


@contextmanager
def record() -> Iterator[Record]:
    """Have the routing of every MoE layer that runs in this context written down; may be nested."""
    made = Record()
    token = _records.set((*_records.get(), made))
    try:
        yield made
    finally:
        _records.reset(token)


@contextmanager
def no_record() -> Iterator[None]:
    """Have what MoE layers do in this context written down by nobody."""
    token = _records.set(())
    try:
        yield
    finally:
        _records.reset(token)


def open_records() -> Tuple[Record, ...]:
    """The records that wait for what a layer does; none, usually, in evaluation."""
    return _records.get()
