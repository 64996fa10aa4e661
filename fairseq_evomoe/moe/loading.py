"""Let an MoE layer load whatever state there is of it: of one expert or many, of all ranks or of this one."""

from typing import TYPE_CHECKING, Dict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import MoELayer

WIDTHS_OF_SHARD = "experts.widths"
"""Key of the widths of all experts in a state that has only those of one rank."""


def fit(moe: "MoELayer", state_dict: Dict[str, Tensor], prefix: str) -> None:
    """Make a layer and a state, both in place, fit each other.

    One expert that is loaded into a layer with many is spawned into all of them; a layer with one expert gets
    room for as many as the state has; of all experts a rank takes its own.

    Args:
        moe: the layer that is to load the state.
        state_dict: the state, and perhaps others.
        prefix: of the layer's keys.

    Raises:
        ValueError: another number of experts.
    """
    b2 = state_dict.get(prefix + "experts.b2")
    if b2 is None:
        return
    if _has_spawned(state_dict, prefix) or b2.shape[0] > 1:
        widths = state_dict.pop(prefix + WIDTHS_OF_SHARD, None)
        if widths is not None:
            _fit_experts(moe, len(widths), state_dict, prefix)
        elif not is_shard(moe, state_dict, prefix):
            _fit_experts(moe, b2.shape[0], state_dict, prefix)
            for name in moe.expert_tensors():
                key = prefix + "experts." + name
                state_dict[key] = moe.local_rows(name, state_dict[key])
    elif moe.spawned and moe.num_experts > 1:
        _spawn(moe, state_dict, prefix)
    _fit_activity(moe, state_dict, prefix)


def is_shard(moe: "MoELayer", state_dict: Dict[str, Tensor], prefix: str) -> bool:
    """Whether a state has the experts of the layer's rank only, as its ``state_dict()`` gives them."""
    b2 = state_dict.get(prefix + "experts.b2")
    if not moe.sharded or b2 is None or not _has_spawned(state_dict, prefix):
        return False
    origin_E = state_dict.get(prefix + "router.origin_E")
    all_experts = moe.num_experts if origin_E is None else len(origin_E)
    return b2.shape[0] == len(moe.experts.local) != all_experts


def _has_spawned(state_dict: Dict[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix + "router.") for key in state_dict)


def _fit_experts(moe: "MoELayer", found: int, state_dict: Dict[str, Tensor], prefix: str) -> None:
    """Make the layer one that the state of a layer that has spawned fits into."""
    if not moe.spawned:
        moe.spawn()
    if moe.router is not None and moe.router.resizes and prefix + "router.origin_E" in state_dict:
        origin_E = state_dict[prefix + "router.origin_E"].round().long().tolist()
        widths = [moe.first_widths[origin] for origin in origin_E]
        if widths != moe.experts.widths:
            moe.allocate(widths)
            moe.router.allocate(len(widths))
            moe.num_experts = len(widths)
    if found != moe.num_experts:
        raise ValueError(
            "{}: the checkpoint has {} experts, the model {}".format(
                prefix.rstrip("."), found, moe.num_experts
            )
        )


@torch.no_grad()
def _spawn(moe: "MoELayer", state_dict: Dict[str, Tensor], prefix: str) -> None:
    """Replace the state of a layer with one expert by that of the grown layer, spawned from it."""
    moe.spawned_on_load = True
    base = {name: state_dict[prefix + "experts." + name] for name in moe.expert_tensors()}
    plan = moe.spawner.plan(base, state_dict.get(prefix + "activity.magnitude_H"))
    own = plan.only(moe.experts.local)
    for name, tensor in base.items():
        state_dict[prefix + "experts." + name] = own.weights(name, tensor)
    plan.fill_gate(moe.router)
    for key, tensor in moe.state_dict().items():
        module, _, name = key.partition(".")
        if module == "shared":
            state_dict[prefix + key] = base.get(name, tensor)
        elif module in ("router", "hyper_adapter"):
            state_dict[prefix + key] = tensor


def _fit_activity(moe: "MoELayer", state_dict: Dict[str, Tensor], prefix: str) -> None:
    """Let a state lack what is measured for the spawn, or have it in vain."""
    key = prefix + "activity.magnitude_H"
    if moe.activity is None:
        state_dict.pop(key, None)
    else:
        state_dict.setdefault(key, moe.activity.magnitude_H)
