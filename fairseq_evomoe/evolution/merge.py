"""Fewer experts out of many: similar ones are merged (expert pruning, arXiv 2407.09590).

The experts of a layer are grouped by similarity and each group becomes one expert, the mean of its members;
what the router has for them is merged likewise.  Everything here works on tensors under the names that they
have in ``MoELayer.state_dict()``; see ``checkpoints/merge.py`` for whole checkpoints.

The paper measures similarity on the data of a task and learns the merged experts' shares; here the measures
and shares are simple ones, see ``weight_similarity``, ``output_products`` and ``Merge``.

Shape suffixes: E experts, M experts after merging, K hidden units of one expert, H those of all, F numbers
that belong to a hidden unit, D width of a token, T tokens.
"""

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..moe.merge_rule import MergeRule, rule_of

UNIT_TENSORS = ("w1", "b1", "w2", "w3")
"""Tensors of the experts with one row for each hidden unit."""


class MergeError(ValueError):
    """Experts cannot be merged; one sentence that tells why and what to do, names of options in backticks."""


@dataclass(frozen=True)
class Merge:
    """How the experts of a layer become fewer, made once and then applied to every copy of its tensors.

    An expert of a group is ``sum_e share_e expert_e`` over its members e, hidden unit by hidden unit, in the
    order of the units that ``unit_EK`` gives.  Rows of a gate are averaged with the same shares, entries of a
    table that names experts are renumbered.

    With a softmax gate the probability of a merged expert is less than the sum of its members' was: n equal
    rows with logit z have ``n exp(z)`` before normalisation, their mean has ``exp(z)``.  It would take
    ``z + log n``, which a gate without bias cannot express.  Where all groups have n members nothing is lost,
    and a single expert (M = 1) has weight 1.

    Attributes:
        groups: members of each new expert.
        share_E: float64, share of each expert in its group's mean; sum to 1 over a group.
        unit_EK: int64, for each expert its hidden units as rows of the old ``w1``, in such an order that
            those of a group's members that are averaged have the same position.
        router_rules: what becomes of the router's tensors; see ``Router.merge_rules``.
    """

    groups: Sequence[Sequence[int]]
    share_E: Tensor
    unit_EK: Sequence[Tensor]
    router_rules: Mapping[str, MergeRule] = field(default_factory=dict)

    @property
    def widths(self) -> List[int]:
        """Hidden units of each new expert."""
        return [len(self.unit_EK[group[0]]) for group in self.groups]

    def tensor(self, name: str, old: Tensor) -> Tensor:
        """A tensor of the merged layer.

        Args:
            name: its name, such as ``experts.w1`` or ``router.weight``.
            old: that of the layer before, or an optimizer's statistics with a row for each of its rows.

        Returns:
            dtype and device of ``old``, which itself is returned where nothing depends on the experts.

        Raises:
            MergeError: a router whose tensors cannot be merged.
        """
        module, _, name = name.partition(".")
        if module == "experts":
            if name in UNIT_TENSORS:
                return self._units(old)
            return self.mean(old) if name == "b2" else old  # what is left is a norm that all experts share
        if module == "hyper_adapter":
            # HyperMoE adds up the embeddings of the experts that a token does not get
            return self.total(old) if name == "expert_embedding" else old
        return self._of_router(name, old) if module == "router" else old

    def mean(self, old: Tensor) -> Tensor:
        """The shares' mean of what belongs to experts: E equal stretches of rows become M."""
        return self._combine(old, self.share_E)

    def total(self, old: Tensor) -> Tensor:
        """The sum over each group of what belongs to experts: E equal stretches of rows become M."""
        return self._combine(old, torch.ones_like(self.share_E))

    def renumbered(self, table: Tensor) -> Tensor:
        """Numbers of old experts as those of the new ones; negative numbers, for none, stay.

        Raises:
            MergeError: a table with several experts for each token.
        """
        if table.dim() > 1 and table.shape[1] > 1:
            raise MergeError(
                f"The router's table sends each token to {table.shape[1]} different experts, which must not "
                "become one: only a table with one expert for each token can be merged."
            )
        number_E = torch.empty(len(self.share_E), dtype=table.dtype)
        for m, group in enumerate(self.groups):
            number_E[list(group)] = m
        return torch.where(table < 0, table, number_E.to(table.device)[table.clamp(min=0)])

    def _combine(self, old: Tensor, factor_E: Tensor) -> Tensor:
        rows = old.double().reshape(len(factor_E), -1)
        factor = factor_E.to(rows)
        new = torch.stack([factor[list(group)] @ rows[list(group)] for group in self.groups])
        return new.reshape((-1,) + old.shape[1:]).to(old.dtype)

    def _units(self, old: Tensor) -> Tensor:
        zero = old.new_zeros((), dtype=torch.float64)
        parts = [
            sum((old[self.unit_EK[e].to(old.device)].double() * self.share_E[e].item() for e in group), zero)
            for group in self.groups
        ]
        return torch.cat(parts).to(old.dtype)

    def _of_router(self, name: str, old: Tensor) -> Tensor:
        rule = rule_of(self.router_rules, name)
        if rule == MergeRule.mean:
            return self.mean(old)
        if rule == MergeRule.sum:
            return self.total(old)
        if rule == MergeRule.table:
            return self.renumbered(old)
        if rule == MergeRule.numbers:
            return torch.arange(len(self.groups)).to(old)
        if rule == MergeRule.unchanged:
            return old
        raise MergeError(
            f"The router has a tensor {name} that its class has no merge rule for: add it to merge_rules, or "
            "merge checkpoints of another router."
        )


