"""The tree gate of COMET (arXiv 2306.02824)."""

from dataclasses import dataclass
from typing import Any, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn

from ..leaf_order import LeafOrder
from ..losses import active_balance_loss, entropy, mean
from ..offspring import Offspring
from ..options import OptionError, loss_weight, option
from ..routing import Routing, RoutingContext, at_pairs
from .registry import register_router
from .router import BALANCE, TOP_K, Router, at_most_all, entropy_sum, fill_uniform, linear32


@register_router("comet")
class CometRouter(Router):
    """k soft decision trees, the leaves of which are the experts.

    An inner node n of tree k sends the share ``S(x . w_kn)`` of a token to the left and the rest to the
    right, where S is the smooth-step function: 0 up to ``-gamma / 2``, 1 from ``gamma / 2`` on and
    ``-2 t^3 / gamma^3 + 3 t / (2 gamma) + 1 / 2`` in between.  With ``q_ke`` the share that reaches the
    leaf of expert e in tree k, the product of the shares on its path::

        g_ke = q_ke exp(x . a_ke) / sum over k', e' of q_k'e' exp(x . a_k'e')
        weight_e = sum over k of g_ke

    All experts are active at first.  As the nodes learn to decide, shares become exactly 0 or 1, and a
    token has at most k experts, whose weights sum to 1 as ever.  Losses: ``entropy``, the entropy of q,
    summed over trees, mean over tokens, which makes the nodes decide; ``balance``, ``E * sum_e f_e P_e``
    with f the share of the active pairs.

    The published weight of ``entropy`` was tuned for each task, from 0.05 to 10 (and gamma from 0.01 to
    10); ours is the least of them.  There are no biases, as the authors' codes differ on them.  Which leaf is
    which expert is learned in the first ``leaf_search`` updates, if there are any; see ``LeafOrder``.

    Any number of experts makes a tree: with nodes numbered by level, those of node i are 2i + 1 and
    2i + 2, the first E - 1 are inner nodes and the E others are leaves.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``; k is ``top_k``.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """How many trees, and how soft their nodes are."""

        top_k: int = option(2, TOP_K, at_least=1)
        gamma: float = option(
            1.0,
            "Width of the interval in which the smooth steps of COMET's trees are between 0 and 1.",
            above=0,
        )
        leaf_search: int = option(
            0,
            "Updates from the start of COMET's gate in which it learns which leaf of a tree is which expert "
            "(local search); 0: they are in the order of the experts.",
            at_least=0,
            duration=True,
        )
        entropy_weight: float = loss_weight(
            0.05, "Weight of the entropy of the leaves' shares, which makes the trees decide."
        )
        balance_weight: float = loss_weight(0.0, BALANCE)

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from at_most_all(self, "top_k", experts)

    options: "CometRouter.Options"
    order: Optional[LeafOrder]
    divides_itself = True
    merge_rules = None  # its experts are the leaves of a tree, each in its place

    def __init__(self, dim: int, experts: int, **options: Any) -> None:
        super().__init__(dim, experts, **options)
        self.top_k = self.options.top_k
        self.node = nn.Parameter(torch.empty(self.top_k, experts - 1, dim))
        self.leaf = nn.Parameter(torch.empty(self.top_k, experts, dim))
        self.register_module("order", None)
        if self.options.leaf_search > 0:
            self.order = LeafOrder(experts, self.options.leaf_search)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """As published: nodes from U(-gamma/100, gamma/100), leaves and their order from U(-0.05, 0.05)."""
        fill_uniform(self.node, self.options.gamma / 100, generator)
        fill_uniform(self.leaf, 0.05, generator)
        if self.order is not None:
            fill_uniform(self.order.score_LE, 0.05, generator)
            self.order.settle()

    @classmethod
    def parents(cls, children_E: Sequence[int]) -> List[int]:
        """See the parent: leaves become nodes, level by level, whatever numbers are asked for."""
        experts, children = len(children_E), sum(children_E)
        parents = []
        for node in range(children - 1, 2 * children - 1):
            while node >= 2 * experts - 1:  # below the leaves of the old tree
                node = (node - 1) // 2
            parents.append(node - (experts - 1))
        return parents

    def child_tensor(
        self, name: str, old: Tensor, shape: Sequence[int], offspring: Offspring, gate: bool = False
    ) -> Tensor:
        """See the parent: where there was a leaf, a node at its start divides tokens among its children."""
        if name != "node" or old.shape[1] == shape[1]:
            return super().child_tensor(name, old, shape, offspring, gate)
        new = self.node.detach()[:, old.shape[1] :].to(old)
        new = new if gate else torch.zeros_like(new)
        return torch.cat([old, new if old.dim() == 3 else new[..., 0]], 1)  # adafactor has one for a row

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class."""
        tokens = x_TD.shape[0]
        node_TKN = linear32(x_TD, self.node.flatten(0, 1)).view(tokens, self.top_k, self.experts - 1)
        share_TKE = leaf_shares(node_TKN, self.options.gamma)
        logits_TKE = linear32(x_TD, self.leaf.flatten(0, 1)).view_as(share_TKE)
        weight_TE = _softmax(logits_TKE, share_TKE).sum(1)
        if self.order is not None:
            weight_TE = self.order(weight_TE, context.noise_key)

        token_N, expert_N = weight_TE.nonzero(as_tuple=True)
        routing = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=at_pairs(weight_TE, token_N, expert_N),
            tokens=tokens,
            experts=self.experts,
            gate_entropy=entropy_sum(weight_TE),
            probability_TE=weight_TE,
        )
        if context.wants("entropy"):
            routing.losses["entropy"] = mean(entropy(share_TKE).sum(-1), context.ranks)
        if context.wants("balance"):
            routing.losses["balance"] = active_balance_loss(routing, context.ranks)
        return routing


