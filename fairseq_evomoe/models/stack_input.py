"""What the layers of one stack of fairseq's share while it works on a batch."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Optional, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor, nn


@dataclass
class Lookup:
    """What the layers of one stack share while it works on a batch.

    Attributes:
        tokens: int64, (batch, seq): the tokens that were looked up.
        embeddings: (batch, seq, C): what was found, without gradient.
        memory: what routers hand on to those of later layers; each layer leaves another dictionary.
    """

    tokens: Optional[Tensor] = None
    embeddings: Optional[Tensor] = None
    memory: Dict[str, Any] = field(default_factory=dict)


class StackInput:
    """Knows what the layers of one stack share while this thread works on a batch.

    It hooks on to the stack's embeddings, which every forward pass looks up first, in incremental decoding
    too; ``forward`` of the stack itself is called by fairseq past any hook.  Each thread finds what it has
    looked up itself.
    """

    def __call__(self, embeddings: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        """A forward hook."""
        # another dictionary, since a copy of the context has the same one; keys are weak, so that a model
        # that is gone takes its batch along
        lookups = WeakKeyDictionary(_lookups.get({}))
        lookups[self] = Lookup(inputs[0], output.detach())
        _lookups.set(lookups)

    @property
    def lookup(self) -> Lookup:
        """What the batch has looked up that this thread works on."""
        return _lookups.get({}).get(self) or Lookup()


_lookups: ContextVar[Mapping[StackInput, Lookup]] = ContextVar("lookups")
