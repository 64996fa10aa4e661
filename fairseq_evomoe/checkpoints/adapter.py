"""Low-rank experts without the model that they stand beside (SMoLA), and put on it again.

A model whose backbone is frozen differs from the dense one that it began with by its low-rank experts alone,
and by a classification head if it has one.
"""

import hashlib
from typing import Any, Dict

import torch
from torch import Tensor

from .. import compat
from ..models.low_rank import CHILD
from .files import CommandError
from .saved_options import SavedOptions

KIND = "evomoe_adapter"
"""Key that tells a file of experts alone from a checkpoint; its value is the version of the form."""

_OURS = (f".{CHILD}.", "classification_heads.")
_VOLATILE = (".version", "_float_tensor")
"""What fairseq keeps in a model's state beside parameters, perhaps uninitialised."""


def detach(state: Dict[str, Any]) -> Dict[str, Any]:
    """The experts of a checkpoint, with what tells which backbone they belong to.

    Args:
        state: the checkpoint.

    Raises:
        CommandError: it has no low-rank experts, or its backbone was trained with them.
    """
    model = state["model"]
    experts = {key: tensor for key, tensor in model.items() if _is_ours(key)}
    if not any(f".{CHILD}." in key for key in experts):
        raise CommandError("The checkpoint has no low-rank experts: give one that was trained with `rank`.")
    frozen = SavedOptions(state)["freeze"] or ""
    if "backbone" not in [part.strip() for part in frozen.split(",")]:
        raise CommandError(
            "The checkpoint's backbone was trained together with its low-rank experts, which are nothing "
            "without it: keep the whole checkpoint, or train with `freeze` backbone."
        )
    backbone = _backbone(model)
    kept: Dict[str, Any] = {
        key: state[key] for key in ("args", "cfg", "criterion", "task_state") if key in state
    }
    dtypes = {tensor.dtype for tensor in backbone.values() if tensor.is_floating_point()}
    return {
        KIND: 1,
        "backbone": _digest(backbone),
        "dtypes": list(map(str, dtypes)),
        "model": experts,
        **kept,
    }


def attach(adapter: Dict[str, Any], state: Dict[str, Any]) -> Dict[str, Any]:
    """The checkpoint that experts were taken from: bit for bit, but for the optimizer's state.

    Args:
        adapter: what ``detach`` has made.
        state: a checkpoint of the model that the experts stand beside, such as the dense one.

    Raises:
        CommandError: these are no experts, or those of another model.
    """
    if KIND not in adapter:
        raise CommandError("`adapter` has no low-rank experts alone: make it with evomoe detach.")
    if KIND in state:
        raise CommandError(
            "`checkpoint` has low-rank experts alone: give that of the model they stand beside."
        )
    backbone = {key: tensor for key, tensor in _backbone(state["model"]).items() if ".moe." not in key}
    if len(adapter["dtypes"]) == 1:  # a training with --fp16 had rounded it
        to = getattr(torch, adapter["dtypes"][0].split(".")[-1])
        backbone = {key: x.to(to) if x.is_floating_point() else x for key, x in backbone.items()}
    if _digest(backbone) != adapter["backbone"]:
        raise CommandError(
            "`adapter` was trained beside another model than that of `checkpoint`: give the checkpoint that "
            "its --finetune-from-model named."
        )
    whole: Dict[str, Any] = {
        key: adapter[key] for key in ("args", "cfg", "criterion", "task_state") if key in adapter
    }
    volatile = {key: tensor for key, tensor in state["model"].items() if key.endswith(_VOLATILE)}
    whole["model"] = {**volatile, **backbone, **adapter["model"]}
    whole["optimizer_history"] = state.get("optimizer_history", [])
    extra = state.get("extra_state") or {}
    whole["extra_state"] = {key: extra[key] for key in ("train_iterator",) if key in extra}
    return whole


def _is_ours(key: str) -> bool:
    return any(part in key for part in _OURS)


def _backbone(model: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The tensors of a model that its low-rank experts stand beside."""
    found = {key: x for key, x in model.items() if not _is_ours(key) and not key.endswith(_VOLATILE)}
    compat.drop_fast_path_copies(found)
    return found


def _digest(tensors: Dict[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, dtypes and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
