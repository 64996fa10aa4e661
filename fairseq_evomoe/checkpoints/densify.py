"""A checkpoint with MoE layers as one of fairseq's own dense models, which needs this package no more.

How experts become one is ``evolution/densify.py``.
"""

from argparse import Namespace
from typing import Any, Dict, List, MutableMapping, Optional

from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_NAME_REGISTRY
from torch import Tensor

from ..config.errors import PREFIX
from ..evolution.densify import gather_experts
from ..evolution.merge import MergeError
from ..evolution.plateau import Plateau
from ..moe.experts import to_dense
from .merge import Layer, dense_width
from .saved_options import SavedOptions

DENSE_MODELS = {
    "evomoe_lm": "transformer_lm",
    "evomoe_roberta": "roberta",
    "evomoe_transformer": "transformer",
}
"""fairseq's own model for each of ours."""

_CRITERION_PREFIX = "evomoe_"

_INEXPRESSIBLE = {
    "experts.w3": "gated experts (`expert_activation`)",
    "heads.": "`heads`",
    "shared.": "`shared_expert`",
    "hyper_adapter.": "`hyper_adapter`",
    "router.norms.": "the LayerNorms of `strata`",
    "router.free.": "`zero_experts`, `copy_experts` or `constant_experts`",
}
"""What no feed-forward network of fairseq's can be, by how the names of its tensors begin."""

_NOT_OF_DENSE = ("seed", "max_update")
"""Options of our models beside those of ``moe_``; fairseq's own have them elsewhere."""

_POSITIONS = "encoder.sentence_encoder.embed_positions.weight"


def densify_checkpoint(
    state: Dict[str, Any], layers: List[Layer], method: str, rank: Optional[int] = None
) -> Dict[str, Any]:
    """A dense checkpoint out of one of a model of ours, whose configuration is changed in place.

    The optimizer's state, the EMA and the best loss are another model's, and are left out.

    Args:
        state: the checkpoint.
        layers: its MoE layers.
        method: how experts become one; a single one, before the spawn, stays as it is.
        rank: see ``gather_experts``.

    Raises:
        MergeError: a model that fairseq's dense one cannot express, or experts that cannot become one so.
    """
    options = SavedOptions(state)
    name = _dense_model(options)
    model = {key: x for key, x in state["model"].items() if ".moe." not in key and key not in Plateau.KEYS}
    for layer in layers:
        _check_layer(layer, options, method)
        model.update(_dense_tensors(layer, options, method, rank))
    _change_configuration(state, name)
    extra = state.get("extra_state") or {}
    dense: Dict[str, Any] = {k: state[k] for k in ("args", "cfg", "criterion", "task_state") if k in state}
    dense["model"] = model
    dense["optimizer_history"] = [_with_dense_criterion(each) for each in state.get("optimizer_history", [])]
    dense["extra_state"] = {key: extra[key] for key in ("train_iterator",) if key in extra}
    return dense


def _dense_model(options: SavedOptions) -> str:
    found = str(options.of_model("_name", None) or options.of_model("arch", None))
    ours = ARCH_MODEL_NAME_REGISTRY.get(found, found)
    if ours not in DENSE_MODELS:
        raise MergeError(
            f"The checkpoint is of the model {found}, and fairseq's own is known only for "
            f"{', '.join(DENSE_MODELS)}: give a checkpoint of one of these."
        )
    return DENSE_MODELS[ours]


def _check_layer(layer: Layer, options: SavedOptions, method: str) -> None:
    """Refuse what the dense model would not be able to do."""
    for start, text in _INEXPRESSIBLE.items():
        if any(key.startswith(start) for key in layer.tensors):
            raise MergeError(
                f"{layer.name} has {text}, which no feed-forward network of fairseq's can express: densify "
                "checkpoints without."
            )
    activation, of_model = options["expert_activation"].value, options.of_model("activation_fn", "relu")
    if activation not in ("model", of_model):
        raise MergeError(
            f"The experts have `expert_activation` {activation}, and a dense model has {of_model} in all its "
            "layers: densify checkpoints whose experts have the model's."
        )
    if method == "topk" and not layer.alone and "experts.hidden.norm.weight" in layer.tensors:
        raise MergeError(
            "`method` topk would mix hidden units of several experts, and scale_fc normalises those of one "
            "together: use another."
        )


def _dense_tensors(
    layer: Layer, options: SavedOptions, method: str, rank: Optional[int]
) -> Dict[str, Tensor]:
    """The feed-forward network of a layer, by the keys that it has in fairseq's model."""
    tensors = layer.expert_tensors
    if not layer.alone:
        tensors = gather_experts(tensors, layer.widths, dense_width(layer, options), method, rank)
    dense = dict(to_dense(name, tensor) for name, tensor in tensors.items())
    for kind in ("weight", "bias"):
        if f"experts.hidden.norm.{kind}" in layer.tensors:
            dense[f"ffn_layernorm.{kind}"] = layer.tensors[f"experts.hidden.norm.{kind}"]
    return {f"{layer.name}.{name}": tensor for name, tensor in dense.items()}


def _change_configuration(state: Dict[str, Any], name: str) -> None:
    """Let a checkpoint's configuration be that of fairseq's model, wherever the checkpoint has one."""
    args, cfg = state.get("args"), state.get("cfg") or {}
    if args is not None:  # fairseq's oldest: all options together
        flat = _mapping(args)
        _drop_ours(flat)
        flat.update(arch=name, user_dir=None)
        _rename_criterion(flat, "criterion")
    if not cfg:
        return
    model = _mapping(cfg["model"])
    _drop_ours(model, *_NOT_OF_DENSE)
    model["_name"] = name
    if "arch" in model:
        model["arch"] = name
    if "max_positions" in model and model["max_positions"] is None and _POSITIONS in state["model"]:
        # ours asks the task, which fairseq's own does not; two rows are for padding
        model["max_positions"] = len(state["model"][_POSITIONS]) - 2
    if cfg.get("criterion"):
        _rename_criterion(_mapping(cfg["criterion"]), "_name")
    if cfg.get("common"):
        _mapping(cfg["common"])["user_dir"] = None


def _mapping(place: Any) -> MutableMapping[str, Any]:
    return vars(place) if isinstance(place, Namespace) else place


def _drop_ours(options: MutableMapping[str, Any], *others: str) -> None:
    for name in [name for name in options if name.startswith(PREFIX) or name in others]:
        del options[name]


def _dense_criterion(name: str) -> str:
    """fairseq's own criterion, to which ours adds the losses of routers; another one is as it is."""
    own = name[len(_CRITERION_PREFIX) :] if name.startswith(_CRITERION_PREFIX) else name
    return own if own in CRITERION_REGISTRY else name


def _rename_criterion(options: MutableMapping[str, Any], key: str) -> None:
    if options.get(key) is not None:
        options[key] = _dense_criterion(str(options[key]))


def _with_dense_criterion(entry: Dict[str, Any]) -> Dict[str, Any]:
    """An entry of the optimizers' history, which names the criterion's class."""
    for name, cls in CRITERION_REGISTRY.items():
        if cls.__name__ == entry.get("criterion_name"):
            return {**entry, "criterion_name": CRITERION_REGISTRY[_dense_criterion(name)].__name__}
    return entry
