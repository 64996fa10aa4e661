"""A gate that learns before there are experts, so that they are born to one that knows where to send: ours.

Suffixes: see ``routing.py``; besides, K numbers of all parameters of a router.
"""

from typing import TYPE_CHECKING, List

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from .losses import mutual_information_loss
from .options import OptionError
from .routers.registry import name_of
from .routers.router import LinearRouter, Router
from .routing import RoutingContext
from .statistics import Collector

if TYPE_CHECKING:
    from .spawning import SpawningLayer


class GateWarmup(Collector):
    """Trains the gate that a layer with one expert will have, on what this expert sees.

    The loss is ``mean_t H(P_t) - H(mean_t P_t)`` with ``P = softmax(logits)``, which is minus the mutual
    information of tokens and experts: a gate that is confident for each token, and even over all of them.  It
    is the gate's alone: no gradient reaches the tokens, no random number is drawn, and nothing of the layer's
    output depends on it.  It is measured on every 4th token, and the gate moves once after each update, by
    Adam with a step of its own; so it is no parameter of the model's optimizer, which begins with it at the
    spawn.

    Attributes:
        gate_K: float32, the parameters of the router that it becomes, one after another.
        mean_K: Adam's mean of their gradients.
        square_K: Adam's mean of the squares of these.
        updates: float32 scalar, how often it has moved.

    Args:
        moe: the layer, before the spawn.

    Raises:
        OptionError: a router that has no linear gate.
    """

    STRIDE = 4
    RATE, DECAY, DECAY_OF_SQUARES, EPSILON = 0.003, 0.9, 0.98, 1e-8
    BUFFERS = ("gate_K", "mean_K", "square_K", "updates")

    gate_K: Tensor
    mean_K: Tensor
    square_K: Tensor
    updates: Tensor

    def __init__(self, moe: "SpawningLayer") -> None:
        super().__init__()
        router = moe.make_router({})
        check_gate(type(router))
        assert isinstance(router, LinearRouter)
        self._router: List[LinearRouter] = [router.float()]  # in a list, so that it is no part of the model
        gate_K = parameters_to_vector(router.parameters()).detach().clone()
        for name, tensor in zip(self.BUFFERS, (gate_K, gate_K * 0, gate_K * 0, torch.zeros(()))):
            self.register_buffer(name, tensor)

    def watch(self, x_TD: Tensor, context: RoutingContext) -> None:
        """Take the gradient of the loss for some tokens of all ranks, which must all call this."""
        router = self._router[0].to(self.gate_K.device)
        parameters = list(router.parameters())
        vector_to_parameters(self.gate_K, parameters)
        # those of a checkpoint of activations would run the layer once more
        hooks = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
        with torch.enable_grad(), hooks:
            probability_TE = router.logits(x_TD.detach(), context).softmax(-1)
            loss = mutual_information_loss(probability_TE, context.ranks)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found)]
        self.add(torch.cat([parameters_to_vector(grads), self.gate_K.new_ones(1)]))

    def no_sums(self) -> Tensor:
        """See ``Collector``: the sum of the gradients, and of how many."""
        return self.gate_K.new_zeros(len(self.gate_K) + 1)

    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``; an update in which nothing was measured changes nothing."""
        if not (sums_K[-1] > 0 and torch.isfinite(sums_K).all()):
            return
        grad_K = sums_K[:-1] / sums_K[-1]
        self.updates += 1
        self.mean_K.lerp_(grad_K, 1 - self.DECAY)
        self.square_K.lerp_(grad_K.square(), 1 - self.DECAY_OF_SQUARES)
        mean_K = self.mean_K / (1 - self.DECAY**self.updates)
        square_K = self.square_K / (1 - self.DECAY_OF_SQUARES**self.updates)
        self.gate_K -= self.RATE * mean_K / (square_K.sqrt() + self.EPSILON)

    def fill(self, router: Router) -> None:
        """Let a router of the layer begin with what was learned."""
        fill_gate(router, self.gate_K)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def fill_gate(router: Router, gate_K: Tensor) -> None:
    """Let the parameters of a router be ``GateWarmup.gate_K``."""
    parameters = list(router.parameters())
    for parameter, part in zip(parameters, gate_K.split([p.numel() for p in parameters])):
        parameter.copy_(part.view_as(parameter))


def check_gate(router: type) -> None:
    """Refuse a class of routers whose gate cannot learn by itself.

    Raises:
        OptionError: it has no linear gate.
    """
    if issubclass(router, LinearRouter) and router.linear_gate:
        return
    raise OptionError(
        "gate_warmup",
        "`gate_warmup` lets a linear gate learn before the spawn, which `router` "
        f"{name_of(router)} has not: leave it out, or use another router, such as dts or switch.",
    )