def plan_merge(
    tensors: Dict[str, Tensor],
    widths: Sequence[int],
    similarity_EE: Tensor,
    experts: int,
    load_E: Optional[Tensor] = None,
    align: bool = False,
    router_rules: Optional[Mapping[str, MergeRule]] = None,
) -> Merge:
    """Group the experts of a layer and decide on the shares.

    Shares are those of the load, if it is known and the group has any, and equal otherwise.

    Args:
        tensors: ``w1``, ``b1``, ``w2``, ``b2`` and, if gated, ``w3`` of the experts.
        widths: hidden units of each expert.
        similarity_EE: how similar they are, such as ``weight_similarity``.
        experts: M.
        load_E: tokens of each expert.
        align: whether to match the hidden units of the members of a group to those of the most used one (the
            first, if the load is not known) before they are averaged; needs scipy.
        router_rules: what becomes of the router's tensors; see ``Router.merge_rules``.

    Raises:
        MergeError: a number of experts that cannot be made.
    """
    groups = group_experts(similarity_EE, widths, experts)
    share_E = torch.ones(len(widths), dtype=torch.float64)
    if load_E is not None:
        share_E = load_E.double().cpu().clone()
    unit_EK = list(torch.arange(sum(widths)).split(list(widths)))
    features_EKF = unit_features(tensors, widths) if align else []
    for group in groups:
        members = list(group)
        if share_E[members].sum() == 0:
            share_E[members] = 1.0
        share_E[members] /= share_E[members].sum()
        first = max(members, key=lambda e: (share_E[e].item(), -e))
        for e in members:
            if features_EKF and e != first:
                unit_EK[e] = unit_EK[e][match_units(features_EKF[first], features_EKF[e])]
    return Merge(groups, share_E, unit_EK, router_rules or {})


def group_experts(similarity_EE: Tensor, widths: Sequence[int], experts: int) -> List[List[int]]:
    """M groups of experts of equal widths, by agglomerative clustering with average linkage.

    Only experts of equal widths are merged.  If there are several widths, each keeps its share of the
    experts as nearly as possible, and at least one.

    Args:
        similarity_EE: symmetric.
        widths: hidden units of each expert.
        experts: M, from 1 to E - 1.

    Returns:
        the groups of each width in the order of their first members; widths in the order of their first
        experts.

    Raises:
        MergeError: M out of bounds, or less than the number of widths.
    """
    if not 1 <= experts < len(widths):
        raise MergeError(
            f"`experts` must be at least 1 and less than the {len(widths)} experts that there are, but is "
            f"{experts}."
        )
    classes = {width: [e for e, w in enumerate(widths) if w == width] for width in widths}
    groups = []
    for members, count in zip(classes.values(), _shares([len(c) for c in classes.values()], experts)):
        found = average_linkage(similarity_EE[members][:, members], count)
        groups += [[members[i] for i in group] for group in found]
    return groups


