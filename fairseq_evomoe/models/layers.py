"""What a model's MoE layers have, taken together: their ranks, and the parameters shared out among those."""

from typing import Iterator, Tuple

from torch import nn

from ..moe import MoELayer
from ..moe.ranks import ALONE, Ranks
from .feed_forward import moe_layers

__all__ = ["count_parameters", "keep_from_ddp", "moe_layers", "ranks_of", "sharded_parameters"]


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks that train a model."""
    return next((layer.moe.ranks for _, layer in moe_layers(model)), ALONE)


def sharded_parameters(model: nn.Module) -> Iterator[Tuple[str, MoELayer, str, nn.Parameter]]:
    """The parameters of which other ranks have other rows: key in the model, layer, name in it, parameter."""
    for layer_name, layer in moe_layers(model):
        if layer.moe.sharded:
            for name, parameter in layer.moe.experts.named_parameters(recurse=False):
                yield f"{layer_name}.moe.experts.{name}", layer.moe, name, parameter


def keep_from_ddp(model: nn.Module) -> None:
    """Let torch's DistributedDataParallel leave sharded parameters alone, once it is built around a model."""
    ignored = [key for key, _, _, _ in sharded_parameters(model)]
    setattr(model, "_ddp_params_and_buffers_to_ignore", ignored)  # noqa: B010  (a module's are typed)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a model, those of experts on other ranks included."""
    count = sum(p.numel() for p in model.parameters())
    for _, layer in moe_layers(model):
        sizes = layer.moe.experts.parameters_of_each()
        count += sum(sizes) - sum(sizes[e] for e in layer.moe.experts.local)
    return count
