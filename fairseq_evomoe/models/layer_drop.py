"""LayerDrop that drops the same layers on all ranks."""

from typing import Iterator, Optional, Tuple

import torch
from fairseq.modules.layer_drop import LayerDropModuleList
from torch import nn

from ..moe.noise import seed_of
from .feed_forward import MoEFeedForward


class MoELayerDrop(LayerDropModuleList):
    """fairseq's list of layers, each of which is left out of a pass at random while training.

    fairseq draws from the default generator of the CPU, which is not in the same state on all ranks if
    dropout is drawn from it too.  An MoE layer that runs on some of the ranks only would wait for the others
    for ever, so on several ranks the draw depends on seed, update and the number of the pass in it alone.
    """

    _passes: Tuple[Optional[int], int] = (None, 0)  # the update, and the passes in it so far

    def __iter__(self) -> Iterator[nn.Module]:
        layers = list(nn.ModuleList.__iter__(self))
        first = next((layer for layer in layers if isinstance(layer, MoEFeedForward)), None)
        if not self.training or first is None or first.moe.ranks.size == 1:
            yield from super().__iter__()
            return
        update, passes = self._passes
        passes = passes + 1 if update == first.num_updates else 1
        self._passes = first.num_updates, passes
        spawn = first.moe.spawner
        seed = seed_of("layer drop", spawn.seed, spawn.layer, first.num_updates, passes)
        probability = torch.rand(len(layers), generator=torch.Generator().manual_seed(seed))
        yield from (layer for layer, p in zip(layers, probability.tolist()) if p > self.p)
