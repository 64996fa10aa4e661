"""What routers have in common."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Callable, ClassVar, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..default_outputs import DefaultOutputs
from ..experts import take_settings
from ..gate_activation import GateActivation, activate
from ..losses import mean_entropy, mutual_information_loss, z_loss
from ..merge_rule import MergeRule, rule_of
from ..offspring import Offspring
from ..options import OptionError, loss_weight, option
from ..options import Options as BaseOptions
from ..routing import Routing, RoutingContext, Vocabulary

ApplyExperts = Callable[[Tensor, Routing, RoutingContext], Tensor]
"""Gives tokens, (P, D), the outputs of the experts that a routing says."""


class Router(nn.Module):
    """Base of all routers: a module that assigns tokens to experts.

    A router is one file: a class with its ``Options`` and its losses, registered by ``register_router``.  It
    is built as ``Router(dim, experts, **options)`` with uninitialised parameters, which ``initialize`` fills.

    Class attributes:
        Options: a frozen dataclass of what can be chosen, each with default, range and help; the option
            ``x_weight`` made by ``loss_weight`` weighs the loss ``x`` in ``Routing.losses``.
        needs_tokens: whether ``RoutingContext.token_T`` is needed.
        needs_whole_sequence: whether a token's output depends on later tokens.
        one_expert: whether a token never has more than one expert.
        passes: whether tokens pass the layer's experts several times, so that it calls ``run_passes``.
        resizes: whether the number of experts can change while training.
        stages: whether ``RoutingContext.hard`` makes a difference.
        anneals: whether ``RoutingContext.temperature`` does.
        linear_gate: whether the logits are products (or cosines) of a token and the rows of ``weight``.
        experts_per_token: the option that says how many experts a token has, if there is one.
        divides_itself: whether the router decides how many children an expert has; see ``parents``.
        unit_weight: whether the weight of a single expert is 1, so that a layer with one needs no router.
        merge_rules: what becomes of each tensor when experts are merged, by its name or that of the module
            that it is in; ``None``: they cannot be.  Where experts multiply it is the other way round, see
            ``child_tensor``.

    Attributes:
        dim: D, width of a token.
        experts: E, number of experts.
        options: the options' values.
        free_experts: how many experts are the router's own and cost next to nothing; ``experts`` counts them.
        defaults: what stands in for the experts that a token does not have; ``None``: nothing does.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        vocabulary: the dictionary that the layer's tokens are from, for the routers that need it.
        shared: where the routers of one stack of layers keep the modules that they share.
        options: see ``Options``.

    Raises:
        OptionError: an option that the router does not have, or a value that it cannot have.
    """

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """What can be chosen; this router has nothing."""

    needs_tokens: ClassVar[bool] = False
    needs_whole_sequence: ClassVar[bool] = False
    one_expert: ClassVar[bool] = False
    passes: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    stages: ClassVar[bool] = False
    anneals: ClassVar[bool] = False
    linear_gate: bool = False
    experts_per_token: ClassVar[Optional[str]] = None
    divides_itself: ClassVar[bool] = False
    unit_weight: ClassVar[bool] = False
    merge_rules: ClassVar[Optional[Dict[str, MergeRule]]] = None

    options: Any
    free_experts: int = 0
    defaults: Optional[DefaultOutputs]

    def __init__(
        self,
        dim: int,
        experts: int,
        vocabulary: Optional[Vocabulary] = None,
        shared: Optional[Dict[str, Any]] = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.experts = experts
        self.vocabulary = vocabulary
        self.options = self.Options.given(options)
        self.register_module("defaults", None)
        for error in self.options.contradictions(experts):
            raise error

    @property
    def loss_weights(self) -> Dict[str, float]:
        """Weight of each of the router's auxiliary losses."""
        return self.options.loss_weights()

    @property
    def tables(self) -> List[nn.Parameter]:
        """Parameters that are looked up: a token takes its row of them, multiplied with nothing."""
        return []

    @classmethod
    def options_of_state(
        cls, tensors: Dict[str, Tensor], vocabulary: Optional[Vocabulary] = None
    ) -> Dict[str, Any]:
        """What the tensors of a saved router tell of the options that it was made with.

        Args:
            tensors: by name, such as ``weight``.
            vocabulary: that of the model which is to load them.
        """
        return {}

    def initialize(self, generator: torch.Generator) -> None:
        """Fill the parameters and buffers from ``generator``."""
        raise NotImplementedError

    @classmethod
    def parents(cls, children_E: Sequence[int]) -> List[int]:
        """The parent of each new expert where each old one has so many children: they are neighbours."""
        return [parent for parent, children in enumerate(children_E) for _ in range(children)]

    def child_tensor(
        self, name: str, old: Tensor, shape: Sequence[int], offspring: Offspring, gate: bool = False
    ) -> Tensor:
        """A tensor of this router, whose experts are the children of those of the one before.

        By the tensor's merge rule, the other way round: what was added up is divided, entries of a table are
        divided among the children, numbers are given anew, and of anything else each child has what its
        parent had.  Without rules the dimension that has changed is that of the experts, and a table of
        whole numbers that has not is one of experts.

        Args:
            name: of the tensor in ``state_dict()``.
            old: that of the router before, or an optimizer's statistics of it.
            shape: of the tensor here.
            offspring: who is whose child.
            gate: whether it is weights, and not statistics: children of one parent get rows that differ.
        """
        rule = rule_of(self.merge_rules or {}, name)
        if rule == MergeRule.numbers:
            return torch.arange(shape[0]).to(old)
        if rule == MergeRule.sum:
            return offspring.divided(old, shape)
        unruled = self.merge_rules is None and not old.is_floating_point() and old.dim() > 0
        if rule == MergeRule.table or (unruled and old.shape == torch.Size(shape)):
            return offspring.table(old, None if self.vocabulary is None else self.vocabulary.count_V)
        return offspring.differing(name, old, shape) if gate else offspring.rows(old, shape)

    @torch.no_grad()
    def inherit(self, old: "Router", offspring: Offspring) -> None:
        """Take over what the router before has learned; the parameters are initial ones so far.

        Args:
            old: with the parents of this router's experts.
            offspring: who is whose child.
        """
        parameters, before = dict(self.named_parameters()), dict(old.named_parameters())
        for name, parameter in parameters.items():
            if name in before and parameter is not before[name]:
                take_settings(parameter, before[name])
        found = old.state_dict()
        for name, tensor in self.state_dict().items():
            if name in found and found[name].data_ptr() != tensor.data_ptr():  # not what a stack shares
                gate = name in parameters
                tensor.copy_(self.child_tensor(name, found[name], tensor.shape, offspring, gate))

    @torch.no_grad()
    def set_gate(self, weight_ED: Tensor) -> None:
        """Let the logits of a router with a ``linear_gate`` be those of these rows alone."""
        weight: Tensor = getattr(self, "weight")  # noqa: B009  (that there is one is what linear_gate says)
        weight.copy_(weight_ED)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens.

        Args:
            x_TD: tokens without padding, shape (T, D).
            context: phase and temperature, and what else a router may need.
        """
        raise NotImplementedError

    def output_of_free(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """What the ``free_experts`` give, whose pairs are taken out of ``routing``, in place.

        Args:
            x_TD: the tokens that were routed.
            routing: what became of them; what is left are pairs of the layer's experts.

        Returns:
            (T, D), dtype of ``x_TD``.
        """
        raise NotImplementedError

    def run_passes(
        self, x_TD: Tensor, context: RoutingContext, apply: ApplyExperts, always: bool
    ) -> Tuple[Tensor, Routing]:
        """Let tokens pass the experts as often as a router with ``passes`` says.

        Args:
            x_TD: the layer's input, shape (T, D).
            context: see ``forward``.
            apply: gives the tokens of a pass the outputs of their experts.
            always: whether also to make passes that no token of this rank is in, as all ranks must if tokens
                of others may be, or if every parameter must have a gradient.

        Returns:
            the sum of the outputs of each token's passes, shape (T, D), dtype of ``x_TD``; all pairs of
            tokens and experts, of whichever pass.
        """
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """What becomes of the sum of the layer's output and what it was added to; shape (..., D)."""
        return x


