"""Hash layers (arXiv 2106.04426)."""

import heapq
from dataclasses import dataclass
from enum import Enum
from typing import Any, Iterator, Optional

import torch
from torch import Tensor

from ..merge_rule import MergeRule
from ..options import OptionError, option
from ..routing import Routing, RoutingContext, Vocabulary
from .registry import register_router
from .router import Router, float32, need_tokens, need_vocabulary, topk_routing


class HashKind(str, Enum):
    """How the entries of the vocabulary are shared out among the experts."""

    random = "random"
    balanced = "balanced"


@register_router("hash")
class HashRouter(Router):
    """Each token to the expert that a fixed table has for its vocabulary index, with weight 1.

    With several hashes each has a table of its own, which shares the vocabulary out among its own part of the
    experts, E / h of them (the paper's MultiHash, with h times as many experts, each a h-th as wide).

    ``random``: each entry of the vocabulary has an expert drawn at random.  ``balanced``: in the order of
    their frequency, most frequent first, each entry goes to the expert with the fewest occurrences so far;
    entries that never occur are dealt out in turn, and so are all if the dictionary has no counts.

    Nothing is learned; the table, of shape (V,) or (V, h), is a part of the checkpoint.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        vocabulary: the dictionary that the layer's tokens are from.
        options: see ``Options``; h is ``hashes``, a divisor of E.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """How the vocabulary is shared out."""

        hash: HashKind = option(
            "random",
            "How a hash layer assigns the vocabulary: at random, or balanced by the counts of the "
            "dictionary.",
        )
        hashes: int = option(
            1,
            "Number of hashes of a hash layer, each with its own part of the experts: MultiHash, for narrow "
            "experts.",
            at_least=1,
        )

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            if experts % self.hashes:
                yield OptionError(
                    "hashes",
                    f"`hashes` must be a divisor of the {experts} experts, but is {self.hashes}.",
                )
            if self.hashes > 1 and self.hash == HashKind.balanced:
                yield OptionError(
                    "hashes",
                    "`hashes` must be 1 with `hash` balanced, since others would be the same, but is "
                    f"{self.hashes}.",
                )

    options: "HashRouter.Options"

    needs_tokens = True
    one_expert = True  # with one hash
    experts_per_token = "hashes"
    unit_weight = True
    merge_rules = {"table_V": MergeRule.table}
    table_V: Tensor

    def __init__(
        self, dim: int, experts: int, vocabulary: Optional[Vocabulary] = None, **options: Any
    ) -> None:
        super().__init__(dim, experts, vocabulary, **options)
        self.vocabulary = need_vocabulary(vocabulary, "hash")
        self.hashes = self.options.hashes
        shape = (self.vocabulary.size,) + ((self.hashes,) if self.hashes > 1 else ())
        self.register_buffer("table_V", torch.zeros(shape, dtype=torch.long))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill the table; ``balanced`` has nothing random."""
        if self.options.hash == HashKind.random:
            part = self.experts // self.hashes
            table_V = torch.randint(part, self.table_V.shape, generator=generator)
            if self.hashes > 1:
                table_V += part * torch.arange(self.hashes)
        else:
            table_V = balanced_table(self.vocabulary.count_V, self.experts)
        self.table_V.copy_(table_V)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  There are no losses and no ``probability_TE``.

        Raises:
            ValueError: the context has no vocabulary indices.
        """
        expert_TK = self.table_V[need_tokens(context, "hash")].view(-1, self.hashes)
        return topk_routing(expert_TK, float32(x_TD).new_ones(expert_TK.shape), self.experts)


def balanced_table(count_V: Tensor, experts: int) -> Tensor:
    """An expert for each entry of the vocabulary: the most frequent entry to the least loaded expert.

    Args:
        count_V: how often each entry occurs, at least 0.
        experts: E.

    Returns:
        int64, shape (V,).  Entries of the same frequency are in the order of the vocabulary, experts of the
        same load in that of their number of entries; entries that do not occur are dealt out in turn.
    """
    counts = count_V.tolist()
    table = [0] * len(counts)
    # the load, the number of entries and the number of each expert
    heap = [(0.0, 0, expert) for expert in range(experts)]
    turn = 0
    for index in sorted(range(len(counts)), key=lambda i: -counts[i]):
        if counts[index] > 0:
            load, entries, expert = heap[0]
            heapq.heapreplace(heap, (load + counts[index], entries + 1, expert))
        else:
            expert = turn % experts
            turn += 1
        table[index] = expert
    return torch.tensor(table, dtype=torch.long)
