"""What becomes of tensors with rows for experts when each expert becomes several: the inverse of a merge."""

from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .assignment import balanced_table
from .options import OptionError


@dataclass(frozen=True)
class Offspring:
    """Which old expert each new one is a child of, and how the gate tells children of one expert apart.

    Attributes:
        parent_E: number of the parent of each new expert; every old expert has a child.
        noise: standard deviation of what is added to a child's row of a gate, in units of the gate's own; an
            only child's row is its parent's.
        generator: a generator of random numbers of its own for each key.
    """

    parent_E: Sequence[int]
    noise: float
    generator: Callable[..., torch.Generator]

    @property
    def experts(self) -> int:
        """Number of old experts."""
        return max(self.parent_E) + 1

    @property
    def siblings_E(self) -> Tensor:
        """How many children the parent of each new expert has, itself among them: int64."""
        parent_E = torch.as_tensor(self.parent_E)
        return torch.bincount(parent_E)[parent_E]

    def rows(self, old: Tensor, shape: Sequence[int]) -> Tensor:
        """Each child has what its parent had.

        Args:
            old: has a number of rows, or columns..., for each old expert, and perhaps some more after these.
            shape: of the tensor that is wanted; with that of ``old``, nothing changes.
        """
        found = self._index(old, shape)
        return old if found is None else old.index_select(found[0], found[1].to(old.device))

    def divided(self, old: Tensor, shape: Sequence[int]) -> Tensor:
        """Each child has an equal part of what its parent had."""
        part_E = (1 / self.siblings_E.double()).to(old)
        return self.rows(old, shape) * part_E.view((-1,) + (1,) * (old.dim() - 1))

    def differing(self, name: str, old: Tensor, shape: Sequence[int]) -> Tensor:
        """As ``rows``, but for noise by which children of one parent differ."""
        rows, found = self.rows(old, shape), self._index(old, shape)
        if found is None or self.noise == 0:
            return rows
        dim, index = found
        siblings = torch.ones(len(index))
        width = self._width(old.shape[dim], shape[dim])
        siblings[: width * len(self.parent_E)] = self.siblings_E.repeat_interleave(width).float()
        several = (siblings > 1).view((-1,) + (1,) * (rows.dim() - dim - 1)).to(rows.device)
        std = old.float().std(unbiased=False)
        noise = torch.randn(rows.shape, generator=self.generator(name)).to(rows)
        return rows + several * (self.noise * std).to(rows) * noise

    def table(self, old: Tensor, count_V: Optional[Tensor] = None) -> Tensor:
        """A table of experts: the entries of each are divided among its children, by how often they occur.

        Args:
            old: numbers of old experts, (V,) or (V, h); negative ones, for none, stay.
            count_V: how often each entry occurs; ``None``: all alike.
        """
        children: Dict[int, List[int]] = {}
        for child, parent in enumerate(self.parent_E):
            children.setdefault(parent, []).append(child)
        flat = old.reshape(-1).cpu()
        count = torch.zeros(old.shape[0]) if count_V is None else count_V.cpu()
        count = count.repeat_interleave(max(flat.numel() // max(old.shape[0], 1), 1))
        new = flat.clone()
        for parent, own in children.items():
            entries = (flat == parent).nonzero().squeeze(1)
            new[entries] = torch.tensor(own)[balanced_table(count[entries], len(own))].to(new.dtype)
        return new.view(old.shape).to(old.device)

    def _width(self, before: int, after: int) -> int:
        """How many rows an expert has where all have so many, and others may follow."""
        width, rest = divmod(after - before, len(self.parent_E) - self.experts)
        if rest or width < 1 or before < width * self.experts:
            raise OptionError(
                "spawn_update",
                f"A router with {before} rows for {self.experts} experts and {after} for "
                f"{len(self.parent_E)} does not say what experts inherit when they multiply: give "
                "`spawn_update` one stage.",
            )
        return width

    def _index(self, old: Tensor, shape: Sequence[int]) -> Optional[Tuple[int, Tensor]]:
        """The dimension of the experts, and the old place of what is at each new one."""
        for dim, (before, after) in enumerate(zip(old.shape, shape)):
            if before != after:
                width = self._width(before, after)
                place = torch.as_tensor(self.parent_E).unsqueeze(1) * width + torch.arange(width)
                return dim, torch.cat([place.flatten(), torch.arange(width * self.experts, before)])
        return None
