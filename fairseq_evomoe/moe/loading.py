"""Let an MoE layer load whatever state there is of it: of one expert or many, of all ranks or of this one.

Room is made and tensors are copied, nothing else: random numbers are drawn only where one expert is loaded
into a layer that has many, which is a spawn.
"""

import logging
from typing import TYPE_CHECKING, Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from .experts import BIASES
from .gate_warmup import fill_gate
from .options import OptionError
from .routers import Router
from .routers.dynmoe import DynMoERouter
from .routers.registry import name_of
from .statistics import measured_of

if TYPE_CHECKING:
    from .spawning import SpawningLayer

logger = logging.getLogger(__name__)

WIDTHS_OF_SHARD = "experts.widths"
"""Key of the widths of all experts in a state that has only those of one rank."""

STAGE = "stage"
"""Key of how many times the experts have spawned, in the state of a layer that does so more than once."""


class StateMismatch(OptionError):
    """A state is that of a layer with other options."""


def fit(moe: "SpawningLayer", state_dict: Dict[str, Any], prefix: str) -> None:
    """Make a layer and a state, both in place, fit each other.

    One expert that is loaded into a layer with many is spawned into all of them; a layer with one expert gets
    room for as many as the state has; of all experts a rank takes its own.

    Args:
        moe: the layer that is to load the state.
        state_dict: the state, and perhaps others.
        prefix: of the layer's keys.

    Raises:
        StateMismatch: the state is that of a layer with other options.
    """
    stage = state_dict.pop(prefix + STAGE, None)
    w1, b2 = (state_dict.get(f"{prefix}experts.{name}") for name in ("w1", "b2"))
    if w1 is None or b2 is None:
        return  # PyTorch names the missing keys
    _check_biases(moe, state_dict, prefix)
    if _tensors_of(state_dict, prefix + "router.") or b2.shape[0] > 1:
        _fit_spawned(moe, state_dict, prefix, stage)
    else:
        _check_units(moe.base_width, w1.shape[0], prefix)
        if moe.spawned and moe.num_experts > 1:
            _spawn(moe, state_dict, prefix)
    for name in ("activity", "demand", "warmup"):
        _fit_measured(state_dict, f"{prefix}{name}.", getattr(moe, name))


def is_shard(moe: "SpawningLayer", state_dict: Dict[str, Any], prefix: str) -> bool:
    """Whether a state has the experts of the layer's rank only, as its ``state_dict()`` gives them."""
    b2 = state_dict.get(prefix + "experts.b2")
    if not moe.sharded or b2 is None or not _tensors_of(state_dict, prefix + "router."):
        return False
    found = _tensors_of(state_dict, prefix + "router.")
    if set(found) == {"table_V"} and found["table_V"].max() < b2.shape[0] < moe.num_experts:
        return False  # all experts of another model, which no other tensor tells
    origin_E = state_dict.get(prefix + "router.origin_E")
    all_experts = moe.num_experts if origin_E is None else len(origin_E)
    return b2.shape[0] == len(moe.experts.local) != all_experts


def _tensors_of(state_dict: Dict[str, Any], prefix: str) -> Dict[str, Tensor]:
    """The tensors of one module, under its own names for them."""
    return {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}