def leaf_shares(node_TKN: Tensor, gamma: float) -> Tensor:
    """The share of each token that reaches each leaf.

    Args:
        node_TKN: what the inner nodes tell of the tokens, by the number of the node, shape (T, K, E - 1).
        gamma: width of the smooth step.

    Returns:
        shape (T, K, E), rows sum to 1; exactly 0 where a node sends nothing.
    """
    inner = node_TKN.shape[-1]
    ramp_TKN = (node_TKN / gamma + 0.5).clamp(0, 1)
    # 1 - S(t) = S(-t), which is nowhere negative by rounding
    side_TKN2 = torch.stack([_smooth(ramp_TKN), _smooth(1 - ramp_TKN)], -1)
    share_TKN = node_TKN.new_ones(node_TKN.shape[:2] + (1,))  # of the nodes of one level
    first = 0  # number of the level's first node
    leaves: List[Tensor] = []
    while first < inner:
        count = share_TKN.shape[-1]
        split = min(count, inner - first)
        leaves.append(share_TKN[..., split:])
        share_TKN = (share_TKN[..., :split, None] * side_TKN2[:, :, first : first + split]).flatten(2)
        first += count
    return torch.cat(leaves + [share_TKN], -1)


def _smooth(ramp: Tensor) -> Tensor:
    """The smooth step of ``t = gamma (ramp - 1/2)``, for a ramp from 0 to 1."""
    return ramp * ramp * (3 - 2 * ramp)


def _softmax(logits_TKE: Tensor, share_TKE: Tensor) -> Tensor:
    """``share * exp(logits)``, divided by its sum over a token's trees and leaves."""
    none_TKE = share_TKE == 0  # where log has no gradient
    log_TKE = share_TKE.masked_fill(none_TKE, 1).log().masked_fill(none_TKE, float("-inf"))
    return (logits_TKE + log_TKE).flatten(1).softmax(-1).view_as(share_TKE)
