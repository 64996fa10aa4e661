"""Linear gates whose loads a loss or a bias keeps even."""

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Iterator, Optional, Tuple, Type, TypeVar

import torch
from torch import Tensor

from ..balancing import Balance, LoadBias
from ..merge_rule import MergeRule
from ..options import OptionError, loss_weight, option
from ..routing import Vocabulary
from .router import BALANCE, LinearRouter

_O = TypeVar("_O", bound="BalancedRouter.Options")

RATE = 0.001


class BalancedRouter(LinearRouter):
    """Base of the linear gates that may have a ``LoadBias`` instead of a load-balance loss.

    With ``balance`` loss, the default, there is none, and nothing is computed for it.  Else a bias is added
    to the scores by which a token's experts are chosen; their weights are those without it, and the weight of
    the load-balance loss is 0 unless it is given, which is refused.

    Attributes:
        balancing: the bias; ``None`` with ``balance`` loss.
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

    options: "BalancedRouter.Options"
    merge_rules: ClassVar[Dict[str, MergeRule]] = {**LinearRouter.merge_rules, "balancing": MergeRule.mean}
    balancing: Optional[LoadBias]

    def __init__(
        self, dim: int, experts: int, vocabulary: Optional[Vocabulary] = None, **options: Any
    ) -> None:
        super().__init__(dim, experts, vocabulary, **options)
        self.register_module("balancing", None)
        if self.options.balance != Balance.loss:
            self.balancing = LoadBias(experts, self.options.balance, self.options.balance_rate)

    @classmethod
    def options_of_state(
        cls, tensors: Dict[str, Tensor], vocabulary: Optional[Vocabulary] = None
    ) -> Dict[str, Any]:
        """See the parent: whether there is a bias; ``bias`` and ``quantile`` have the same."""
        found = super().options_of_state(tensors, vocabulary)
        if tensors and "balance" in cls.Options.declared():
            found["balance"] = Balance.bias if "balancing.bias_E" in tensors else Balance.loss
        return found

    def choice(self, score_TE: Tensor) -> Tensor:
        """What a token's experts are chosen by: the scores, and the bias if there is one."""
        return score_TE if self.balancing is None else self.balancing.choice(score_TE)

    def watch(self, score_TE: Tensor, choice_TE: Tensor, chosen_TE: Tensor) -> None:
        """Let the bias, if there is one, know what was chosen; see ``LoadBias.watch``."""
        if self.balancing is not None and self.training:
            self.balancing.watch(score_TE, choice_TE, chosen_TE)

    def best(self, score_TE: Tensor, k: int) -> Tuple[Tensor, Tensor]:
        """Scores and numbers, (T, K), of the k experts that are chosen for each token, the best one first."""
        if self.balancing is None:
            return score_TE.topk(k, dim=-1)
        choice_TE = self.choice(score_TE)
        expert_TK = choice_TE.topk(k, dim=-1).indices
        self.watch(score_TE, choice_TE, chosen(expert_TK, self.experts))
        return score_TE.gather(1, expert_TK), expert_TK


def chosen(expert_TK: Tensor, experts: int) -> Tensor:
    """The experts of each token as a bool table, (T, E)."""
    chosen_TE = torch.zeros(expert_TK.shape[0], experts, dtype=torch.bool, device=expert_TK.device)
    return chosen_TE.scatter_(1, expert_TK, True)
