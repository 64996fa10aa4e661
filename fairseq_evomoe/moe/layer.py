"""The Mixture-of-Experts layer: router -> dispatch -> experts -> combine."""

from dataclasses import replace
from typing import TYPE_CHECKING, Callable, Collection, Dict, Optional, Sequence

import torch
from torch import Tensor, nn

from . import loading
from .dispatch import dispatch
from .dispatch.exchange import Transport, send
from .experts import Experts
from .hyper_adapter import HyperAdapter
from .losses import penalty_loss
from .multi_head import MultiHead
from .mutual_distillation import dispatch_and_compare
from .ranks import ALONE, Ranks
from .routers import Router
from .routing import Routing, RoutingContext
from .sharding import concat_experts, deal_experts, rows_per_expert, take_experts
from .statistics import Activity

if TYPE_CHECKING:
    from ..evolution.spawn import Spawn
    from .plan import Plan


class MoELayer(nn.Module):
    """A feed-forward layer that owns one expert at first and, once they have spawned, many and a router.

    Before the spawn it computes what the dense feed-forward layer computes, at the same cost, and has the
    same parameters.  ``load_state_dict`` takes both forms: one expert loaded into a layer with many is
    spawned into all of them, and a layer with one expert gets room for as many as the state has.

    Attributes:
        experts: the experts; one before the spawn.
        router: the router; ``None`` before the spawn.
        shared: an always-on expert beside the routed ones, which starts as the base expert; ``None`` without
            ``shared_expert`` and before the spawn.
        activity: measures the base expert's hidden units for the spawn, if that asks for it; ``None``
            once the experts have spawned.
        hyper_adapter: HyperMoE's adapter; ``None`` without ``make_hyper_adapter`` and before the spawn.
        ranks: the processes that train the model together; see ``join``.
        transport: how tokens travel among those of them that share the experts.
        routing: how the last batch was routed; ``None`` before the first and after ``forget``.
        first_widths: hidden units of the experts when there was one, and once the layer is spawned, of those
            that it grew; routers that resize count from them.
        spawned_on_load: whether the experts were spawned from a single one when a state was loaded.

    Args:
        experts: the base expert.
        num_experts: E, the number of experts after the spawn.
        make_router: builds and initialises the router when the layer grows.
        spawn: how the base expert becomes many, an ``evolution.spawn.Spawn``.
        heads: splits tokens into sub-tokens around the experts.
        shared_expert: whether there is an always-on expert once the experts have spawned.
        make_hyper_adapter: builds and initialises the adapter when the layer grows.
        losses: which of the losses that are the layer's, not the router's, to compute: ``penalty`` (HMoE),
            ``mutual_distillation`` (MoDE).
        scaling_factor: of the routed experts' output (DeepSeek-V2, arXiv 2405.04434).
    """

    def __init__(
        self,
        experts: Experts,
        num_experts: int,
        make_router: Callable[[], Router],
        spawn: "Spawn",
        heads: Optional[MultiHead] = None,
        shared_expert: bool = False,
        make_hyper_adapter: Optional[Callable[[], HyperAdapter]] = None,
        losses: Collection[str] = (),
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.experts = experts
        self.num_experts = num_experts
        self.make_router = make_router
        self.spawner = spawn
        # registered before it exists, so that parameters have one order in spawned and loaded models
        self.register_module("router", None)
        self.register_module("shared", None)
        self.register_module("hyper_adapter", None)
        measure = spawn.needs_activity and num_experts > 1
        self.activity = Activity(experts.widths[0]) if measure else None
        self.heads = heads
        self.shared_expert = shared_expert
        self.make_hyper_adapter = make_hyper_adapter
        self.losses = frozenset(losses)
        self.scaling_factor = scaling_factor
        self.ranks: Ranks = ALONE
        self.transport = Transport()
        self.routing: Optional[Routing] = None
        self.first_widths = list(experts.widths)
        self.spawned_on_load = False

    @property
    def resizes(self) -> bool:
        """Whether the number of experts can change while training."""
        return (self.router or self.make_router()).resizes

    @property
    def spawned(self) -> bool:
        """Whether the layer has all its experts."""
        return self.router is not None or self.num_experts == 1

    @property
    def sharded(self) -> bool:
        """Whether the experts are shared out among ranks; a single one never is."""
        return self.experts.sharded

    @torch.no_grad()
    def attach_ranks(self, ranks: Ranks) -> None:
        """Let ranks train the layer together; experts that there are already are shared out among them.

        All of the ranks must call this.
        """
        whole = self.gather_experts()
        self.ranks = ranks
        if self.router is not None:
            self.allocate(self.experts.widths)
            for name, tensor in whole.items():
                getattr(self.experts, name).copy_(self.local_rows(name, tensor))

    def allocate(self, widths: Sequence[int]) -> None:
        """Let the experts have these widths; each rank has room for its own, whose contents are undefined."""
        parallel = self.ranks.parallel
        own = deal_experts(widths, parallel)[self.ranks.group_rank] if parallel > 1 else None
        self.experts.allocate(widths, own)

    def local_rows(self, name: str, whole: Tensor) -> Tensor:
        """The rows that this rank has of a tensor of all experts, such as one of a checkpoint."""
        return take_experts(name, whole, self.experts.widths, self.experts.local) if self.sharded else whole

    def gather_rows(self, name: str, own: Tensor, to: Optional[int] = None) -> Optional[Tensor]:
        """A tensor of all experts, from the rows that each rank has; the ranks must all call this.

        Args:
            name: ``w1``, ``b1``, ``w2``, ``b2`` or ``w3``.
            own: this rank's rows of it, or of what has a row for each of its rows.
            to: place of the only rank that shall get it; ``None``: all.

        Returns:
            the tensor, or ``None`` where it is not wanted.
        """
        if not self.sharded:
            return own
        widths = self.experts.widths
        experts_of = deal_experts(widths, self.ranks.parallel)
        sizes = [sum(rows_per_expert(name, [widths[e] for e in experts])) for experts in experts_of]
        parts = self.ranks.gather_experts(own, sizes, to)
        return concat_experts(name, parts, widths, experts_of) if parts else None

    def gather_experts(self) -> Dict[str, Tensor]:
        """The tensors of all experts by name; the ranks that share them must all call this."""
        return {name: self.gather_rows(name, tensor) for name, tensor in self.expert_tensors().items()}

    def plan_spawn(self) -> "Plan":
        """What would become of the base expert and its copies if the layer grew now."""
        activity_H = None if self.activity is None else self.activity.magnitude_H
        return self.spawner.plan(self.expert_tensors(), activity_H)

    @torch.no_grad()
    def spawn(self, plan: Optional["Plan"] = None) -> None:
        """Spawn the experts and make the router.  The parameters are new objects afterwards.

        Args:
            plan: what becomes of the base expert; ``plan_spawn()`` if not given.
        """
        plan = self.plan_spawn() if plan is None else plan
        base = self.expert_tensors()
        self.apply_plan(plan)
        self._complete(base)
        plan.fill_gate(self.router)

    @torch.no_grad()
    def allocate_spawned(self, widths: Sequence[int]) -> None:
        """Make the router and room for experts of these widths, whose weights are then up to the caller."""
        base = self.expert_tensors()
        self.experts.allocate(widths)
        self.num_experts = len(widths)
        self._complete(base)

    def _complete(self, base: Dict[str, Tensor]) -> None:
        self.activity = None
        self.first_widths = list(self.experts.widths)
        self._add_companions(base)

    @torch.no_grad()
    def apply_plan(self, plan: "Plan") -> None:
        """Make the experts others.  Their parameters are new objects afterwards.

        The ranks that share the experts must all call this.

        Raises:
            ValueError: experts of other widths, with a normalisation of hidden units that they share.
        """
        old = self.gather_experts()
        if self.experts.hidden.norm is not None and set(plan.widths) != set(self.experts.widths):
            raise ValueError(
                "--scale-fc normalises the hidden units of an expert, so that their number must stay "
                f"{self.experts.widths[0]}: leave it out, or --moe-expert-sizes and --moe-spawn-method split."
            )
        self.allocate(plan.widths)
        plan = plan.only(self.experts.local)
        for name, tensor in old.items():
            getattr(self.experts, name).copy_(plan.weights(name, tensor))
        self.num_experts = len(self.experts.widths)

    def expert_tensors(self) -> Dict[str, Tensor]:
        """The tensors of the experts of this rank by name."""
        return {name: p.detach() for name, p in self.experts.named_parameters(recurse=False)}

    def _add_companions(self, base: Dict[str, Tensor]) -> None:
        """Make the router and the other modules that work beside the experts of a layer that has spawned."""
        like, experts = self.experts.w1, self.experts
        self.router = self.make_router()
        if self.shared_expert:
            self.shared = Experts(experts.dim, [base["w1"].shape[0]], experts.hidden, experts.gated)
            for name, tensor in base.items():
                getattr(self.shared, name).copy_(tensor)
        if self.make_hyper_adapter is not None:
            self.hyper_adapter = self.make_hyper_adapter()
        for module in (self.router, self.shared, self.hyper_adapter):
            if module is not None:
                module.to(device=like.device, dtype=like.dtype).train(self.training)
                module.requires_grad_(like.requires_grad)

    def clear_routing(self) -> None:
        """Forget the last batch, so that a layer that is skipped next does not report it again."""
        self.routing = None

    def forward(
        self,
        x: Tensor,
        context: RoutingContext,
        padding_mask: Optional[Tensor] = None,
        tokens: Optional[Tensor] = None,
        sequences: Optional[Tensor] = None,
        embeddings: Optional[Tensor] = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: tokens, shape (..., D).
            context: phase and temperature.
            padding_mask: bool, shape (...): positions that are padding.  They are neither routed nor
                counted, and the output there is zero once the experts have spawned.
            tokens: int64, shape (...): vocabulary index of each token, for the routers that need it.
            sequences: int64, shape (...): number of the sequence that each token belongs to, for the routers
                that mix the tokens of a sequence.
            embeddings: shape (..., C): embedding of each token, for the gates that see it.

        Returns:
            shape and dtype of ``x``.
        """
        keep_T = None if padding_mask is None else (~padding_mask.reshape(-1)).nonzero().squeeze(1)
        count = x[..., 0].numel() if keep_T is None else keep_T.shape[0]
        # in evaluation ranks may have different numbers of batches
        context = replace(context, ranks=self.ranks if self.training else ALONE)
        if self.router is None:
            if self.activity is not None and self.training:
                self._watch(x.reshape(-1, x.shape[-1]), keep_T, context)
            return self._single_expert(x, count)

        x_TD = x.reshape(-1, x.shape[-1])
        token_TD = _select(x_TD, keep_T)
        if tokens is not None or sequences is not None or embeddings is not None:
            context = replace(
                context,
                token_T=_select(_flat(tokens), keep_T),
                embedding_TC=_select(_rows(embeddings), keep_T),
                sequence_T=_select(_flat(sequences), keep_T),
            )
        y_TD = self._all_experts(token_TD, context)
        if keep_T is not None:
            y_TD = torch.zeros_like(x_TD).index_copy(0, keep_T, y_TD)
        return y_TD.view_as(x)

    def _single_expert(self, x: Tensor, tokens: int) -> Tensor:
        # one expert needs no order of the rows, so transposed tokens are not copied into theirs
        turned = x.dim() > 2 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous()
        x = x.transpose(0, 1) if turned else x
        x_TD = x.reshape(-1, x.shape[-1])
        row_RD = x_TD if self.heads is None else self.heads.split_heads(x_TD)
        rows = tokens if self.heads is None else tokens * self.heads.heads
        self.routing = _to_single_expert(x_TD, rows)
        y_RD = self.experts(row_RD, [row_RD.shape[0]])
        y = (y_RD if self.heads is None else self.heads.merge_heads(y_RD, x_TD.shape[0])).view(x.shape)
        return y.transpose(0, 1) if turned else y

    def _watch(self, x_TD: Tensor, keep_T: Optional[Tensor], context: RoutingContext) -> None:
        """Measure how active the base expert's hidden units are, on some of the tokens of all ranks."""
        rows = x_TD.shape[0] if keep_T is None else keep_T.shape[0]
        before = context.first_row + context.rows_of_ranks(rows, x_TD.device)[0]
        sample = slice(-before % self.activity.STRIDE, None, self.activity.STRIDE)
        sample_TD = x_TD[sample] if keep_T is None else x_TD[keep_T[sample]]
        self.activity.watch(
            self.experts, sample_TD if self.heads is None else self.heads.split_heads(sample_TD)
        )

    def _all_experts(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """What the grown layer makes of tokens without padding."""
        if self.heads is None:
            return self._route(x_TD, context)
        context = replace(
            context,
            token_T=None if context.token_T is None else self.heads.repeat(context.token_T),
            sequence_T=None if context.sequence_T is None else self.heads.repeat(context.sequence_T),
            embedding_TC=None if context.embedding_TC is None else self.heads.repeat(context.embedding_TC),
        )
        return self.heads.merge_heads(self._route(self.heads.split_heads(x_TD), context), x_TD.shape[0])

    def _route(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        routing = self.routing = self.router(x_TD, context)
        if self.sharded:
            transport = self.transport if self.training else replace(self.transport, lsh=None)
            shipment = send(x_TD, routing, self.experts, self.ranks, transport)
            routing.sent_bytes = shipment.sent_bytes
            beside_TD = self._beside(x_TD, routing, context)  # while tokens travel
            y_TD = self._scaled(shipment.receive())
            return y_TD if beside_TD is None else y_TD + beside_TD
        if "mutual_distillation" in self.losses:
            y_TD, routing.losses["mutual_distillation"] = dispatch_and_compare(
                x_TD, routing, self.experts, context.ranks
            )
        else:
            y_TD = dispatch(x_TD, routing, self.experts)
        y_TD = self._scaled(y_TD)
        beside_TD = self._beside(x_TD, routing, context)
        return y_TD if beside_TD is None else y_TD + beside_TD

    def _scaled(self, y_TD: Tensor) -> Tensor:
        return y_TD if self.scaling_factor == 1 else y_TD * self.scaling_factor

    def _beside(self, x_TD: Tensor, routing: Routing, context: RoutingContext) -> Optional[Tensor]:
        """What the modules beside the experts add to their output; the layer's own loss is computed too."""
        if "penalty" in self.losses:
            widths = torch.tensor(self.experts.widths)
            routing.losses["penalty"] = penalty_loss(routing, widths, context.ranks)
        y_TD = None
        if self.shared is not None:
            y_TD = self.shared(x_TD, [x_TD.shape[0]])
        if self.hyper_adapter is not None:
            adapter_TD = self.hyper_adapter(x_TD, routing)
            y_TD = adapter_TD if y_TD is None else y_TD + adapter_TD
        return y_TD

    def __getstate__(self):
        # how the last batch was routed is part of a graph, which cannot be copied
        return dict(self.__dict__, routing=None)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        loading.fit(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """State of growth, for ``print(model)``."""
        return f"num_experts={self.num_experts}, spawned={self.spawned}"


def _flat(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.reshape(-1)


def _rows(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _select(x_T: Optional[Tensor], keep_T: Optional[Tensor]) -> Optional[Tensor]:
    return x_T if x_T is None or keep_T is None else x_T.index_select(0, keep_T)


def _to_single_expert(x_TD: Tensor, tokens: int) -> Routing:
    """The routing of a layer with one expert: every token to it, with weight 1."""
    index_T = torch.zeros(tokens, dtype=torch.long, device=x_TD.device)
    weight_T = torch.ones(tokens, device=x_TD.device)
    return Routing(index_T, index_T, weight_T, tokens=tokens, experts=1)
