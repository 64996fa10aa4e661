"""What an MoE layer is made of: one expert at first, and once they have spawned, many and a router."""

from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Type, Union

import torch
from torch import Tensor, nn

from . import loading, multiplying, sharding
from .dispatch.exchange import Transport
from .experts import Experts, Hidden, take_settings
from .gate_warmup import GateWarmup
from .hyper_adapter import HyperAdapter
from .multi_head import MultiHead
from .options import OptionError
from .plan import Plan, Spawner, make_spawner
from .ranks import ALONE, Ranks
from .routers import Router
from .routers.registry import find_router
from .routing import Vocabulary
from .statistics import Activity, Demand, Sample, make_measure


class SpawningLayer(nn.Module):
    """The parameters of a feed-forward layer that owns one expert at first and later many and a router.

    With several stages its experts spawn again, and each becomes one or several (see ``multiplying.py``).
    ``load_state_dict`` takes both forms: one expert loaded into a layer with many is spawned into all of
    them, and a layer with one expert gets room for as many as the state has.

    Attributes:
        experts: the experts; one before the spawn.
        router: the router; ``None`` before the spawn.
        shared: an always-on expert beside the routed ones, which starts as the base expert; ``None`` without
            ``shared_expert`` and before the spawn.
        activity: measures what the base expert does or sees for the spawn, if that asks for it; ``None``
            once the experts have spawned.
        warmup: trains the gate before the spawn, if somebody has put one there; ``None`` once they have.
        demand: measures how many children experts deserve, if the spawner asks for it and they have yet to
            multiply.
        heads: splits tokens into sub-tokens around the experts; ``None`` with one head.
        hyper_adapter: HyperMoE's adapter; ``None`` without ``hyper_adapter`` and before the spawn.
        num_experts: E, the number of experts that there are; with one, of those that it spawns.
        stages: the number of experts after each spawn.
        stage: how many times the experts have spawned; 0: there is one.
        loss_weights: weight of each auxiliary loss, by its name.
        spawner: how the base expert becomes many.
        ranks: the processes that train the model together; see ``attach_ranks``.
        transport: how tokens travel among those of them that share the experts.
        base_width: hidden units of the base expert.
        first_widths: hidden units of the experts when there was one, and once the layer has spawned, of those
            that it spawned; routers that resize count from them.
        frozen: names of the modules that are not trained; see ``freeze``.
        spawned_on_load: whether the experts were spawned from a single one when a state was loaded.

    Args:
        dim: D, width of a token.
        hidden: hidden units of the base expert.
        experts: E, the number of experts once they have spawned; several: after each of as many spawns.
        router: a name in ``ROUTERS``, or a class of routers.
        spawned: whether all experts are there from the start, each with initial weights of its own.
        seed: of the random numbers of the spawn; the same on all ranks.
        number: of this layer among those of a model, so that each has other random numbers.
        widths: hidden units of each expert once they have spawned, with several stages for the first time;
            ``None``: as the spawner makes them, or ``hidden`` each if they are there from the start.
        between: what happens between the two products of an expert; ReLU if not given.
        gated: whether experts have a third matrix, as SwiGLU's have.
        bias: whether experts have biases.
        heads: h, a divisor of D: each token is routed as h sub-tokens of width D / h (MH-MoE).
        shared_expert: whether there is an always-on expert once the experts have spawned.
        hyper_adapter: whether there is HyperMoE's adapter once the experts have spawned.
        loss_weights: weights of auxiliary losses by name; the router's are what it takes by default if not
            given.  Those of the layer are ``penalty`` (HMoE) and ``mutual_distillation`` (MoDE), and 0.
        scaling_factor: of the routed experts' output (DeepSeek-V2, arXiv 2405.04434).
        output_masking: share of the experts' outputs that training leaves out; see ``mask_outputs``.
        spawner: how the base expert becomes many; ``None``: by ``mask``, or by ``slice`` if experts
            have other widths.
        initialize: ``initialize(experts, e)`` gives expert e its initial weights; ``None``: ``nn.Linear``'s.
        vocabulary: the dictionary that the tokens are from, for the routers that need it.
        shared: where the layers of a stack keep the modules that they share.
        router_options: see the router's class.

    Raises:
        OptionError: there is no such router, or its options are none that it can have.
    """

    router: Optional[Router]
    shared: Optional[Experts]
    hyper_adapter: Optional[HyperAdapter]
    activity: Union[Activity, Sample, None]
    demand: Optional[Demand]
    warmup: Optional[GateWarmup]

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: Union[int, Sequence[int]] = 8,
        router: Union[str, Type[Router]] = "switch",
        *,
        spawned: bool = False,
        seed: int = 1,
        number: int = 0,
        widths: Optional[Sequence[int]] = None,
        between: Optional[Hidden] = None,
        gated: bool = False,
        bias: bool = True,
        heads: int = 1,
        shared_expert: bool = False,
        hyper_adapter: bool = False,
        loss_weights: Optional[Mapping[str, float]] = None,
        scaling_factor: float = 1.0,
        output_masking: float = 0.0,
        spawner: Optional[Spawner] = None,
        initialize: Optional[Callable[[Experts, int], None]] = None,
        vocabulary: Optional[Vocabulary] = None,
        shared: Optional[Dict[str, Any]] = None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        self.router_class = find_router(router)
        self.router_options = router_options
        self.stages = [experts] if isinstance(experts, int) else list(experts)
        for each in self.stages:
            _check_options(self.router_class, router_options, each)
        self.num_experts = experts = self.stages[0]
        self.stage = int(self.stages == [1])
        self.widths = None if widths is None else list(widths)
        if spawner is None:
            uneven = widths is not None and set(widths) != {hidden}
            method = "slice" if uneven else "mask"
            spawner = make_spawner(experts=experts, layer=number, seed=seed, widths=widths, method=method)
        self.spawner = spawner
        self.experts = Experts(dim // heads, [hidden], between, gated, bias)
        self.base_width = hidden
        self.first_widths = [hidden]
        # registered before it exists, so that parameters have one order in spawned and loaded models
        self.register_module("router", None)
        self.register_module("shared", None)
        self.register_module("hyper_adapter", None)
        self.register_module("demand", None)
        self.register_module("warmup", None)
        self.activity = None if spawned or experts == 1 else make_measure(spawner, self.experts)
        self.heads = MultiHead(dim, heads) if heads > 1 else None
        self.has_shared_expert = shared_expert
        self.has_hyper_adapter = hyper_adapter
        self.given_loss_weights = dict(loss_weights or {})
        self.loss_weights = dict(self.given_loss_weights)
        self.scaling_factor = scaling_factor
        self.output_masking = output_masking
        self.vocabulary = vocabulary
        self.of_stack: Dict[str, Any] = {} if shared is None else shared
        self.ranks: Ranks = ALONE
        self.transport = Transport()
        self.frozen: FrozenSet[str] = frozenset()
        self.spawned_on_load = False
        initialize = Experts.initialize if initialize is None else initialize
        initialize(self.experts, 0)
        if spawned and experts > 1:
            self._begin_spawned(initialize)

    @property
    def resizes(self) -> bool:
        """Whether the number of experts can change while training."""
        return self.router_class.resizes

    @property
    def spawned(self) -> bool:
        """Whether the layer has all its experts."""
        return self.router is not None or self.num_experts == 1

    @property
    def sharded(self) -> bool:
        """Whether ranks have experts of their own; a single one is on all of them."""
        return self.experts.sharded

    def widths_when_spawned(self) -> List[int]:
        """Hidden units of each expert that the layer has, or spawns."""
        if self.router is not None:
            return self.experts.widths
        return self.spawner.widths_from(self.base_width) if self.widths is None else self.widths

    def build_router(
        self, of_stack: Optional[Dict[str, Any]] = None, experts: Optional[int] = None
    ) -> Router:
        """A router of this layer, whose parameters are undefined.

        Args:
            of_stack: where it finds or leaves the modules that the routers of a stack share, if not there
                where this layer does.
            experts: of how many it is; ``None``: of those that there are.
        """
        shared = self.of_stack if of_stack is None else of_stack
        sizes = self.experts.dim, self.num_experts if experts is None else experts
        return self.router_class(*sizes, vocabulary=self.vocabulary, shared=shared, **self.router_options)

    def make_router(self, of_stack: Optional[Dict[str, Any]] = None) -> Router:
        """A router of this layer with initial weights; see ``build_router``."""
        router = self.build_router(of_stack)
        router.initialize(self.spawner.generator("router"))
        return router

    def freeze(self, *modules: str) -> None:
        """Let modules such as ``router`` be as they are, those too that a spawn has yet to make."""
        self.frozen = self.frozen.union(modules)
        for name, module in self.named_children():
            if name in modules:
                module.requires_grad_(False)

    def attach_ranks(self, ranks: Ranks) -> None:
        """Let ranks train the layer together, each with experts of its own if they are parallel.

        All of the ranks must call this.
        """
        if self.router is not None:
            sharding.attach_ranks(self.experts, self.ranks, ranks)
        self.ranks = ranks

    def allocate(self, widths: Sequence[int]) -> None:
        """Let the experts have these widths; each rank has room for its own, whose contents are undefined."""
        sharding.allocate(self.experts, widths, self.ranks)

    def local_rows(self, name: str, whole: Tensor) -> Tensor:
        """See ``sharding.local_rows``."""
        return sharding.local_rows(self.experts, name, whole)

    def gather_rows(self, name: str, local: Tensor, to: Optional[int] = None) -> Optional[Tensor]:
        """See ``sharding.gather_rows``."""
        return sharding.gather_rows(self.experts, self.ranks, name, local, to)

    def gather_experts(self) -> Dict[str, Tensor]:
        """See ``sharding.gather_experts``."""
        return sharding.gather_experts(self.experts, self.ranks)

    def expert_tensors(self) -> Dict[str, Tensor]:
        """The tensors of the experts of this rank by name."""
        return self.experts.tensors()

    def plan_spawn(self) -> Plan:
        """What would become of the base expert, or of the experts, and their copies if they spawned now.

        Of many experts, the ranks that share them must all call this.
        """
        if self.router is not None:
            return multiplying.plan(self)
        measured = None if self.activity is None else self.activity.measured
        return self.spawner.plan(self.expert_tensors(), measured)

    @torch.no_grad()
    def spawn(
        self,
        method: Optional[str] = None,
        strength: Optional[float] = None,
        seed: Optional[int] = None,
        *,
        plan: Optional[Plan] = None,
    ) -> None:
        """Spawn the experts and make the router, or with several stages let there be more of both.

        The parameters are new objects afterwards.

        Args:
            method: what is done to the copies of the base, such as ``mask``; ``None``: as the spawner does.
            strength: how much; ``None``: the method's default, or the spawner's.
            seed: of the random numbers; ``None``: the spawner's.
            plan: what becomes of the base expert; ``plan_spawn()`` if not given.

        Raises:
            OptionError: there is no stage left.
        """
        if self.stage == len(self.stages):
            raise OptionError(
                "experts",
                f"The layer has spawned all its {self.num_experts} experts: give `experts` one more stage.",
            )
        if method is not None or strength is not None or seed is not None:
            self.spawner = make_spawner(
                experts=self.stages[0],
                layer=self.spawner.layer,
                seed=self.spawner.seed if seed is None else seed,
                widths=self.widths,
                method=self.spawner.method_name if method is None else method,
                strength=strength,
            )
        plan = self.plan_spawn() if plan is None else plan
        self.stage += 1
        if self.router is not None:
            return multiplying.apply(self, plan)
        base, warmup = self.expert_tensors(), self.warmup
        self.apply_plan(plan)
        self._add_companions(self.build_router())
        self._fill_companions(base)
        assert self.router is not None
        if warmup is not None:
            warmup.fill(self.router)
        plan.fill_gate(self.router)

    @torch.no_grad()
    def allocate_spawned(self, widths: Sequence[int], router: Optional[Router] = None) -> None:
        """Make all that the layer has once its experts have spawned; the contents are undefined.

        Args:
            widths: hidden units of each expert.
            router: the router; one like ``build_router`` makes if not given.
        """
        self.num_experts = len(widths)
        self.stage = max(self.stage, 1)
        self.allocate(widths)
        self._add_companions(self.build_router() if router is None else router)

    @torch.no_grad()
    def apply_plan(self, plan: Plan) -> None:
        """Make the experts others.  Their parameters are new objects afterwards.

        The ranks that share the experts must all call this.

        Raises:
            OptionError: experts of other widths, with a normalisation of hidden units that they share.
        """
        if self.experts.hidden.norm is not None and set(plan.widths) != set(self.experts.widths):
            raise OptionError(
                "widths",
                "The normalisation of hidden units, which the experts share, needs experts as wide as the "
                f"base, {self.experts.widths[0]}, but they are to have {plan.widths}: leave it out, or "
                "choose equal `widths`.",
            )
        old = self.gather_experts()
        self.allocate(plan.widths)
        plan = plan.only(self.experts.local)
        self.experts.fill({name: plan.weights(name, tensor) for name, tensor in old.items()})
        self.num_experts = len(self.experts.widths)
        self.begin_demand()

    def begin_demand(self) -> None:
        """Measure from now on how many children each expert deserves, if they are to have any."""
        wanted = self.router is not None and self.stage < len(self.stages) and self.spawner.measure
        self.demand = Demand(self.num_experts).to(self.experts.w1.device) if wanted else None

    def _begin_spawned(self, initialize: Callable[[Experts, int], None]) -> None:
        """Have all experts from the start, with initial weights of their own."""
        base = self.expert_tensors()
        self.allocate_spawned(self.widths or self.first_widths * self.num_experts)
        self._fill_companions(base)
        for expert in range(self.num_experts):
            initialize(self.experts, expert)

    def _add_companions(self, router: Router) -> None:
        """Take a router, and make the other modules that work beside the experts; contents are undefined."""
        experts, like = self.experts, self.experts.w1
        self.router = router
        if self.has_shared_expert:
            self.shared = Experts(experts.dim, [self.base_width], experts.hidden, experts.gated, experts.bias)
        if self.has_hyper_adapter:
            self.hyper_adapter = HyperAdapter(experts.dim, self.num_experts, self.of_stack)
        for module in (self.router, self.shared, self.hyper_adapter):
            if module is not None:
                module.to(device=like.device, dtype=like.dtype).train(self.training)
        if self.shared is not None:  # which comes from the base expert; what is new is trained
            for name, parameter in self.shared.named_parameters(recurse=False):
                take_settings(parameter, getattr(experts, name))
                parameter.__dict__.pop("expert", None)  # it is on every rank
        self.freeze(*self.frozen)
        self.loss_weights = {**router.loss_weights, **self.given_loss_weights}
        self.activity = self.warmup = None
        self.first_widths = list(experts.widths)
        self.begin_demand()

    def _fill_companions(self, base: Dict[str, Tensor]) -> None:
        """Give the modules beside the experts their initial weights, the base expert's to the shared one."""
        assert self.router is not None
        self.router.initialize(self.spawner.generator("router"))
        if self.shared is not None:
            self.shared.fill(base)
        if self.hyper_adapter is not None:
            self.hyper_adapter.initialize(self.spawner.generator("hyper_adapter"))

    @property
    def grows_in_stages(self) -> bool:
        """Whether the experts spawn more than once."""
        return len(self.stages) > 1

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.grows_in_stages:
            destination[prefix + loading.STAGE] = torch.tensor(self.stage)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        loading.fit(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """State of the spawn, for ``print(model)``."""
        stages = f", stage={self.stage} of {self.stages}" if self.grows_in_stages else ""
        return f"num_experts={self.num_experts}, spawned={self.spawned}{stages}"


def _check_options(router: Type[Router], options: Dict[str, Any], experts: int) -> None:
    """Refuse now what the router would refuse when the experts spawn."""
    for error in router.Options.given(options).contradictions(experts):
        raise error
