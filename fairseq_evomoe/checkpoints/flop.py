"""What a model costs, told by the names and shapes of its tensors: parameters, and FLOP for a token.

A product with a matrix of n numbers is 2 n FLOP for a token, and 4 n more in the backward pass.  Embeddings,
positions and routers' tables are looked up, which costs nothing, and heads for classification, which see one
token of a sentence, are left out.  Attention costs ``4 d`` FLOP in each of its layers for each token that is
attended to, beside its matrices.  In a model with encoder and decoder a token is one of each.
"""

import re
from dataclasses import dataclass
from typing import Any, Callable, Collection, Dict, Iterable, Iterator, List, Optional, Type

from torch import Tensor

from ..moe.routers import Router
from ..moe.routers.dts import EvalRouting
from .index import is_expert
from .merge import Layer
from .saved_options import SavedOptions

FREE = ("zero_experts", "copy_experts", "constant_experts")
"""Options for experts that cost next to nothing."""

_LOOKED_UP = re.compile(r"embed_tokens\.weight|embed_positions\.|embed_tokens_|\.embedding_VL|version$")
_BESIDE = re.compile(r"classification_heads\.|_float_tensor$|\.num_batches|\.table_V$")
_ATTENTION = re.compile(r"_attn\.(k_proj\.weight|in_proj_weight)$")


@dataclass(frozen=True)
class Active:
    """How many experts a token has in evaluation.

    Attributes:
        least: at least so many.
        most: at most so many; more than ``least`` where it depends on the token.
        expected: what the options aim at; ``None``: nobody knows without data.
    """

    least: float
    most: float
    expected: Optional[float] = None


def experts_of_token(router: Type[Router], options: SavedOptions, experts: int) -> Active:
    """How many of a layer's experts, which have spawned, a token has in evaluation.

    Args:
        router: the layer's.
        options: the model's.
        experts: E.
    """
    declared, name = router.Options.declared(), router.experts_per_token
    if router.passes:
        given: Any = router.Options.given({"strata": options["strata"]})
        return Active(options["top_k"], options["top_k"] * len(given.sizes(experts)), None)
    if name is not None and ("eval_routing" not in declared or options["eval_routing"] == EvalRouting.top1):
        most = min(options[name], experts)
        free = sum(options[kind] for kind in FREE if kind in declared)
        return Active(max(most - free, 0), most, None if free else most)
    if name is None and router.one_expert:
        return Active(1, 1, 1)
    if "mean_experts" in declared:
        return Active(0, experts, options["mean_experts"])
    if "top_k" in declared:  # some of which may be the same
        return Active(1, min(options["top_k"], experts), None)
    return Active(0 if "slots" in declared else 1, experts, None)


@dataclass(frozen=True)
class Figures:
    """Something that depends on how many experts a token has.

    Attributes:
        least: with the fewest.
        most: with the most.
        expected: with those that are aimed at; ``None``: not known without data.
    """

    least: int
    most: int
    expected: Optional[int]


@dataclass(frozen=True)
class Flop:
    """FLOP for a token.

    Attributes:
        forward: of all matrices.
        training: of forward and backward pass.
        per_attended: beside them, in the forward pass, for each token that it attends to.
    """

    forward: Figures
    training: Figures
    per_attended: int


def active_parameters(total: int, tables: int, layers: List[Layer], active: Active) -> Figures:
    """Parameters that a token uses: all but the experts that it does not have, and routers' tables."""
    rest = total - tables - sum(layer_parameters(layer) for layer in layers)

    def used(experts: float) -> float:
        return rest + sum(
            _share(layer, experts * heads_of(layer)) * layer_parameters(layer) for layer in layers
        )

    return _figures(active, used)


def layer_parameters(layer: Layer) -> int:
    """Parameters of all experts of a layer."""
    return sum(tensor.numel() for tensor in layer.expert_tensors.values())


def flop(model: Dict[str, Tensor], layers: List[Layer], active: Active, tables: Collection[str]) -> Flop:
    """FLOP for a token.

    Args:
        model: the tensors; of a matrix that two modules share each use counts.
        layers: the MoE layers.
        active: experts of a token.
        tables: names of the tables of routers.
    """
    matrices = sum(x.numel() for key, x in model.items() if _is_matrix(key, x) and key not in tables)

    def forward(experts: float) -> float:
        return 2 * (matrices + sum(_share(layer, experts) * _multiplied(layer) for layer in layers))

    attended = sum(4 * d for d in _attention_widths(model))
    return Flop(_figures(active, forward), _figures(active, lambda k: 3 * forward(k)), attended)


def _multiplied(layer: Layer) -> int:
    """Numbers in the matrices of all experts; with MH-MoE, for each of the parts that a token is."""
    numbers = sum(x.numel() for x in layer.expert_tensors.values() if x.dim() == 2)
    numbers -= layer.expert_tensors["b2"].numel()
    return numbers * heads_of(layer)


def heads_of(layer: Layer) -> int:
    """Into how many parts the layer divides a token (``--moe-heads``)."""
    merge = next((x for key, x in layer.tensors.items() if key.startswith("heads.") and x.dim() == 2), None)
    return 1 if merge is None else merge.shape[1] // layer.expert_tensors["b2"].shape[1]


def _share(layer: Layer, experts: float) -> float:
    """Of a layer's experts, the share that a token has, if all are used alike."""
    return min(experts / len(layer.widths), 1.0)


def _figures(active: Active, function: Callable[[float], float]) -> Figures:
    expected = None if active.expected is None else round(function(active.expected))
    return Figures(round(function(active.least)), round(function(active.most)), expected)


def _is_matrix(key: str, tensor: Tensor) -> bool:
    skipped = is_expert(key) or _LOOKED_UP.search(key) or _BESIDE.search(key)
    return tensor.dim() == 2 and not skipped


def _attention_widths(model: Dict[str, Tensor]) -> Iterator[int]:
    for key, tensor in model.items():
        if _ATTENTION.search(key):
            yield tensor.shape[0] // (3 if "in_proj" in key else 1)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