def _shares(sizes: Sequence[int], total: int) -> List[int]:
    """Numbers from 1 to each size that sum to the total, in proportion to the sizes as nearly as possible."""
    if total < len(sizes):
        raise MergeError(
            f"Only experts of equal widths are merged, and `expert_sizes` has made {len(sizes)} widths: "
            f"`experts` must be at least {len(sizes)}, but is {total}."
        )
    exact = [size * total / sum(sizes) for size in sizes]
    counts = [max(int(share), 1) for share in exact]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        movable = [i for i in range(len(sizes)) if (counts[i] < sizes[i] if step > 0 else counts[i] > 1)]
        i = max(movable, key=lambda i: step * (exact[i] - counts[i]))
        counts[i] += step
    return counts


def average_linkage(similarity_NN: Tensor, clusters: int) -> List[List[int]]:
    """Exactly so many clusters: those two with the highest mean similarity become one again and again.

    Returns:
        the members of each cluster, in order; clusters in the order of their first members.
    """
    similarity_NN = similarity_NN.double()
    member_CN = torch.eye(len(similarity_NN), dtype=torch.float64)
    while len(member_CN) > clusters:
        mean_CN = member_CN / member_CN.sum(1, keepdim=True)
        mean_CC = mean_CN @ similarity_NN @ mean_CN.t()
        above_CC = torch.ones_like(mean_CC).triu(1) > 0
        one, other = divmod(int(mean_CC.masked_fill(~above_CC, float("-inf")).argmax()), len(member_CN))
        member_CN[one] += member_CN[other]  # one < other, so that the order of first members stays
        member_CN = torch.cat([member_CN[:other], member_CN[other + 1 :]])
    return [row.nonzero().squeeze(1).tolist() for row in member_CN]


def unit_features(tensors: Dict[str, Tensor], widths: Sequence[int]) -> List[Tensor]:
    """All that belongs to each hidden unit: float64, for each expert (K, F), F = 2 D + 1 or 3 D + 1."""
    columns = [tensors[name].double().reshape(sum(widths), -1) for name in UNIT_TENSORS if name in tensors]
    return list(torch.cat(columns, 1).split(list(widths)))


def match_units(first_KF: Tensor, other_KF: Tensor) -> Tensor:
    """The order of the other expert's hidden units in which they are nearest to those of the first.

    The assignment of least total squared distance, by ``scipy.optimize.linear_sum_assignment``, in
    O(K^3) at worst.

    Returns:
        int64, shape (K,): ``other_KF[order]`` matches ``first_KF``.

    Raises:
        MergeError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MergeError("`align` needs scipy, which is not installed: pip install scipy.") from error
    # lengths of the rows do not change, so that the least distance is the largest product
    product_KK = first_KF @ other_KF.t()
    return torch.as_tensor(linear_sum_assignment(product_KK.cpu().numpy(), maximize=True)[1])


def weight_similarity(tensors: Dict[str, Tensor], widths: Sequence[int], align: bool = False) -> Tensor:
    """Cosine of all weights and biases of each two experts: float64, shape (E, E).

    Args:
        tensors: ``w1``, ``b1``, ``w2``, ``b2`` and, if gated, ``w3`` of the experts.
        widths: hidden units of each; experts of different widths have similarity 0.
        align: whether to match the hidden units of each two experts first, which takes E (E - 1) / 2
            assignments.
    """
    features_EKF = unit_features(tensors, widths)
    b2_ED = tensors["b2"].double()
    experts = len(widths)
    product_EE = torch.zeros(experts, experts, dtype=torch.float64)
    for i in range(experts):
        for j in range(i, experts):
            if widths[i] != widths[j]:
                continue
            one, other = features_EKF[i], features_EKF[j]
            if align and i != j:
                other = other[match_units(one, other)]
            product_EE[i, j] = product_EE[j, i] = (one * other).sum() + b2_ED[i] @ b2_ED[j]
    length_E = product_EE.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return product_EE / length_E[:, None] / length_E


def output_products(y_ETD: Tensor) -> Tensor:
    """Sum over tokens of the cosine of each two experts' outputs: float64, shape (E, E).

    Divided by the number of tokens it is the similarity of their outputs.

    Args:
        y_ETD: what every expert makes of the same tokens.
    """
    y_TED = F.normalize(y_ETD.double(), dim=-1).transpose(0, 1)
    return (y_TED @ y_TED.transpose(1, 2)).sum(0)