def _fit_spawned(
    moe: "SpawningLayer", state_dict: Dict[str, Any], prefix: str, stage: Optional[Tensor]
) -> None:
    """Make the layer one that the state of a layer that has spawned fits into, and the state this rank's."""
    widths_of_shard = state_dict.pop(prefix + WIDTHS_OF_SHARD, None)
    number = None if stage is None else round(stage.item())
    if widths_of_shard is None and number in (None, moe.stage) and is_shard(moe, state_dict, prefix):
        return  # the layer's own state
    w1, b2 = (state_dict[f"{prefix}experts.{name}"] for name in ("w1", "b2"))
    found, units = b2.shape[0], w1.shape[0]
    if widths_of_shard is not None:
        found, units = len(widths_of_shard), int(widths_of_shard.sum())
    _begin_stage(moe, found, number)
    if found != moe.num_experts and not moe.resizes:
        _refuse_number(moe, found, prefix)
    widths = moe.widths_when_spawned()
    if not moe.resizes:
        _check_units(sum(widths), units, prefix)
    if moe.router is None and moe.num_experts == 1:
        return  # PyTorch names the router's keys, which a layer with one expert has not

    router_state = _tensors_of(state_dict, prefix + "router.")
    router = moe.build_router() if moe.router is None else moe.router
    _check_router(moe, router, router_state, prefix)
    _check_companions(moe, state_dict, prefix)
    if moe.router is None:
        moe.allocate_spawned(widths, router)
    if moe.resizes:
        origins = router_state["origin_E"].round().long().tolist()
        first = moe.first_widths
        if moe.grows_in_stages:  # all experts of all stages have one width
            first = first[:1] * (max(origins) + 1)
        _resize(moe, [first[origin] for origin in origins])
        if found != moe.num_experts:
            _refuse_number(moe, found, prefix)
    if widths_of_shard is None:
        for name in moe.expert_tensors():
            key = f"{prefix}experts.{name}"
            state_dict[key] = moe.local_rows(name, state_dict[key])


def _begin_stage(moe: "SpawningLayer", found: int, stage: Optional[int]) -> None:
    """Let a layer that grows in stages have the experts of that which a state is of; contents are undefined.

    Args:
        moe: the layer.
        found: the number of experts in the state.
        stage: how many times they have spawned, if the state tells.
    """
    if not moe.grows_in_stages:
        return
    if not moe.resizes:
        if found not in moe.stages:
            return  # is refused
        stage = moe.stages.index(found) + 1
    elif stage is None:
        stage = sum(number <= found for number in moe.stages)
    stage = min(max(stage, 1), len(moe.stages))
    if stage != moe.stage:
        width = moe.widths_when_spawned()[0]  # the same in all stages
        moe.num_experts, moe.stage = moe.stages[stage - 1], stage
        moe.allocate_spawned([width] * moe.num_experts)


def _resize(moe: "SpawningLayer", widths: List[int]) -> None:
    """Let a layer whose experts come and go have others."""
    if widths != moe.experts.widths:
        assert isinstance(moe.router, DynMoERouter)
        moe.allocate(widths)
        moe.router.allocate(len(widths))
        moe.num_experts = len(widths)
        moe.begin_demand()


def _refuse_number(moe: "SpawningLayer", found: int, prefix: str) -> None:
    if moe.grows_in_stages:
        raise StateMismatch(
            "spawn_update",
            f"The checkpoint has {found} experts in {_name(prefix)}, but the stages have "
            f"{', '.join(map(str, moe.stages))}: let `spawn_update` have a stage with {found}.",
        )
    raise StateMismatch(
        "experts",
        f"The checkpoint has {found} experts in {_name(prefix)}, but `experts` is {moe.num_experts}: give "
        f"`experts` {found}.",
    )


def _check_units(expected: int, found: int, prefix: str) -> None:
    if found != expected:
        raise StateMismatch(
            "widths",
            f"The checkpoint's experts in {_name(prefix)} have {found} hidden units in all, but the model's "
            f"{expected}: give the `widths` that it was trained with.",
        )


def _check_biases(moe: "SpawningLayer", state_dict: Dict[str, Any], prefix: str) -> None:
    """Refuse biases that a layer without them would leave out."""
    if moe.experts.bias:
        return
    for key in [f"{prefix}{module}.{name}" for module in ("experts", "shared") for name in BIASES]:
        if key in state_dict and bool(state_dict[key].any()):
            raise StateMismatch(
                "expert_bias",
                f"The checkpoint's experts in {_name(prefix)} have biases, and with `expert_bias` none there "
                "are none: leave it out.",
            )


