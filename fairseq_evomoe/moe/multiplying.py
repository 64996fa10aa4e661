"""What happens to an MoE layer whose experts spawn again: each of them becomes one or several."""

from typing import TYPE_CHECKING, Sequence

import torch
from torch import Tensor

from .experts import take_settings
from .hyper_adapter import HyperAdapter
from .offspring import Offspring
from .plan import Plan

if TYPE_CHECKING:
    from .spawning import SpawningLayer


def plan(moe: "SpawningLayer") -> Plan:
    """What would become of the experts if they spawned now; the ranks that share them must all call this."""
    assert moe.router is not None
    wanted = max(moe.stages[moe.stage], moe.num_experts)  # experts that come and go may be more
    demand_E = None if moe.demand is None else moe.demand.share_E
    children_E = moe.spawner.children(moe.num_experts, wanted, demand_E)
    parent_E = moe.router.parents(children_E)
    return moe.spawner.multiply(moe.gather_experts(), moe.experts.widths, parent_E)


def try_routers(moe: "SpawningLayer") -> None:
    """Let the router of each stage become that of the next one, and throw them away.

    Raises:
        OptionError: it cannot.
    """
    for before, after in zip(moe.stages, moe.stages[1:]):
        old, new = (moe.build_router({}, experts) for experts in (before, after))
        for router in (old, new):
            router.initialize(moe.spawner.generator("router"))
        parent_E = new.parents(moe.spawner.children(before, after))
        new.inherit(old, Offspring(parent_E, 0.0, moe.spawner.generator))


@torch.no_grad()
def apply(moe: "SpawningLayer", plan: Plan) -> None:
    """Let experts, router and HyperMoE's embeddings be those of the children.

    What else stands beside the experts stays as it is.  The parameters are new objects afterwards.
    """
    assert moe.router is not None and plan.offspring is not None
    old, adapter = moe.router, moe.hyper_adapter
    moe.apply_plan(plan)
    like = moe.experts.w1
    moe.router = moe.build_router().to(device=like.device, dtype=like.dtype).train(moe.training)
    moe.router.initialize(moe.spawner.generator("router", moe.num_experts))
    moe.router.inherit(old, plan.offspring)
    if adapter is not None:
        new = HyperAdapter(moe.experts.dim, moe.num_experts, moe.of_stack).to(like.device, like.dtype)
        new.layer_embedding, new.first = adapter.layer_embedding, adapter.first
        embedding = plan.offspring.divided(adapter.expert_embedding, new.expert_embedding.shape)
        new.expert_embedding.copy_(embedding)
        take_settings(new.expert_embedding, adapter.expert_embedding)
        moe.hyper_adapter = new.train(moe.training)
    moe.freeze(*moe.frozen)
    moe.first_widths = list(moe.experts.widths)


def child_tensor(
    moe: "SpawningLayer", plan: Plan, key: str, old: Tensor, shape: Sequence[int], gate: bool = False
) -> Tensor:
    """What becomes of a tensor beside the experts, such as an optimizer's statistics of the router.

    Args:
        moe: the layer, whose experts have changed.
        plan: how.
        key: of the tensor in the layer's ``state_dict()``.
        old: that of the layer before.
        shape: of the layer's own.
        gate: see ``Router.child_tensor``.
    """
    module, _, name = key.partition(".")
    if plan.offspring is None:
        return old
    if module == "router":
        assert moe.router is not None
        return moe.router.child_tensor(name, old, shape, plan.offspring, gate)
    if module == "hyper_adapter" and name == "expert_embedding":
        return plan.offspring.divided(old, shape)
    return old
