"""Experts out of an expert: what EvoMoE (arXiv 2112.14397) calls expert-diversify, and its alternatives.

The paper's code has no expert-diversify.  ``mask``, ``noise`` and ``copy`` follow descriptions of the
paper, ``reinit`` is Drop-Upcycling (arXiv 2502.19261), ``split`` is EMoE (arXiv 2310.10908), ``cluster`` is
cluster-aware upcycling (arXiv 2604.13508) and ``slice`` is ours; the default strengths are ours but for
``reinit``.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..moe.noise import seed_of
from ..moe.offspring import Offspring
from ..moe.options import OptionError, Options, option
from ..moe.plan import Inherit, Origin, Plan
from .cluster_aware import find_clusters
from .clustering import balanced_kmeans
from .selection import Select, allot


class SpawnMethod(str, Enum):
    """What is done to each copy of the base expert."""

    mask = "mask"
    noise = "noise"
    reinit = "reinit"
    copy = "copy"
    slice = "slice"
    split = "split"  # type: ignore[assignment]
    cluster = "cluster"


DEFAULT_STRENGTH = {
    SpawnMethod.mask: 0.1,
    SpawnMethod.noise: 0.1,
    SpawnMethod.reinit: 0.5,
    SpawnMethod.copy: 0.0,
    SpawnMethod.slice: 0.1,
    SpawnMethod.split: 0.0,
    SpawnMethod.cluster: 0.5,
}
MAKE_GATE = (SpawnMethod.split, SpawnMethod.cluster)
"""The methods that make the rows of the gate, out of the base expert or what it sees."""


GATE_NOISE = 0.1


@dataclass(frozen=True)
class SpawnOptions(Options):
    """What happens to the copies of the base expert; the names are flat."""

    spawn_method: Optional[SpawnMethod] = option(
        None,
        "What is done to each copy of the base expert when the experts spawn: mask sets random weights to "
        "zero, noise adds Gaussian noise, reinit draws random hidden units anew, copy does nothing, slice "
        "keeps the most useful hidden units (for experts of different widths), split divides them among "
        "the experts (EMoE), cluster fits each to a cluster of tokens, whose centroid is its row of the "
        "gate. If not given, mask for experts as wide as the base, and slice for others.",
    )
    spawn_strength: Optional[float] = option(
        None,
        "Probability of a weight to be masked (0.1 if not given), standard deviation of the noise in units "
        "of the weights' own (0.1), share of the hidden units that are drawn anew (0.5), share of those that "
        "a slice takes at random (0.1), or share of what is taken from the weights outside of a cluster's "
        "directions (0.5).",
        at_least=0,
    )
    spawn_statistics: Inherit = option(
        "all",
        "Weights for which the optimizer's statistics of the base expert carry over to each of its copies: "
        "all, those that the spawn leaves unchanged (not a masked one, say), or none.",
    )
    spawn_rescale: bool = option(
        False,
        "Multiply the output of experts that spawn by what their weights are less than before, so that the "
        "layer gives as much as before (weight scaling); for gates whose probabilities are weights.",
    )
    spawn_select: Select = option(
        "even",
        "With several stages in moe-spawn-update, how many children an expert has: as many as any other "
        "(even), or more of those that have more tokens (load) or whose weights have a greater gradient "
        "(gradient, after Expert Upcycling); at least one each.",
    )
    spawn_gate_noise: float = option(
        GATE_NOISE,
        "With several stages in moe-spawn-update, standard deviation of the noise by which the gate tells "
        "children of one expert apart, in units of the gate's own.",
        at_least=0,
    )

    def contradictions(self, experts: int) -> Iterator[OptionError]:
        """See the parent."""
        method, strength = self.spawn_method, self.spawn_strength
        if strength is None or method is None:
            return
        if method in (SpawnMethod.copy, SpawnMethod.split):
            yield OptionError(
                "spawn_strength",
                f"`spawn_strength` has no effect with `spawn_method` {method.value}: leave it out or choose "
                "mask, noise, reinit or slice.",
            )
        elif strength > 1 and method != SpawnMethod.noise:
            yield OptionError(
                "spawn_strength",
                f"`spawn_strength` is a share between 0 and 1 for `spawn_method` {method.value}, but is "
                f"{strength}.",
            )


@dataclass(frozen=True)
class Spawn:
    """Makes many experts out of one.

    The result depends on nothing but the arguments, so every rank and every resumed run makes the same
    experts.  Names and shapes of tensors are those of ``moe.experts.Experts``.

    What the methods do:

    - ``copy``: nothing changes.
    - ``mask``: each weight of ``w1``, ``w2`` and ``w3`` is set to zero with probability ``strength``.
    - ``noise``: Gaussian noise is added to them, its standard deviation ``strength`` times the tensor's own.
    - ``reinit``: a random share ``strength`` of the hidden units is drawn anew from the mean and standard
      deviation of ``w1``, ``b1``, ``w2`` and ``w3``.  An expert narrower than the base has a random choice
      of its hidden units (ours).
    - ``slice``: an expert narrower than the base keeps its most useful hidden units (see ``usefulness``),
      but for a share ``strength`` of them, chosen at random from the others, so that experts of equal widths
      differ.  A wider one has all of them and new ones that leave its function as it is: their rows of
      ``w1``, ``b1`` and ``w3`` are drawn as for ``reinit``, those of ``w2`` are zero, which get a gradient
      at once.  One of the base's width is a copy.
    - ``split``: the base's hidden units are divided among the experts, by balanced k-means on the rows of
      ``w1`` at length 1.  The gate's row of an expert is the mean of its rows of ``w1``, and each ``b2`` is
      that of the base divided by E: all experts together, with weight 1, are the base.  (EMoE divides by the
      number of experts that a token has, which is right if they have weight 1; with the weights of most
      routers neither is exact.)
    - ``cluster``: see ``cluster_aware.py``.  With fewer tokens seen than experts, they are copies.

    Where many experts become more (``multiply``), each child is its parent changed in the same way, but that
    ``slice``, with no hidden unit to choose from but the parent's, draws the share ``strength`` of the least
    useful ones anew, as for a wider expert.  An only child is its parent.  ``split`` and ``cluster`` cannot
    do it.

    Attributes:
        experts: E, how many experts to make.
        layer: a number for the layer, different in each of a model's layers.
        method: see above.
        strength: see above; ``None``: ``DEFAULT_STRENGTH``.
        seed: seed of the random numbers.
        widths: hidden units of each expert; ``None``: those of the base, or their share with ``split``.
        inherit: see ``Plan``.
        gate_noise: see ``Offspring``.
        select: which expert has how many children.
        generation: how many experts become more now, on which random numbers depend; 1: the base expert.

    Raises:
        ValueError: widths that the method cannot make.
    """

    experts: int
    layer: int = 0
    method: SpawnMethod = SpawnMethod.mask
    strength: Optional[float] = None
    seed: int = 1
    widths: Optional[Sequence[int]] = None
    inherit: Inherit = Inherit.all
    gate_noise: float = GATE_NOISE
    select: Select = Select.even
    generation: int = 1

    def __post_init__(self) -> None:
        if self.widths is not None and (len(self.widths) != self.experts or min(self.widths) < 1):
            raise OptionError(
                "expert_sizes",
                f"`expert_sizes` must give each of the {self.experts} experts at least one hidden unit, but "
                f"gives {list(self.widths)}.",
            )

    @property
    def method_name(self) -> str:
        """The method as the option spells it."""
        return SpawnMethod(self.method).value

    @property
    def used_strength(self) -> float:
        """The strength that is in force."""
        return DEFAULT_STRENGTH[self.method] if self.strength is None else self.strength

    @property
    def needs_activity(self) -> bool:
        """Whether the base's activations should be measured before the spawn."""
        return self.method == SpawnMethod.slice

    @property
    def needs_sample(self) -> bool:
        """Whether tokens that the base sees should be kept for the spawn."""
        return self.method == SpawnMethod.cluster

    @property
    def makes_gate(self) -> bool:
        """Whether the router must have a linear gate; see ``plan.check_linear_gate``."""
        return self.method in MAKE_GATE

    def widths_from(self, base: int) -> List[int]:
        """Hidden units of each expert that is made out of a base with ``base`` of them.

        Raises:
            ValueError: the method cannot make experts of these widths.
        """
        split = self.method == SpawnMethod.split
        if split and base % self.experts != 0:
            raise OptionError(
                "spawn_method",
                "`spawn_method` split divides the base's hidden units among the experts, but there are "
                f"{base} units and `experts` is {self.experts}: let the one be a multiple of the other.",
            )
        expected = [base // self.experts if split else base] * self.experts
        if self.widths is None:
            return expected
        narrower = self.method == SpawnMethod.reinit and max(self.widths) <= base
        if not narrower and self.method != SpawnMethod.slice and list(self.widths) != expected:
            raise OptionError(
                "spawn_method",
                f"`spawn_method` {self.method_name} makes experts of {expected[0]} hidden units out of a "
                f"base of {base}, but they are to have {list(self.widths)}: use `spawn_method` slice, or "
                "reinit if none is wider, or leave out `expert_sizes` and `total_ffn_dim`.",
            )
        return list(self.widths)

    def plan(self, base: Dict[str, Tensor], measured: Optional[Tensor] = None) -> Plan:
        """What to do to the base expert, the same for each of its copies and for the optimizer's state.

        Args:
            base: the tensors of the base expert by name.
            measured: mean magnitude of each of its hidden units, for ``slice``; tokens that it has seen, for
                ``cluster``.
        """
        return replace(self._plan(base, measured), inherit=self.inherit)

    def _plan(self, base: Dict[str, Tensor], measured: Optional[Tensor]) -> Plan:
        units = base["w1"].shape[0]
        widths = self.widths_from(units)
        if self.method == SpawnMethod.slice:
            return self._slice(usefulness(base, measured), widths)
        if self.method == SpawnMethod.split:
            return self._is_sharded(base["w1"])
        origins = [Origin(0, self._units(e, units, width)) for e, width in enumerate(widths)]
        if self.method == SpawnMethod.cluster:
            return self._cluster(origins, measured)
        return Plan(origins, self._diversify)

    def _cluster(self, origins: List[Origin], x_ND: Optional[Tensor]) -> Plan:
        if x_ND is None or len(x_ND) < self.experts:
            return Plan(origins)
        clusters = find_clusters(x_ND, self.experts, self.generator("cluster"))

        def narrow(expert: int, name: str, rows: Tensor) -> Tensor:
            return clusters.narrowed(expert, rows, self.used_strength) if name in ("w1", "w3") else rows

        return Plan(origins, narrow, clusters.gate_ED)

    @property
    def measure(self) -> str:
        """What is to be measured before experts multiply: ``load``, ``gradient``, or nothing."""
        return "" if self.select == Select.even else Select(self.select).value

    def children(self, experts: int, wanted: int, demand_E: Optional[Tensor] = None) -> List[int]:
        """How many children each of many experts has, of so many in all, given how they are in demand."""
        return allot(experts, wanted, demand_E)

    def multiply(self, experts: Dict[str, Tensor], widths: Sequence[int], parent_E: Sequence[int]) -> Plan:
        """What to do to many experts so that each becomes several.

        Args:
            experts: the tensors of all of them by name.
            widths: hidden units of each.
            parent_E: number of the parent of each new one.
        """
        spawn = replace(self, generation=len(widths))
        return spawn._multiply(experts, widths, Offspring(parent_E, self.gate_noise, spawn.generator))

    def _multiply(self, experts: Dict[str, Tensor], widths: Sequence[int], offspring: Offspring) -> Plan:
        unit_EK = torch.arange(sum(widths)).split(list(widths))
        only_E = (offspring.siblings_E == 1).tolist()
        kept_EK = list(unit_EK)
        if self.method == SpawnMethod.slice:
            useful_EH = usefulness(experts).cpu().split(list(widths))
            kept_EK = [self._most_useful(unit_K, value_K) for unit_K, value_K in zip(unit_EK, useful_EH)]
        origins = [
            Origin(parent, unit_EK[parent])
            if only
            else Origin(parent, kept_EK[parent], new_units=widths[parent] - len(kept_EK[parent]))
            for parent, only in zip(offspring.parent_E, only_E)
        ]

        def change(child: int, name: str, rows: Tensor) -> Tensor:
            rows = self._with_new_units(child, name, rows, origins[child].new_units)
            return rows if only_E[child] else self._diversify(child, name, rows)

        return Plan(origins, change, inherit=self.inherit, offspring=offspring)

    def _most_useful(self, unit_K: Tensor, useful_K: Tensor) -> Tensor:
        """An expert's hidden units without the least useful ones, in their order."""
        kept = max(len(unit_K) - round(self.used_strength * len(unit_K)), 1)
        return unit_K[useful_K.sort(descending=True, stable=True).indices[:kept].sort().values]

    def _units(self, expert: int, units: int, width: int) -> Tensor:
        """All hidden units of the base, or a random choice for an expert that is narrower."""
        if width == units:
            return torch.arange(units)
        return torch.randperm(units, generator=self.generator(expert, "choice"))[:width].sort().values

    def generator(self, *key: object) -> torch.Generator:
        """A generator of its own for each key."""
        key = key if self.generation == 1 else ("generation", self.generation, *key)
        return torch.Generator().manual_seed(seed_of(self.seed, self.layer, *key))

    def _diversify(self, expert: int, name: str, base: Tensor) -> Tensor:
        strength = self.used_strength
        if self.method == SpawnMethod.reinit and name != "b2":
            # the same hidden units in all tensors
            order = torch.randperm(base.shape[0], generator=self.generator(expert, "units"))
            chosen = order[: round(strength * base.shape[0])]
            fresh = self._draw(expert, name, base, len(chosen))
            return base.index_copy(0, chosen.to(base.device), fresh)
        if name not in ("w1", "w2", "w3"):
            return base
        generator = self.generator(expert, name)
        if self.method == SpawnMethod.mask:
            keep = torch.rand(base.shape, generator=generator) >= strength
            return base * keep.to(base.device)
        if self.method == SpawnMethod.noise:
            noise = torch.randn(base.shape, generator=generator).to(base)
            return base + strength * _std(base).to(base) * noise
        return base

    def _draw(self, expert: int, name: str, base: Tensor, rows: int) -> Tensor:
        """New rows from the mean and standard deviation of a tensor."""
        fresh = torch.randn((rows,) + base.shape[1:], generator=self.generator(expert, name))
        return (base.float().mean().cpu() + _std(base).cpu() * fresh).to(base)

    def _slice(self, usefulness_H: Tensor, widths: List[int]) -> Plan:
        units = len(usefulness_H)
        order_H = usefulness_H.cpu().sort(descending=True, stable=True).indices
        origins = []
        for expert, width in enumerate(widths):
            kept = min(width, units)
            by_chance = round(self.used_strength * kept)
            best, others = order_H.split([kept - by_chance, units - kept + by_chance])
            drawn = torch.randperm(len(others), generator=self.generator(expert, "units"))[:by_chance]
            unit_K = torch.cat([best, others[drawn]]).sort().values
            origins.append(Origin(0, unit_K, new_units=width - kept))

        def fill_new_units(expert: int, name: str, rows: Tensor) -> Tensor:
            return self._with_new_units(expert, name, rows, origins[expert].new_units)

        return Plan(origins, fill_new_units)

    def _with_new_units(self, expert: int, name: str, rows: Tensor, new: int) -> Tensor:
        """New hidden units, the last rows, drawn but for those of ``w2``, so that they do nothing yet."""
        if new == 0 or name not in ("w1", "b1", "w3"):
            return rows
        old = rows[:-new]
        return torch.cat([old, self._draw(expert, name, old, new)])

    def _is_sharded(self, w1_HD: Tensor) -> Plan:
        cluster_H = balanced_kmeans(F.normalize(w1_HD.double(), dim=1), self.experts, self.generator("split"))
        units = [(cluster_H == e).nonzero().squeeze(1) for e in range(self.experts)]
        gate_ED = torch.stack([w1_HD[unit_K.to(w1_HD.device)].float().mean(0) for unit_K in units])

        def share_bias(expert: int, name: str, rows: Tensor) -> Tensor:
            return rows / self.experts if name == "b2" else rows

        return Plan([Origin(0, unit_K) for unit_K in units], share_bias, gate_ED)


def usefulness(base: Dict[str, Tensor], activity_H: Optional[Tensor] = None) -> Tensor:
    """How much each hidden unit of an expert matters: float32, shape (H,).

    The mean magnitude of its activation times the length of its row of ``w2``, which is what it adds to the
    output on average; without a measurement, the product of the lengths of its rows of ``w1``, ``w2`` and, in
    a gated expert, ``w3``.
    """
    length = {name: x.float().norm(dim=1) for name, x in base.items() if name in ("w1", "w2", "w3")}
    if activity_H is not None and bool((activity_H > 0).any()):
        return activity_H.to(length["w2"]) * length["w2"]
    return length["w1"] * length["w2"] * length.get("w3", 1.0)


def _std(x: Tensor) -> Tensor:
    return x.float().std(unbiased=False)
