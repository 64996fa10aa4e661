"""What experts weigh less once they have spawned, and the factor of their output that makes up for it.

Where a router weighs an expert's output by a probability, that of the one expert was 1 (it had no router),
and that of the best of E is less; when each of E experts becomes m, that of a child is about an m-th of its
parent's.  So the layer's output shrinks with each spawn.  Those who make experts of a trained dense model
scale their weights for that reason (arXiv 2410.07524).  Here ``w2`` and ``b2`` are multiplied by a
factor that is measured on tokens, which is ours.

Suffixes: see ``routing.py``; R rows that are routed: tokens, or sub-tokens of several heads.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .plan import Plan
from .routers import Router
from .routing import RoutingContext

if TYPE_CHECKING:
    from .layer import MoELayer


def weights_now_and_then(moe: "MoELayer", plan: Plan, *inputs: Any) -> Tensor:
    """What some tokens' experts weigh together, now and after a spawn, as in evaluation.

    Args:
        moe: the layer, in evaluation mode.
        plan: of the spawn.
        inputs: arguments of the layer's ``forward``.

    Returns:
        float64, shape (2,): sums over the tokens.  Their quotient is the plan's ``output_scale`` that lets
        the output be, on average, what it was.  Both are the number of rows with routers that pass tokens
        through the experts several times, or give experts mixtures of tokens.
    """
    x_RD, context = moe.router_input(*inputs)
    rows = float(x_RD.shape[0])
    router = next_router(moe, plan)
    factor = moe.scaling_factor * (1 - moe.output_masking)
    then = _weight(router, x_RD, context, factor)
    now = rows if moe.router is None else _weight(moe.router, x_RD, context, factor)
    return torch.tensor([now, then] if now and then else [rows, rows], dtype=torch.float64)


def next_router(moe: "MoELayer", plan: Plan) -> Router:
    """A copy of the router that the layer will have when it has carried out the plan of a spawn."""
    like, experts = moe.experts.w1, len(plan.widths)
    router = moe.build_router({}, experts).to(device=like.device, dtype=like.dtype)
    if moe.router is not None:
        assert plan.offspring is not None
        router.initialize(moe.spawner.generator("router", experts))
        router.inherit(moe.router, plan.offspring)
    else:
        router.initialize(moe.spawner.generator("router"))
        if moe.warmup is not None:
            moe.warmup.fill(router)
        plan.fill_gate(router)
    return router.eval()


def _weight(router: Router, x_RD: Tensor, context: RoutingContext, factor: float) -> float:
    """The sum of all weights of experts that are not the router's own; 0: it does not say."""
    if router.passes:
        return 0.0
    # a copy of what is handed on to later layers, which belongs to the pass itself
    routing = router(x_RD, replace(context, memory=dict(context.memory)))
    if routing.slots is not None:
        return 0.0
    own_N = routing.expert_N < router.experts - router.free_experts
    return factor * float(routing.weight_N[own_N].detach().double().sum())
