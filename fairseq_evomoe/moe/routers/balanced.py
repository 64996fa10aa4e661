"""Linear gates whose loads a loss or a bias keeps even, and which may have free experts."""

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Iterator, Optional, Sequence, Tuple, Type, TypeVar

import torch
from torch import Tensor

from ..balancing import Balance, LoadBias
from ..capacity import keep_pairs
from ..free_experts import FreeExperts
from ..merge_rule import MergeRule
from ..offspring import Offspring
from ..options import OptionError, loss_weight, option
from ..routing import Routing, Vocabulary
from .router import BALANCE, LinearRouter, fill_uniform, linear32

_O = TypeVar("_O", bound="BalancedRouter.Options")

RATE, FREE_BALANCE = 0.001, 0.75


class BalancedRouter(LinearRouter):
    """Base of the linear gates that may have a ``LoadBias`` instead of a load-balance loss.

    With ``balance`` loss, the default, there is none, and nothing is computed for it.  Else a bias is added
    to the scores by which a token's experts are chosen; their weights are those without it, and the weight of
    the load-balance loss is 0 unless it is given, which is refused.

    Free experts (MoE++, see ``FreeExperts``) are columns of the gate behind those of the experts that work,
    and chosen among them.  In the load-balance loss theirs are weighed by ``free_balance``: the smaller it
    is, the more tokens they get.  ``output_of_free`` takes their pairs out of a routing.

    Attributes:
        experts: number of columns of the gate: of the experts that work, and of the free ones.
        balancing: the bias; ``None`` with ``balance`` loss.
        free: the free experts; ``None``: there are none.
    """

    @dataclass(frozen=True)
    class Options(LinearRouter.Options):
        """What keeps the loads even."""

        balance: Balance = option(
            "loss",
            "What keeps the experts' loads even: a loss, weighed by moe-balance-weight, or a bias, which "
            "counts when experts are chosen, but not in their weights: bias moves it by moe-balance-rate "
            "after each update, quantile to where the loads of that update would have been even.",
        )
        balance_rate: float = option(
            RATE, "What moe-balance bias adds to or takes from an expert's bias after each update.", above=0
        )
        balance_weight: float = loss_weight(0.01, BALANCE)
        zero_experts: int = option(
            0, "Number of experts beside the others that give nothing, and cost nothing (MoE++).", at_least=0
        )
        copy_experts: int = option(
            0, "Number of experts beside the others that give the token itself (MoE++).", at_least=0
        )
        constant_experts: int = option(
            0,
            "Number of experts beside the others that mix the token with a learned vector (MoE++).",
            at_least=0,
        )
        free_balance: float = option(
            FREE_BALANCE,
            "Weight of zero, copy and constant experts in the load-balance loss, in units of that of the "
            "others; the smaller, the more tokens they get.",
            above=0,
        )

        @property
        def free_experts(self) -> int:
            """Number of experts that cost next to nothing."""
            return self.zero_experts + self.copy_experts + self.constant_experts

        @classmethod
        def given(cls: Type[_O], values: Dict[str, Any]) -> _O:
            """See the parent: with a bias, the weight of the loss is 0 unless it is given."""
            if values.get("balance") not in (None, "loss"):
                values = {"balance_weight": 0.0, **values}
            return super().given(values)  # type: ignore[misc, no-any-return]

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from super().contradictions(experts)
            if self.balance != Balance.loss and self.balance_weight > 0:
                yield OptionError(
                    "balance_weight",
                    f"`balance` {self.balance.value} keeps the loads even by a bias instead of a loss, but "
                    f"`balance_weight` is {self.balance_weight}: leave one of them out.",
                )
            if self.balance != Balance.bias and self.balance_rate != RATE:
                yield OptionError(
                    "balance_rate",
                    f"`balance_rate` is the step of `balance` bias, and has no effect with `balance` "
                    f"{self.balance.value}: leave it out, or give `balance` bias.",
                )
            if self.free_experts and experts == 1:
                yield OptionError(
                    "experts",
                    "`zero_experts`, `copy_experts` and `constant_experts` are chosen by a gate, which there "
                    "is not with `experts` 1: leave them out or give more.",
                )
            if self.free_balance != FREE_BALANCE and not self.free_experts:
                yield OptionError(
                    "free_balance",
                    f"`free_balance` {self.free_balance} has no effect without `zero_experts`, "
                    "`copy_experts` or `constant_experts`: leave it out, or give one of them.",
                )

    options: "BalancedRouter.Options"
    merge_rules: ClassVar[Dict[str, MergeRule]] = {
        **LinearRouter.merge_rules,
        "balancing": MergeRule.mean,
        "free": MergeRule.unchanged,
    }
    balancing: Optional[LoadBias]
    free: Optional[FreeExperts]

    def __init__(
        self, dim: int, experts: int, vocabulary: Optional[Vocabulary] = None, **options: Any
    ) -> None:
        super().__init__(dim, experts, vocabulary, **options)
        given = self.options
        self.register_module("balancing", None)
        self.register_module("free", None)
        if given.free_experts:
            self.free = FreeExperts(dim, given.zero_experts, given.copy_experts, given.constant_experts)
            self.free_experts = self.free.count
            self.experts += self.free_experts
        if given.balance != Balance.loss:
            self.balancing = LoadBias(self.experts, given.balance, given.balance_rate)

    @classmethod
    def options_of_state(
        cls, tensors: Dict[str, Tensor], vocabulary: Optional[Vocabulary] = None
    ) -> Dict[str, Any]:
        """See the parent: whether there is a bias, and constants; ``bias`` and ``quantile`` have the same."""
        found = super().options_of_state(tensors, vocabulary)
        told = {
            "balance": Balance.bias if "balancing.bias_E" in tensors else Balance.loss,
            "constant_experts": len(tensors.get("free.constant_CD", ())),
        }
        known = cls.Options.declared() if tensors else {}
        return {**found, **{name: value for name, value in told.items() if name in known}}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """The gate as in the parent, free experts' rows too; their vectors from N(0, 0.02^2)."""
        super().initialize(generator)
        if self.free is not None:
            bound = self.dim**-0.5
            fill_uniform(self.free.weight, bound / self.options.gate_lr_scale, generator)
            if self.free.constant_CD is not None and self.free.mixing is not None:
                fill_uniform(self.free.mixing, bound, generator)
                noise_CD = torch.randn(self.free.constant_CD.shape, generator=generator)
                self.free.constant_CD.copy_(0.02 * noise_CD)

    def child_tensor(
        self, name: str, old: Tensor, shape: Sequence[int], offspring: Offspring, gate: bool = False
    ) -> Tensor:
        """See the parent; biases shrink as the probabilities do that more experts share, and stay even."""
        new = super().child_tensor(name, old, shape, offspring, gate)
        if name != "balancing.bias_E" or new is old:
            return new
        new = new * (offspring.experts / len(offspring.parent_E))
        return new - new.mean()

    def _with_free(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        """See the parent: free experts' gate sees the layer's input."""
        assert self.free is not None
        return torch.cat([logits_TE, linear32(x_TD, self.free.weight)], dim=1)

    @property
    def balance_factor(self) -> Optional[Tensor]:
        """Weight of each column in the load-balance loss, shape (E,); ``None``: all have 1."""
        if self.free is None:
            return None
        factor_E = torch.ones(self.experts)
        factor_E[-self.free_experts :] = self.options.free_balance
        return factor_E

    def output_of_free(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See the parent."""
        assert self.free is not None
        working = self.experts - self.free_experts
        free_N = routing.expert_N >= working
        pairs = routing.token_N[free_N], routing.expert_N[free_N] - working, routing.weight_N[free_N]
        keep_pairs(routing, ~free_N)
        routing.experts = working
        if routing.probability_TE is not None:
            routing.probability_TE = routing.probability_TE[:, :working]
        y_TD: Tensor = self.free(x_TD, *pairs)
        return y_TD

    def choice(self, score_TE: Tensor) -> Tensor:
        """What a token's experts are chosen by with a bias: the scores plus that."""
        assert self.balancing is not None
        return self.balancing.choice(score_TE)

    def watch(self, score_TE: Tensor, choice_TE: Tensor, chosen_TE: Tensor) -> None:
        """Let the bias, if there is one, know what was chosen; see ``LoadBias.watch``."""
        if self.balancing is not None and self.training:
            self.balancing.watch(score_TE, choice_TE, chosen_TE)

    def best(self, score_TE: Tensor, k: int) -> Tuple[Tensor, Tensor]:
        """Scores and numbers, (T, K), of the k experts that the bias chooses, the best one first."""
        choice_TE = self.choice(score_TE)
        expert_TK = choice_TE.topk(k, dim=-1).indices
        self.watch(score_TE, choice_TE, chosen(expert_TK, self.experts))
        return score_TE.gather(1, expert_TK), expert_TK


def chosen(expert_TK: Tensor, experts: int) -> Tensor:
    """The experts of each token as a bool table, (T, E)."""
    chosen_TE = torch.zeros(expert_TK.shape[0], experts, dtype=torch.bool, device=expert_TK.device)
    return chosen_TE.scatter_(1, expert_TK, True)
