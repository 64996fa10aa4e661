"""Activations that are computed again in the backward pass instead of being kept."""

from typing import Any, Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(layer: Callable[[Tensor], Any], x: Tensor, offload: bool) -> Any:
    """What a layer makes of x, computed once more when gradients are.

    Not by fairseq's checkpoint: that one runs the first pass without a graph, in which the auxiliary losses,
    which are no output of the layer, would lose their gradient.

    Args:
        layer: fairseq's, as a function of its input.
        x: its input.
        offload: whether the input is kept on the CPU until then.
    """
    if not offload:
        return checkpoint(layer, x, use_reentrant=False)
    device, x = x.device, x.cpu()
    return checkpoint(lambda y: layer(y.to(device)), x, use_reentrant=False)
