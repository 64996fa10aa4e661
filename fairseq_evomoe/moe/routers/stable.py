"""StableMoE (arXiv 2204.08396)."""

from dataclasses import dataclass
from typing import Any, List, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..capacity import CAPACITY, EVAL_CAPACITY, drop_overflow
from ..losses import mean
from ..merge_rule import MergeRule
from ..options import loss_weight, option
from ..ranks import ALONE, Ranks
from ..routing import Routing, RoutingContext, Vocabulary
from .base import CentroidRouter, fill_orthogonal
from .registry import register_router
from .router import BALANCE, linear32, need_tokens, need_vocabulary


@register_router("stable")
class StableRouter(CentroidRouter):
    """Learn a routing, distill it into a light router that knows a token's index alone, and freeze that one.

    ``s_te = x_t . c_e`` with a centroid for each expert; the weight of token t's expert e is
    ``sigmoid(s_te)`` in both stages.

    Stage 1: the expert of a token is the one with the highest score.  Losses: ``balance``, see
    ``stable_balance_loss``, and ``distillation``, the mean cross entropy of this expert under the softmax of
    the light router, whose logits are the products of a word embedding of ``light_dim`` numbers with
    centroids of its own.

    Stage 2 (``context.hard``): the expert of a token is that of the highest logit of the light router, which
    is frozen: the first training batch writes the expert of each entry of the vocabulary into ``table_V``, a
    part of the checkpoint, so that neither momentum nor weight decay can change it any more.  Both losses
    are 0, the distillation with gradients of 0 for the light router, so that no parameter is without one.

    Evaluation writes nothing, and while there is no table it routes as in stage 1, so that a checkpoint of
    stage 1 gives what validation gave in the run.  Training in stage 1 forgets the table.  Not from the
    paper: the light router starts with an embedding of N(0, 1) and centroids like the others.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        vocabulary: the dictionary that the layer's tokens are from.
        options: see ``Options``; L is ``light_dim``.
    """

    @dataclass(frozen=True)
    class Options(CentroidRouter.Options):
        """The light router, when it is frozen, and the losses."""

        stable_update: Optional[int] = option(
            None,
            "Update from which StableMoE's assignment of tokens is frozen; if not given, a tenth of the "
            "updates from the spawn to max-update.",
            at_least=0,
            duration=True,
        )
        light_dim: int = option(50, "Width of the word embeddings of StableMoE's light router.", at_least=1)
        capacity_factor: float = option(0.0, CAPACITY, at_least=0)
        eval_capacity_factor: float = option(0.0, EVAL_CAPACITY, at_least=0)
        balance_weight: float = loss_weight(0.3, BALANCE)
        distillation_weight: float = loss_weight(
            0.3, "Weight of the distillation of StableMoE's light router."
        )

    options: "StableRouter.Options"
    needs_tokens = True
    stages = True
    merge_rules = {
        "centroid_ED": MergeRule.mean,
        "light_centroid_EL": MergeRule.mean,
        "embedding_VL": MergeRule.unchanged,
        "table_V": MergeRule.table,
    }
    table_V: Tensor

    def __init__(
        self, dim: int, experts: int, vocabulary: Optional[Vocabulary] = None, **options: Any
    ) -> None:
        super().__init__(dim, experts, vocabulary=vocabulary, **options)
        size = need_vocabulary(vocabulary, "stable").size
        light_dim = self.options.light_dim
        self.embedding_VL = nn.Parameter(torch.empty(size, light_dim))
        self.light_centroid_EL = nn.Parameter(torch.empty(experts, light_dim))
        self.register_buffer("table_V", torch.full((size,), -1))

    @property
    def tables(self) -> List[nn.Parameter]:
        """See the parent: the word embeddings of the light router."""
        return [self.embedding_VL]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill all parameters from ``generator``; the table is not set."""
        super().initialize(generator)
        self.embedding_VL.copy_(torch.randn(self.embedding_VL.shape, generator=generator))
        fill_orthogonal(self.light_centroid_EL, 0.1, generator)
        self.table_V.fill_(-1)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class.

        Raises:
            ValueError: the context has no vocabulary indices.
        """
        token_T = need_tokens(context, "stable")
        score_TE = self.scores(x_TD)
        if context.hard and (self.training or self.table_V[0] >= 0):
            routing = self.route(score_TE, self._frozen(token_T))
            routing.losses["balance"] = score_TE.new_zeros(())
            routing.losses["distillation"] = self._no_loss().to(score_TE.dtype)
            drop_overflow(routing, self.options, self.training, context)
            return routing

        if self.training:
            self.table_V.fill_(-1)
        expert_T = score_TE.argmax(-1)
        routing = self.route(score_TE, expert_T)
        routing.losses["balance"] = stable_balance_loss(routing, context.ranks)
        light_TE = linear32(F.embedding(token_T, self.embedding_VL), self.light_centroid_EL)
        cross_entropy_T = F.cross_entropy(light_TE, expert_T, reduction="none")
        routing.losses["distillation"] = mean(cross_entropy_T, context.ranks)
        drop_overflow(routing, self.options, self.training, context)
        return routing

    @torch.no_grad()
    def _frozen(self, token_T: Tensor) -> Tensor:
        """The expert of each token in stage 2, int64, shape (T,)."""
        if self.table_V[0] < 0:
            self.table_V.copy_(self._light_expert(self.embedding_VL))
        return self.table_V[token_T]

    def _light_expert(self, embedding_NL: Tensor) -> Tensor:
        return linear32(embedding_NL, self.light_centroid_EL).argmax(-1)

    def _no_loss(self) -> Tensor:
        # sums over nothing: unlike a product with 0 they are 0 whatever the parameters have become
        return self.embedding_VL[:0].sum() + self.light_centroid_EL[:0].sum()


def stable_balance_loss(routing: Routing, ranks: Ranks = ALONE) -> Tensor:
    """Balance loss of StableMoE: ``1/T * sum_e (n_e - n) / n * sum_{t of e} w_t``, n = T / E.

    n_e is the number of tokens of expert e and w_t = sigmoid(s_te).  The paper's formula has no 1/T: it adds
    a sum over tokens to a task loss that is one as well, where here both are means.  0 if the loads are even.

    Returns:
        float32 scalar; the gradient flows through the weights.
    """
    weight_E = routing.weight_N.new_zeros(routing.experts).index_add(0, routing.expert_N, routing.weight_N)
    load_E, weight_E, tokens = ranks.total(routing.load_E().to(weight_E.dtype), weight_E, routing.tokens)
    tokens = tokens.clamp(min=1)
    even = tokens / routing.experts
    over_E = (load_E - even) / even
    return (over_E * weight_E).sum() / tokens
