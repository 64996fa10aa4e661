"""Hash layers (arXiv 2106.04426)."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Iterator, Optional

import torch
from torch import Tensor

from ..assignment import balanced_table
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
        size = need_vocabulary(vocabulary, "hash").size
        self.hashes = self.options.hashes
        shape = (size,) + ((self.hashes,) if self.hashes > 1 else ())
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
            assert self.vocabulary is not None
            table_V = balanced_table(self.vocabulary.count_V, self.experts)
        self.table_V.copy_(table_V)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.  There are no losses and no ``probability_TE``.

        Raises:
            ValueError: the context has no vocabulary indices.
        """
        expert_TK = self.table_V[need_tokens(context, "hash")].view(-1, self.hashes)
        return topk_routing(expert_TK, float32(x_TD).new_ones(expert_TK.shape), self.experts)
