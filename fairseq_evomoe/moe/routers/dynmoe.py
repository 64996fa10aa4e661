"""DynMoE: any number of experts for a token, and experts that come and go (arXiv 2405.14297)."""

from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..losses import mean, product_of_means
from ..merge_rule import MergeRule
from ..options import OptionError, loss_weight, option
from ..routing import Routing, RoutingContext, at_pairs
from ..statistics import Collector
from .registry import register_router
from .router import BALANCE, Router, float32, linear32


@dataclass
class Resize:
    """A change of the experts.

    Attributes:
        kept: numbers of the experts that stay, in their order.
        copied: number of the expert of which the new one, after those, is a copy; ``None``: none is added.
        direction_D: the new expert's row of the gate.
    """

    kept: List[int]
    copied: Optional[int] = None
    direction_D: Optional[Tensor] = None


@register_router("dynmoe")
class DynMoERouter(Collector, Router):
    """Each token to every expert that it is similar enough to, with equal weights.

    With ``s_te = sigmoid(cos(x_t, w_e))`` an expert is active where ``s_te > sigmoid(G_e)``, and each of the
    k active experts of a token has weight 1/k.  The gradient passes the step from ``s - sigmoid(G)`` to 0 or
    1 unchanged where the expert is active (straight-through, as in the authors' code), so that both w and G
    learn.  A token without an active expert gets nothing while training, and the expert of the largest s in
    evaluation.

    Losses: ``diversity``, ``||V V^T - I||_F`` with V the rows of w at length 1; ``simplicity``, the mean
    length of the rows; and two that only the authors' code has: ``balance``, ``E^2 * mean_e(P_e f_e)`` with f
    the share of the tokens that activate expert e and P the mean of s, divided by its sum over the experts;
    ``activity``, the mean of s over tokens and experts.  (The authors add all of them up under one weight.)

    While training, each window of updates counts the tokens of each expert and adds up those that none was
    active for.  At its end ``decide`` drops the experts that no token activated and, if a token activated
    none and there are fewer than ``max_experts`` left, adds one: its w is the direction of that sum, its G
    is 0, and the expert itself is a copy of the one that most tokens activated.  (The authors have
    ``max_experts`` from the start and switch those that are not in use on and off, so that a new one is what
    it was when it was last used.)  Whoever drives the training must call ``Collector``'s methods after each
    update, and carry the decision out before the next.

    Attributes:
        weight: w, shape (E, D).
        threshold_E: G.
        used_E: float32, tokens of each expert in this window.
        rejected_D: float32, sum of the tokens without an expert.
        updates: float32 scalar, length of the window so far.
        origin_E: float32, for each expert the number of that among the first ones whose width it has.

    Args:
        dim: D, width of a token.
        experts: E, number of experts at first.
        options: see ``Options``.  (The length of a window is ours: the paper gives none.)
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """How often and how far the number of experts changes, and the losses."""

        dynmoe_window: int = option(
            100,
            "DynMoE removes and adds experts after each window of this many updates; 0: never.",
            at_least=0,
            duration=True,
        )
        max_experts: int = option(
            0, "Most experts that DynMoE may have in a layer; 0: moe-experts, as at the start.", at_least=0
        )
        diversity_weight: float = loss_weight(
            0.01, "Weight of DynMoE's loss against experts with similar gates."
        )
        simplicity_weight: float = loss_weight(0.01, "Weight of DynMoE's loss against large gate weights.")
        balance_weight: float = loss_weight(0.0, BALANCE)
        activity_weight: float = loss_weight(
            0.0,
            "Weight of the mean of DynMoE's gates, a loss of the authors' code that the paper does not have.",
        )

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            if 0 < self.max_experts < experts:
                yield OptionError(
                    "max_experts",
                    f"`max_experts` must be at least the {experts} experts that there are at first, or 0 "
                    f"for as many, but is {self.max_experts}.",
                )

    options: "DynMoERouter.Options"
    origin_E: Tensor
    used_E: Tensor
    rejected_D: Tensor
    updates: Tensor
    resizes = True
    linear_gate = True
    unit_weight = True
    merge_rules = {
        "weight": MergeRule.mean,
        "threshold_E": MergeRule.mean,
        "origin_E": MergeRule.numbers,
        "used_E": MergeRule.sum,
        "rejected_D": MergeRule.unchanged,
        "updates": MergeRule.unchanged,
    }

    def __init__(self, dim: int, experts: int, **options: Any) -> None:
        super().__init__(dim, experts, **options)
        self.window = self.options.dynmoe_window
        self.max_experts = self.options.max_experts or experts
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.threshold_E = nn.Parameter(torch.empty(experts))
        self.register_buffer("origin_E", torch.arange(experts, dtype=torch.float32))
        self.restart()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Orthonormal rows of w as far as the width allows, from ``generator``, and G = 0."""
        long, short = max(self.weight.shape), min(self.weight.shape)
        q, r = torch.linalg.qr(torch.randn(long, short, generator=generator))
        q = q * r.diagonal().sign()
        self.weight.copy_(q if q.shape == self.weight.shape else q.t())
        self.threshold_E.zero_()

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens; see the class."""
        x_TD = float32(x_TD)
        direction_ED = F.normalize(self.weight.to(x_TD.dtype), dim=1)
        score_TE = linear32(F.normalize(x_TD, dim=1), direction_ED).sigmoid()
        margin_TE = score_TE - self.threshold_E.to(x_TD.dtype).sigmoid()
        active_TE = margin_TE > 0
        if not self.training:
            alone_T1 = ~active_TE.any(1, keepdim=True)
            best_TE = torch.zeros_like(active_TE).scatter(1, score_TE.argmax(1, keepdim=True), True)
            active_TE = active_TE | (alone_T1 & best_TE)
        elif self.window > 0:
            self._count(x_TD, active_TE)

        token_N, expert_N = active_TE.nonzero(as_tuple=True)
        margin_N = at_pairs(margin_TE, token_N, expert_N)
        step_N = 1 + (margin_N - margin_N.detach())
        routing = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=step_N / active_TE.sum(1)[token_N],
            tokens=x_TD.shape[0],
            experts=self.experts,
        )
        if context.statistics:
            gram_EE = linear32(direction_ED, direction_ED)
            one_EE = torch.eye(self.experts, dtype=gram_EE.dtype, device=gram_EE.device)
            routing.losses["diversity"] = (gram_EE - one_EE).norm()
            routing.losses["simplicity"] = self.weight.to(x_TD.dtype).norm(dim=1).mean()
        if context.wants("balance") and self.options.balance_weight > 0:
            share_TE = score_TE / score_TE.sum(1, keepdim=True)
            routing.losses["balance"] = product_of_means(
                routing.load_E(), share_TE.sum(0), routing.tokens, context.ranks
            )
        if context.wants("activity"):
            routing.losses["activity"] = mean(score_TE.mean(1), context.ranks)
        return routing

    @torch.no_grad()
    def _count(self, x_TD: Tensor, active_TE: Tensor) -> None:
        rejected_T1 = (~active_TE.any(1, keepdim=True)).to(x_TD.dtype)
        used_E = active_TE.to(x_TD.dtype).sum(0)
        # no matrix product, which autocast would round
        self.add(torch.cat([used_E, (rejected_T1 * x_TD).sum(0)]))

    def no_sums(self) -> Tensor:
        """See ``Collector``: the E loads and the sum of the rejected tokens."""
        return self.used_E.new_zeros(self.experts + self.dim)

    def commit(self, sums_K: Tensor) -> None:
        """See ``Collector``."""
        used_E, rejected_D = sums_K.split([self.experts, self.dim])
        self.used_E += used_E
        self.rejected_D += rejected_D
        self.updates += 1

    def restart(self) -> None:
        """Begin a window."""
        shapes: Dict[str, Tuple[int, ...]] = {
            "used_E": (self.experts,),
            "rejected_D": (self.dim,),
            "updates": (),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, device=self.weight.device))

    @property
    def due(self) -> bool:
        """Whether the window is over."""
        return self.window > 0 and self.updates.item() >= self.window

    def decide(self) -> Optional[Resize]:
        """What to change at the end of a window, by its counts alone; ``None``: nothing."""
        busiest = int(self.used_E.argmax())
        kept = self.used_E.nonzero().squeeze(1).tolist() or [busiest]
        if self.rejected_D.any() and len(kept) < self.max_experts:
            return Resize(kept, busiest, F.normalize(self.rejected_D, dim=0))
        return Resize(kept) if len(kept) < self.experts else None

    @torch.no_grad()
    def resize(self, change: Resize) -> None:
        """Carry out a change and begin a window.  The parameters are new objects afterwards."""
        sources = change.kept + ([] if change.copied is None else [change.copied])
        old = {name: getattr(self, name).detach()[sources] for name in ("weight", "threshold_E", "origin_E")}
        if change.copied is not None:
            old["weight"][-1] = change.direction_D
            old["threshold_E"][-1] = 0
        self.allocate(len(sources))
        for name, tensor in old.items():
            getattr(self, name).copy_(tensor)

    def allocate(self, experts: int) -> None:
        """Change the number of experts.  What concerns them is undefined until it is filled."""
        self.experts = experts
        for name, old in list(self.named_parameters()):
            new = nn.Parameter(old.new_empty((experts,) + old.shape[1:]), requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)  # param_group, optim_overrides, ...
            self.register_parameter(name, new)
        self.origin_E = self.origin_E.new_empty(experts)
        self.restart()