def _check_router(moe: "SpawningLayer", router: Router, found: Dict[str, Tensor], prefix: str) -> None:
    """Refuse the state of a router that was made with other options, or of another one."""
    expected = router.state_dict()
    same = found.keys() == expected.keys()
    resizes = moe.resizes
    if same and (resizes or all(found[key].shape == tensor.shape for key, tensor in expected.items())):
        return
    for option, value in _told_options(moe, found).items():
        ours = getattr(router.options, option, value)
        if value != ours:
            value, ours = (getattr(each, "value", each) for each in (value, ours))
            raise StateMismatch(
                option,
                f"The checkpoint's router in {_name(prefix)} has the `{option}` {value}, but the model's "
                f"{ours}: give `{option}` {value}.",
            )
    if same:
        return  # PyTorch names the sizes
    theirs, ours = (sorted(f"router.{key}" for key in state) for state in (found, expected))
    raise StateMismatch(
        "router",
        f"The checkpoint's router in {_name(prefix)} has the parameters {theirs}, but that of `router` "
        f"{name_of(type(router))} has {ours}: give the `router` that it was "
        "trained with.",
    )


def _told_options(moe: "SpawningLayer", found: Dict[str, Tensor]) -> Dict[str, Any]:
    """What a router's state tells of its options."""
    return moe.router_class.options_of_state(found, moe.vocabulary)


def _check_companions(moe: "SpawningLayer", state_dict: Dict[str, Any], prefix: str) -> None:
    """Refuse a state with other modules beside the experts than the layer's."""
    for module, option, ours in (
        ("shared", "shared_expert", moe.has_shared_expert),
        ("hyper_adapter", "hyper_adapter", moe.has_hyper_adapter),
    ):
        found = bool(_tensors_of(state_dict, f"{prefix}{module}."))
        if found != ours:
            has, out = ("has a", "give") if found else ("has no", "leave out")
            raise StateMismatch(
                option,
                f"The checkpoint {has} module {module} in {_name(prefix)}, unlike the model: {out} "
                f"`{option}`.",
            )


def _name(prefix: str) -> str:
    return prefix.rstrip(".") or "the layer"


@torch.no_grad()
def _spawn(moe: "SpawningLayer", state_dict: Dict[str, Any], prefix: str) -> None:
    """Replace the state of a layer with one expert by that of one that has spawned from it."""
    moe.spawned_on_load = True
    base = {name: state_dict[f"{prefix}experts.{name}"] for name in moe.expert_tensors()}
    plan = moe.spawner.plan(base, measured_of(_tensors_of(state_dict, prefix + "activity."), moe.spawner))
    local = plan.only(moe.experts.local)
    for name, tensor in base.items():
        state_dict[f"{prefix}experts.{name}"] = local.weights(name, tensor)
    assert moe.router is not None
    gate_K = state_dict.get(prefix + "warmup.gate_K")
    if gate_K is not None and len(gate_K) == sum(p.numel() for p in moe.router.parameters()):
        fill_gate(moe.router, gate_K)
    plan.fill_gate(moe.router)
    for key, tensor in moe.state_dict().items():
        module, _, name = key.partition(".")
        if module == "shared":
            state_dict[prefix + key] = base.get(name, tensor)
        elif module in ("router", "hyper_adapter"):
            state_dict[prefix + key] = tensor


def _fit_measured(state_dict: Dict[str, Any], prefix: str, own: Optional[nn.Module]) -> None:
    """Let a state lack what is measured for a spawn, have it in vain, or have it for another spawn."""
    expected = {} if own is None else own.state_dict(prefix=prefix)
    found = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    known = found.keys() & expected.keys()
    fits = all(found[key].shape == expected[key].shape for key in known)
    if not fits:
        logger.warning(
            f"what the checkpoint has measured for the spawn in {_name(prefix)} is for other experts: it is "
            "measured anew"
        )
    state_dict.update({key: found[key] if fits and key in known else x for key, x in expected.items()})
