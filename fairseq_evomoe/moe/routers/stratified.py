"""Stratified MoE: experts in strata, which a token may pass one after another (arXiv 2305.02176)."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..offspring import Offspring
from ..options import OptionError, like, option
from ..ranks import Ranks
from ..routing import Part, Routing, RoutingContext, Vocabulary
from .registry import register_router
from .router import ApplyExperts, Renormalize, Router
from .topk import BalanceChoices, TopKRouter


class StrataNorm(str, Enum):
    """Where Stratified MoE normalises."""

    every = "every"
    inner = "inner"


@register_router("stratified")
class StratifiedRouter(Router):
    """Experts lie in S strata; a token passes one to S of them, from lower to higher ones.

    Every token starts in the lowest stratum.  In stratum s a top-k gate (``TopKRouter``) of its own scores
    the experts of s and of all higher strata.  With r what the layer's output is added to, and y_s the
    weighted outputs of the experts chosen in s, a token's way is::

        first    x_0 = x                             the layer's input
        then     j = stratum of the best expert      the token comes to stratum j + 1
                 x_{j+1} = LN_{j+1}(r + sum of its y_s so far)
        end      y = sum of its y_s                  once it has passed the last stratum, S - 1
                 LN_S(r + y)                         is what goes on to the next layer, see ``finish``

    So the last pass of each token has its best expert in the last stratum, and its cost is what it passes.
    Of several experts of a pass only the best says where the token goes: another one may be in a higher
    stratum, and be chosen again there, which makes two pairs of them.
    Every stratum that tokens may come to, and the end, has a LayerNorm, which starts with 1 and 0.

    Losses: those of the gates, each averaged over the passes that a token of any rank has made.  The balance
    loss is ``E' * sum_e f_e P_e`` over the E' experts that a pass can reach, f by first choices.

    A capacity is ``floor(factor * k * ceil(tokens of the pass / E'))``; in a decoder, where the number of
    those would tell of later tokens, that of all tokens of the layer.

    Attributes:
        strata: number of experts of each stratum.
        gates: a router of each stratum.
        norms: the LayerNorm of each stratum but the first, and of the end unless ``strata_norm`` is inner.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        options: see ``Options``.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """How experts lie in strata, and what a stratum's gate is."""

        strata: Optional[str] = option(
            None,
            "Number of experts in each stratum of moe-router stratified, from the lowest on, with commas "
            "between, such as 4,4; two halves if not given.",
        )
        strata_norm: StrataNorm = option(
            "every",
            "Where moe-router stratified has LayerNorms: before every stratum but the first and, as "
            "published, on the sum of the layer's output and what it is added to (every), or only before "
            "strata (inner).",
        )
        top_k: int = like(TopKRouter.Options, "top_k", 2)
        renormalize: Renormalize = like(TopKRouter.Options, "renormalize", "always")
        random_second: bool = like(TopKRouter.Options, "random_second", False)
        capacity_factor: float = like(TopKRouter.Options, "capacity_factor", 0.0)
        eval_capacity_factor: float = like(TopKRouter.Options, "eval_capacity_factor", 0.0)
        balance_weight: float = like(TopKRouter.Options, "balance_weight", 0.01)
        entropy_weight: float = like(TopKRouter.Options, "entropy_weight", 0.0)
        z_weight: float = like(TopKRouter.Options, "z_weight", 0.0)
        mutual_information_weight: float = like(TopKRouter.Options, "mutual_information_weight", 0.0)

        def sizes(self, experts: int) -> List[int]:
            """Number of experts of each stratum.

            Raises:
                OptionError: they are none.
            """
            if self.strata is None:
                return [experts // 2, experts - experts // 2] if experts > 1 else [experts]
            parts = [part.strip() for part in self.strata.split(",")]
            sizes = [int(part) if part.isdecimal() else 0 for part in parts]
            if min(sizes) < 1 or sum(sizes) != experts:
                raise OptionError(
                    "strata",
                    f"`strata` must be whole numbers from 1 on, with commas between, that sum to the "
                    f"`experts` ({experts}), but is {self.strata}.",
                )
            return sizes

        def of_gate(self) -> Dict[str, Any]:
            """Those of them that a stratum's gate has."""
            names = (name for name in self.declared() if name in TopKRouter.Options.declared())
            return {**{name: getattr(self, name) for name in names}, "balance_choices": BalanceChoices.first}

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            try:
                last = self.sizes(experts)[-1]
            except OptionError as error:
                yield error
                return
            if self.top_k > last:
                yield OptionError(
                    "top_k",
                    f"`top_k` must be from 1 to the {last} experts of the last of the `strata`, all that its "
                    f"gate can choose from, but is {self.top_k}.",
                )
            else:
                yield from TopKRouter.Options(**self.of_gate()).contradictions(last)

    options: "StratifiedRouter.Options"
    passes = True

    def __init__(
        self, dim: int, experts: int, vocabulary: Optional[Vocabulary] = None, **options: Any
    ) -> None:
        super().__init__(dim, experts, vocabulary, **options)
        self.strata = self.options.sizes(experts)
        self.options = replace(self.options, strata=",".join(map(str, self.strata)))
        given = self.options.of_gate()
        reachable = [sum(self.strata[stratum:]) for stratum in range(len(self.strata))]
        self.gates = nn.ModuleList(TopKRouter(dim, count, vocabulary, **given) for count in reachable)
        norms = len(self.strata) - (self.options.strata_norm == StrataNorm.inner)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(norms))

    @classmethod
    def options_of_state(
        cls, tensors: Dict[str, Tensor], vocabulary: Optional[Vocabulary] = None
    ) -> Dict[str, Any]:
        """See the parent: the strata and their norms."""
        reachable = [len(tensor) for key, tensor in tensors.items() if key.startswith("gates.")]
        if not reachable:
            return {}
        sizes = [count - above for count, above in zip(reachable, [*reachable[1:], 0])]
        norms = sum(key.startswith("norms.") and key.endswith(".weight") for key in tensors)
        norm = StrataNorm.inner if norms < len(sizes) else StrataNorm.every
        return {"strata": ",".join(map(str, sizes)), "strata_norm": norm}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Gates as those of ``TopKRouter``, one after another; norms with 1 and 0."""
        for gate in self.gates:
            assert isinstance(gate, TopKRouter)
            gate.initialize(generator)
        for name, parameter in self.norms.named_parameters():
            parameter.fill_(1 if name.endswith("weight") else 0)

    def child_tensor(
        self, name: str, old: Tensor, shape: Sequence[int], offspring: Offspring, gate: bool = False
    ) -> Tensor:
        """See the parent: a gate's rows are those of the experts that it can reach.

        Raises:
            OptionError: the children of a stratum's experts are not those that the stratum has now.
        """
        if not name.startswith("gates."):
            return old
        below = offspring.experts - old.shape[0]
        parents = [parent - below for parent in offspring.parent_E if parent >= below]
        if len(parents) != shape[0]:
            raise OptionError(
                "spawn_update",
                "`spawn_update` has stages in which a stratum of `router` stratified would not have the "
                "children of its experts: give twice as many experts in each as in the one before, or one "
                "stage.",
            )
        return super().child_tensor(name, old, shape, replace(offspring, parent_E=parents), gate)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route the tokens of one pass, that of ``context.part``; all of them in the first one.

        There is no ``probability_TE``, since a pass does not reach all experts.
        """
        return self._decide(x_TD, context)[0]

    def run_passes(
        self, x_TD: Tensor, context: RoutingContext, apply: ApplyExperts, always: bool
    ) -> Tuple[Tensor, Routing]:
        """See the parent, and the class."""
        tokens, device = x_TD.shape[0], x_TD.device
        residual_TD = x_TD if context.residual_TD is None else context.residual_TD
        routing, stratum_T = self._decide(x_TD, context)
        y_TD = apply(x_TD, routing, context).to(x_TD.dtype)
        made = [(torch.arange(tokens, device=device), routing)]
        for stratum in range(1, len(self.strata)):
            row_P = (stratum_T == stratum).nonzero().squeeze(1)
            if not always and row_P.shape[0] == 0:
                continue
            part = context.of_part(Part(stratum, row_P, tokens))
            passed_PD = residual_TD.index_select(0, row_P) + y_TD.index_select(0, row_P)
            x_PD = self._norm(stratum, passed_PD).to(x_TD.dtype)
            routing, next_P = self._decide(x_PD, part)
            y_TD = y_TD.index_add(0, row_P, apply(x_PD, routing, part).to(y_TD.dtype))
            stratum_T = stratum_T.index_copy(0, row_P, next_P)
            made.append((row_P, routing))
        return y_TD, _together(made, tokens, self.experts, context.ranks)

    def finish(self, x: Tensor) -> Tensor:
        """See the parent: the last LayerNorm."""
        if self.options.strata_norm == StrataNorm.inner:
            return x
        return self._norm(len(self.strata), x).to(x.dtype)

    def _norm(self, stratum: int, x: Tensor) -> Tensor:
        """The LayerNorm of what comes to a stratum; that after the last one is the end."""
        normalized: Tensor = self.norms[stratum - 1](x)
        return normalized

    def _decide(self, x_PD: Tensor, context: RoutingContext) -> Tuple[Routing, Tensor]:
        """The experts of the tokens of a pass, and the stratum that each of them comes to next."""
        stratum = 0 if context.part is None else context.part.number
        routing: Routing = self.gates[stratum](x_PD, context)
        assert routing.probability_TE is not None
        below = sum(self.strata[:stratum])
        best_P = routing.probability_TE.detach().argmax(-1) + below
        routing.expert_N = routing.expert_N + below
        routing.experts, routing.probability_TE = self.experts, None
        next_P = torch.ones_like(best_P)
        for above in range(1, len(self.strata)):  # no table, which a model without a device could not have
            next_P = next_P + (best_P >= sum(self.strata[:above]))
        return routing, next_P


def _together(made: Sequence[Tuple[Tensor, Routing]], tokens: int, experts: int, ranks: Ranks) -> Routing:
    """What several passes are together; each is given as the places of its tokens, and its routing."""
    routings = [routing for _, routing in made]
    whole = Routing(
        token_N=torch.cat([row_P[routing.token_N] for row_P, routing in made]),
        expert_N=torch.cat([routing.expert_N for routing in routings]),
        weight_N=torch.cat([routing.weight_N for routing in routings]),
        tokens=tokens,
        experts=experts,
        dropped=sum(routing.dropped for routing in routings),
        sent_bytes=sum(routing.sent_bytes for routing in routings),
    )
    entropies = [routing.gate_entropy for routing in routings if routing.gate_entropy is not None]
    if entropies:  # the mean of a token's passes
        decisions = sum(len(row_P) for row_P, _ in made)
        whole.gate_entropy = torch.stack(entropies).sum() * (tokens / max(decisions, 1))
    names = list(routings[0].losses)
    if names:
        count_S = torch.tensor([len(row_P) for row_P, _ in made], device=routings[0].token_N.device)
        passes = (ranks.gather_counts(count_S).sum(0) > 0).sum().clamp(min=1)
        for name in names:
            whole.losses[name] = torch.stack([routing.losses[name] for routing in routings]).sum() / passes
    return whole