class GateInput(str, Enum):
    """What a linear gate sees of a token."""

    hidden = "hidden"
    token = "token"
    both = "both"
    table = "table"


class Renormalize(str, Enum):
    """Whether the weights of a token's experts are divided by their sum."""

    never = "never"
    always = "always"
    straight_through = "straight-through"


RENORMALIZE = (
    "Whether the weights of a token's experts are divided by their sum: always, never, or straight-through "
    "(divided, but with the gradient of undivided ones)."
)
BALANCE = "Weight of the load-balance loss of each MoE layer, for each unit of the sample size."
TOP_K = "Number of experts of each token; for comet, number of trees."
MEAN_EXPERTS = "Mean number of experts of a token that a router with no fixed number of them aims at."


class LinearRouter(Router):
    """Base of the routers with a linear gate (no bias), computed in float32.

    With x the input of the layer and e the embedding of the token, normalised to mean 0 and variance 1, of
    which no gradient goes back::

        logits = x W^T              gate_input="hidden", as published everywhere
        logits = e U^T              "token"
        logits = x W^T + e U^T      "both"
        logits = row t of U^T       "table", with t the token's index in the vocabulary

    That the gate sees the token itself is ours.  A state without ``U``, of a gate that saw the input alone,
    is that of ``both`` with ``U = 0``.  The table starts at random, N(0, s^2), as a random
    hash layer (arXiv 2106.04426) whose assignment is learned further; the smaller s, the sooner it changes,
    and the more alike are the weights of a token's experts.

    With a ``gate_activation`` f the logits are ``f(x W^T)``, before noise and temperature (arXiv 2401.13875);
    with a ``gate_input_activation`` they are ``f(x) W^T``, and e becomes ``f(e)`` (arXiv 2310.14188).

    With ``gate_lr_scale`` r the parameters are W / r and U / r, so that an optimizer whose steps have the
    same size for any gradients, such as Adam, moves W and U by r times what it would move them.  Decoupled
    weight decay pulls at them as much as with r = 1, and to a clipped norm of all gradients theirs add r
    times as much.

    Args:
        dim: D, width of a token.
        experts: E, number of experts.
        vocabulary: the dictionary that the layer's tokens are from; needed unless ``hidden``.
        options: see ``Options``.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """What a linear gate sees, and the losses of its distribution."""

        gate_input: GateInput = option(
            "hidden",
            "What a linear gate sees: the layer's input (hidden), the embedding of the token (token), both, "
            "or the token's index alone (table: a logit for each entry of the vocabulary).",
        )
        table_std: float = option(
            3.0,
            "Standard deviation of the logits that a gate with moe-gate-input table starts with.",
            at_least=0,
        )
        gate_lr_scale: float = option(
            1.0,
            "Learning rate of a linear gate, in units of that of the model; for adam, adamax and adagrad. "
            "It is part of the gate: go on from a checkpoint with the value that it was trained with.",
            above=0,
        )
        gate_activation: GateActivation = option(
            "identity",
            "What a linear gate's logits go through before they become probabilities; EvoMoE's gate with "
            "anything but identity is the activation dense-to-sparse gate.",
        )
        gate_input_activation: GateActivation = option(
            "identity",
            "What the input of a linear gate goes through before its linear map; anything but identity is "
            "modified softmax gating.",
        )
        entropy_weight: float = loss_weight(
            0.0, "Weight of the entropy of the gate's distribution, which makes the gate confident."
        )
        z_weight: float = loss_weight(
            0.0, "Weight of the z-loss, the mean squared logsumexp of the gate's logits."
        )
        mutual_information_weight: float = loss_weight(
            0.0,
            "Weight of the loss by which experts tell tokens apart: the gate becomes confident for each "
            "token, and even over all of them (DS-MoE).",
        )

        def contradictions(self, experts: int) -> Iterator[OptionError]:
            """See the parent."""
            yield from super().contradictions(experts)
            transforms = self.gate_input_activation != GateActivation.identity
            if transforms and self.gate_input == GateInput.table:
                yield OptionError(
                    "gate_input_activation",
                    f"`gate_input_activation` {self.gate_input_activation.value} has nothing to transform "
                    "with `gate_input` table, which looks its logits up: leave one of them out.",
                )

    linear_gate = True
    unit_weight = True
    merge_rules = {"weight": MergeRule.mean, "token_weight": MergeRule.mean}
    options: "LinearRouter.Options"
    weight: Optional[nn.Parameter]
    token_weight: Optional[nn.Parameter]

    def __init__(
        self, dim: int, experts: int, vocabulary: Optional[Vocabulary] = None, **options: Any
    ) -> None:
        super().__init__(dim, experts, vocabulary, **options)
        self.register_parameter("weight", None)
        self.register_parameter("token_weight", None)
        seen = self.options.gate_input
        if seen in (GateInput.hidden, GateInput.both):
            self.weight = nn.Parameter(torch.empty(experts, dim))
        activations = {self.options.gate_activation, self.options.gate_input_activation}
        if self.weight is None or activations != {GateActivation.identity}:
            self.linear_gate = False  # the logits are not those of the input alone
        if seen != GateInput.hidden:
            self.token_weight = nn.Parameter(torch.empty(experts, self._columns(vocabulary)))

    def _columns(self, vocabulary: Optional[Vocabulary]) -> int:
        """Columns of ``U``."""
        table = self.options.gate_input == GateInput.table
        size = 0 if vocabulary is None else vocabulary.size if table else vocabulary.dim
        if size < 1:
            missing = "size of the vocabulary" if table else "width of the embeddings"
            raise OptionError(
                "gate_input",
                f"`gate_input` {self.options.gate_input.value} needs the {missing}: give a vocabulary that "
                "has it, or choose hidden.",
            )
        return size

    @property
    def tables(self) -> List[nn.Parameter]:
        """See the parent."""
        table = self.options.gate_input == GateInput.table
        return [self.token_weight] if table and self.token_weight is not None else []

    @classmethod
    def options_of_state(
        cls, tensors: Dict[str, Tensor], vocabulary: Optional[Vocabulary] = None
    ) -> Dict[str, Any]:
        """See the parent: what the gate sees."""
        if "gate_input" not in cls.Options.declared():  # it is what it is
            return {}
        if "token_weight" not in tensors:
            return {"gate_input": GateInput.hidden} if "weight" in tensors else {}
        if "weight" in tensors:
            return {"gate_input": GateInput.both}
        if vocabulary is None:  # an embedding and a table differ in their width alone
            return {}
        columns = tensors["token_weight"].shape[1]
        return {"gate_input": GateInput.token if columns == vocabulary.dim else GateInput.table}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill the gate as ``nn.Linear`` would, U(-1/sqrt(D), 1/sqrt(D)), from ``generator``."""
        if self.options.gate_input == GateInput.table and self.token_weight is not None:
            noise = torch.randn(self.token_weight.shape, generator=generator)
            self.token_weight.copy_(self.options.table_std / self.options.gate_lr_scale * noise)
            return
        for weight in (self.weight, self.token_weight):
            if weight is not None:
                fill_uniform(weight, weight.shape[1] ** -0.5 / self.options.gate_lr_scale, generator)

    @torch.no_grad()
    def set_gate(self, weight_ED: Tensor) -> None:
        """As in the parent: ``W`` is given, and ``U`` zero."""
        super().set_gate(weight_ED / self.options.gate_lr_scale)
        if self.token_weight is not None:
            self.token_weight.zero_()

    def child_tensor(
        self, name: str, old: Tensor, shape: Sequence[int], offspring: Offspring, gate: bool = False
    ) -> Tensor:
        """See the parent; the entries of a table's best expert are divided among its children, by load."""
        if not (gate and name == "token_weight" and self.options.gate_input == GateInput.table):
            return super().child_tensor(name, old, shape, offspring, gate)
        new, expert_V = offspring.rows(old, shape).clone(), old.argmax(0)
        child_V = offspring.table(expert_V, None if self.vocabulary is None else self.vocabulary.count_V)
        several_V = offspring.siblings_E.to(child_V.device)[child_V] > 1
        margin = offspring.noise * old.float().std(unbiased=False)
        new[child_V, torch.arange(len(child_V), device=child_V.device)] += (margin * several_V).to(new)
        return new

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """The gate's logits, float32, shape (T, E), whatever the precision of the model is.

        Raises:
            ValueError: the gate sees the token, and the context does not have it.
        """
        given = self.options
        x_TD = activate(x_TD, given.gate_input_activation)
        logits_TE = self._products(x_TD, context)
        if self.free_experts:
            logits_TE = self._with_free(logits_TE, x_TD)
        logits_TE = logits_TE if given.gate_lr_scale == 1 else logits_TE * given.gate_lr_scale
        return activate(logits_TE, given.gate_activation)

    def _products(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        if self.token_weight is None:
            assert self.weight is not None
            return linear32(x_TD, self.weight)
        if self.options.gate_input == GateInput.table:
            token_T = self._given(context.token_T, "vocabulary index")
            return float32(self.token_weight.index_select(1, token_T).t())
        e_TC = float32(self._given(context.embedding_TC, "embedding").detach()).to(x_TD.device)
        e_TC = activate(F.layer_norm(e_TC, e_TC.shape[-1:]), self.options.gate_input_activation)
        logits_TE = linear32(e_TC, self.token_weight)
        return logits_TE if self.weight is None else logits_TE + linear32(x_TD, self.weight)

    def _with_free(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        """``logits_TE`` with columns for the ``free_experts``."""
        raise NotImplementedError

    def _given(self, found: Optional[Tensor], name: str) -> Tensor:
        """What the gate sees of each token, or ``OptionError`` if the context does not have it."""
        if found is None:
            raise OptionError(
                "gate_input",
                f"`gate_input` {self.options.gate_input.value} needs the {name} of each token: call the "
                "model with tokens instead of embeddings, or choose `gate_input` hidden.",
            )
        return found

    def with_gate(
        self, routing: Routing, logits_TE: Tensor, probability_TE: Tensor, context: RoutingContext
    ) -> Routing:
        """``routing`` with the gate's distribution, its entropy, and three losses, if they are wanted.

        ``entropy``, the mean entropy of the distribution, makes the gate confident (HMoE, arXiv 2408.10681);
        ``z`` is ST-MoE's z-loss (arXiv 2202.08906); ``mutual_information`` makes it confident, and even over
        the tokens (DS-MoE, arXiv 2404.05567).
        """
        routing.probability_TE = probability_TE
        if context.statistics:
            routing.gate_entropy = entropy_sum(probability_TE)
        if context.wants("entropy"):
            routing.losses["entropy"] = mean_entropy(probability_TE, context.ranks)
        if context.wants("z"):
            routing.losses["z"] = z_loss(logits_TE, context.ranks)
        if context.wants("mutual_information"):
            loss = mutual_information_loss(probability_TE, context.ranks)
            routing.losses["mutual_information"] = loss
        return routing

    def _load_from_state_dict(
        self, state_dict: Dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.token_weight is not None and self.weight is not None and prefix + "weight" in state_dict:
            state_dict.setdefault(prefix + "token_weight", torch.zeros_like(self.token_weight))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def fill_uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill with U(-bound, bound)."""
    values = torch.rand(tensor.shape, generator=generator)
    tensor.copy_((2 * values - 1) * bound)


def float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def linear32(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x W^T`` in float32 (float64 for float64 tokens), under autocast too; shape (T, E)."""
    with torch.autocast(device_type=x_TD.device.type, enabled=False):
        x_TD = float32(x_TD)
        return F.linear(x_TD, weight_ED.to(x_TD.dtype))


def top1_routing(expert_T: Tensor, weight_T: Tensor, experts: int) -> Routing:
    """Each token to one expert, with a weight."""
    token_T = torch.arange(expert_T.shape[0], device=expert_T.device)
    return Routing(token_T, expert_T, weight_T, tokens=expert_T.shape[0], experts=experts)


def topk_routing(expert_TK: Tensor, weight_TK: Tensor, experts: int) -> Routing:
    """Each token to K experts, with weights; the pairs with all first choices are listed first."""
    tokens, k = expert_TK.shape
    token_T = torch.arange(tokens, device=expert_TK.device)
    return Routing(token_T.repeat(k), expert_TK.t().reshape(-1), weight_TK.t().reshape(-1), tokens, experts)


def need_vocabulary(vocabulary: Optional[Vocabulary], router: str) -> Vocabulary:
    """``vocabulary``, or ``ValueError`` if there is none."""
    if vocabulary is None:
        raise ValueError(
            f"The router {router} needs the vocabulary of its tokens: give {router} a vocabulary or choose "
            "another router."
        )
    return vocabulary


def need_tokens(context: RoutingContext, router: str) -> Tensor:
    """The tokens' vocabulary indices, or ``ValueError`` if there are none."""
    if context.token_T is None:
        raise ValueError(
            f"The router {router} needs the vocabulary index of each token: call the model with tokens "
            "instead of embeddings or choose another router."
        )
    return context.token_T


def divisor(total: Tensor, how: Renormalize) -> Tensor:
    """What the weights of a token are divided by, given their sum.

    ``straight-through``: with the sum as a constant, so that they sum to 1 and yet get the gradient that they
    would have, divided by the sum; a single expert's weight is 1 and its gate goes on learning.
    """
    return total.detach() if how == Renormalize.straight_through else total


def at_most_all(options: BaseOptions, name: str, experts: int) -> Iterator[OptionError]:
    """What an option that counts the experts of a token has against the number that there are."""
    value = getattr(options, name)
    if value > experts:
        least = "more than 0" if isinstance(value, float) else "from 1"
        yield OptionError(name, f"`{name}` must be {least} to the {experts} experts, but is {value}.")


def entropy_sum(probability_TE: Tensor) -> Tensor:
    """Entropy in nats of the gate's distributions, summed over tokens, without gradient."""
    return torch.special.entr(probability_TE.detach()).sum()
