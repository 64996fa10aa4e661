"""Experts out of an expert: what EvoMoE (arXiv 2112.14397) calls expert-diversify, and its alternatives.

The paper's code has no expert-diversify.  ``mask``, ``noise`` and ``copy`` follow descriptions of the
paper, ``reinit`` is Drop-Upcycling (arXiv 2502.19261); the default strengths are ours but for ``reinit``.
"""

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import Optional

import torch
from torch import Tensor


class SpawnMethod(str, Enum):
    """What is done to each copy of the base expert."""

    mask = "mask"
    noise = "noise"
    reinit = "reinit"
    copy = "copy"


DEFAULT_STRENGTH = {
    SpawnMethod.mask: 0.1,
    SpawnMethod.noise: 0.1,
    SpawnMethod.reinit: 0.5,
    SpawnMethod.copy: 0.0,
}


@dataclass(frozen=True)
class Spawn:
    """Makes the tensors of many experts out of those of one.

    The result depends on nothing but the arguments, so every rank and every resumed run makes the same
    experts.  Names and shapes are those of ``moe.experts.Experts``.

    Attributes:
        experts: E, how many experts to make.
        layer: a number for the layer, different in each of a model's layers.
        method: ``copy``: nothing changes; ``mask``: each weight of ``w1`` and ``w2`` is set to zero with
            probability ``strength``; ``noise``: Gaussian noise is added to ``w1`` and ``w2``, its standard
            deviation ``strength`` times that of the tensor; ``reinit``: a random share ``strength`` of the
            hidden units is drawn anew from the mean and standard deviation of ``w1``, ``b1`` and ``w2``.
        strength: see above; ``None``: ``DEFAULT_STRENGTH``.
        seed: seed of the random numbers.
    """

    experts: int
    layer: int = 0
    method: SpawnMethod = SpawnMethod.mask
    strength: Optional[float] = None
    seed: int = 1

    def __call__(self, name: str, base: Tensor) -> Tensor:
        """The rows of all experts, one after another.

        Args:
            name: ``w1``, ``b1``, ``w2`` or ``b2``.
            base: that tensor of the base expert.

        Returns:
            shape ``(E * base.shape[0], ...)``, dtype and device of ``base``.
        """
        return torch.cat([self._expert(e, name, base) for e in range(self.experts)])

    def inherit(self, name: str, base: Tensor) -> Tensor:
        """The optimizer's statistics of ``base``, one row block for each expert, unchanged."""
        return torch.cat([base] * self.experts)

    def generator(self, *key) -> torch.Generator:
        """A generator of its own for each key."""
        text = repr((self.seed, self.layer) + key).encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        return torch.Generator().manual_seed(number >> 1)

    @property
    def used_strength(self) -> float:
        """The strength that is in force."""
        return DEFAULT_STRENGTH[self.method] if self.strength is None else self.strength

    def _expert(self, expert: int, name: str, base: Tensor) -> Tensor:
        strength = self.used_strength
        if self.method == SpawnMethod.reinit and name in ("w1", "b1", "w2"):
            return self._reinit(expert, name, base, strength)
        if name not in ("w1", "w2"):
            return base
        generator = self.generator(expert, name)
        if self.method == SpawnMethod.mask:
            keep = torch.rand(base.shape, generator=generator) >= strength
            return base * keep.to(base.device)
        if self.method == SpawnMethod.noise:
            noise = torch.randn(base.shape, generator=generator).to(base)
            return base + strength * _std(base).to(base) * noise
        return base

    def _reinit(self, expert: int, name: str, base: Tensor, strength: float) -> Tensor:
        units = base.shape[0]
        # the same hidden units in all three tensors
        order = torch.randperm(units, generator=self.generator(expert, "units"))
        chosen = order[: round(strength * units)]
        fresh = torch.randn((len(chosen),) + base.shape[1:], generator=self.generator(expert, name))
        fresh = base.float().mean().cpu() + _std(base).cpu() * fresh
        return base.index_copy(0, chosen.to(base.device), fresh.to(base))


def _std(x: Tensor) -> Tensor:
    return x.float().std(unbiased=False)
