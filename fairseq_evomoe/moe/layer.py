"""The Mixture-of-Experts layer: router -> dispatch -> experts -> combine."""

from dataclasses import replace
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from .default_dispatch import dispatch_and_watch
from .dispatch import dispatch
from .dispatch.exchange import send
from .losses import penalty_loss
from .mutual_distillation import dispatch_and_compare
from .output_masking import mask_outputs
from .ranks import ALONE
from .recorder import open_records
from .routing import Routing, RoutingContext
from .spawning import SpawningLayer


class MoELayer(SpawningLayer):
    """A feed-forward layer that owns one expert at first and, once they have spawned, many and a router.

    Before the spawn it computes what the dense feed-forward layer computes, at the same cost, and has the
    same parameters::

        layer = MoELayer(512, 2048, experts=8, router="switch")
        y = layer(x)                      # one expert
        layer.spawn(method="mask")
        with record() as routings:
            y = layer(x)                  # many
        loss = loss_of(y) + routings.auxiliary_loss()

    Arguments and attributes: see ``SpawningLayer``.  A forward pass changes nothing of the layer in
    evaluation, so that any number of threads may use one.
    """

    @property
    def wanted_losses(self) -> List[str]:
        """Names of the losses that a pass must compute: those that have a weight, and that of the logs."""
        return ["balance"] + [name for name, weight in self.loss_weights.items() if weight > 0]

    def forward(
        self,
        x: Tensor,
        context: Optional[RoutingContext] = None,
        padding_mask: Optional[Tensor] = None,
        tokens: Optional[Tensor] = None,
        sequences: Optional[Tensor] = None,
        embeddings: Optional[Tensor] = None,
        residual: Optional[Tensor] = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: tokens, shape (..., D).
            context: phase and temperature, and what else holds for the whole pass; without one they are those
                of ``RoutingContext``.
            padding_mask: bool, shape (...): positions that are padding.  They are neither routed nor
                counted, and the output there is zero once the experts have spawned.
            tokens: int64, shape (...): vocabulary index of each token, for the routers that need it.
            sequences: int64, shape (...): number of the sequence that each token belongs to, for the routers
                that mix the tokens of a sequence.
            embeddings: shape (..., C): embedding of each token, for the gates that see it.
            residual: shape of ``x``: what the output will be added to, for routers with passes; ``None``: x.

        Returns:
            shape and dtype of ``x``.
        """
        context = RoutingContext(losses=self.wanted_losses) if context is None else context
        keep_T = None if padding_mask is None else (~padding_mask.reshape(-1)).nonzero().squeeze(1)
        if self.router is None:
            if self.activity is not None and self.training:
                self._watch(x.reshape(-1, x.shape[-1]), keep_T, self._complete(context))
            if self.warmup is not None and self.training and context.warm_up:
                self._warm_up(x.reshape(-1, x.shape[-1]), keep_T, context, tokens, embeddings)
            count = x.numel() // x.shape[-1] if keep_T is None else keep_T.shape[0]
            return self._single_expert(x, count, context)

        kept_TD, context = self._without_padding(x, context, keep_T, tokens, sequences, embeddings, residual)
        y_TD = self._all_experts(kept_TD, context)
        if keep_T is not None:
            y_TD = torch.zeros_like(x.reshape(-1, x.shape[-1])).index_copy(0, keep_T, y_TD.to(x.dtype))
        return y_TD.to(x.dtype).view_as(x)

    def router_input(
        self,
        x: Tensor,
        context: RoutingContext,
        padding_mask: Optional[Tensor] = None,
        tokens: Optional[Tensor] = None,
        sequences: Optional[Tensor] = None,
        embeddings: Optional[Tensor] = None,
        residual: Optional[Tensor] = None,
    ) -> Tuple[Tensor, RoutingContext]:
        """What a router of this layer is given for these arguments of ``forward``: rows, (R, D), and context.

        There need not be a router yet.
        """
        keep_T = None if padding_mask is None else (~padding_mask.reshape(-1)).nonzero().squeeze(1)
        x_TD, context = self._without_padding(x, context, keep_T, tokens, sequences, embeddings, residual)
        return x_TD if self.heads is None else self.heads.split_heads(x_TD), context

    def _without_padding(
        self,
        x: Tensor,
        context: RoutingContext,
        keep_T: Optional[Tensor],
        tokens: Optional[Tensor],
        sequences: Optional[Tensor],
        embeddings: Optional[Tensor],
        residual: Optional[Tensor],
    ) -> Tuple[Tensor, RoutingContext]:
        """The tokens that are routed, and what is told of them."""
        x_TD = x.reshape(-1, x.shape[-1])
        context = self._complete(
            context,
            token_T=_select(None if tokens is None else tokens.reshape(-1), keep_T),
            sequence_T=_select(None if sequences is None else sequences.reshape(-1), keep_T),
            embedding_TC=_select(
                None if embeddings is None else embeddings.reshape(-1, embeddings.shape[-1]), keep_T
            ),
            residual_TD=_select(None if residual is None else residual.reshape(x_TD.shape), keep_T),
        )
        return x_TD if keep_T is None else x_TD.index_select(0, keep_T), context

    @property
    def in_passes(self) -> bool:
        """Whether tokens pass the experts several times, so that ``residual`` and ``finish`` matter."""
        return self.router is not None and self.router.passes

    def finish(self, x: Tensor) -> Tensor:
        """What becomes of the sum of the layer's output and ``residual``: with most routers nothing."""
        return x if self.router is None else self.router.finish(x)

    def _complete(self, context: RoutingContext, **of_tokens: Optional[Tensor]) -> RoutingContext:
        """What the router is told: what holds for the pass, this layer's ranks, what there is of tokens."""
        given: Dict[str, Any] = {name: value for name, value in of_tokens.items() if value is not None}
        if self.heads is not None:
            given = {name: self.heads.repeat(value) for name, value in given.items()}
        # in evaluation ranks may have different numbers of batches
        return replace(context, ranks=self.ranks if self.training else ALONE, **given)

    def _single_expert(self, x: Tensor, tokens: int, context: RoutingContext) -> Tensor:
        # one expert needs no order of the rows, so transposed tokens are not copied into theirs
        turned = x.dim() > 2 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous()
        x = x.transpose(0, 1) if turned else x
        x_TD = x.reshape(-1, x.shape[-1])
        row_RD = x_TD if self.heads is None else self.heads.split_heads(x_TD)
        if open_records():
            rows = tokens if self.heads is None else tokens * self.heads.heads
            self._note(_to_single_expert(x_TD, rows), context)
        y_RD = self.experts(row_RD, [row_RD.shape[0]])
        y = (y_RD if self.heads is None else self.heads.merge_heads(y_RD, x_TD.shape[0])).view(x.shape)
        return y.transpose(0, 1) if turned else y

    def _watch(self, x_TD: Tensor, keep_T: Optional[Tensor], context: RoutingContext) -> None:
        """Measure how active the base expert's hidden units are, on some of the tokens of all ranks."""
        assert self.activity is not None
        place_T, first = _sample(x_TD, keep_T, context, self.activity.STRIDE)
        sample_TD = x_TD[place_T]
        if self.heads is not None:
            sample_TD, first = self.heads.split_heads(sample_TD), first * self.heads.heads
        self.activity.watch(self.experts, sample_TD, first)

    def _warm_up(
        self,
        x_TD: Tensor,
        keep_T: Optional[Tensor],
        context: RoutingContext,
        tokens: Optional[Tensor],
        embeddings: Optional[Tensor],
    ) -> None:
        """Let the gate to come see some of the tokens of all ranks."""
        assert self.warmup is not None
        sample, _ = _sample(x_TD, keep_T, self._complete(context), self.warmup.STRIDE)
        token_T = None if tokens is None else tokens.reshape(-1)[sample]
        embedding_TC = None if embeddings is None else embeddings.reshape(-1, embeddings.shape[-1])[sample]
        given = self._complete(context, token_T=token_T, embedding_TC=embedding_TC)
        sample_TD = x_TD[sample]
        self.warmup.watch(sample_TD if self.heads is None else self.heads.split_heads(sample_TD), given)

    def _all_experts(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """What the layer with many experts makes of tokens without padding."""
        if self.heads is None:
            return self._route(x_TD, context)
        return self.heads.merge_heads(self._route(self.heads.split_heads(x_TD), context), x_TD.shape[0])

    def _route(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        assert self.router is not None
        if self.router.passes:
            always = self.sharded or self.training or torch.is_grad_enabled()
            y_TD, routing = self.router.run_passes(x_TD, context, self._apply_experts, always)
        else:
            routing = self.router(x_TD, context)
            y_TD = self._apply_experts(x_TD, routing, context)
        self._note(routing, context)
        return y_TD

    def _apply_experts(self, x_TD: Tensor, routing: Routing, context: RoutingContext) -> Tensor:
        """The outputs of the experts that were chosen, with those of what stands beside them."""
        assert self.router is not None
        if self.output_masking > 0:
            mask_outputs(routing, self.output_masking, self.training, context)
        free_TD = self.router.output_of_free(x_TD, routing) if self.router.free_experts else None
        if self.sharded:
            transport = self.transport if self.training else replace(self.transport, lsh=None)
            shipment = send(x_TD, routing, self.experts, self.ranks, transport)
            routing.sent_bytes = shipment.sent_bytes
            beside_TD = self._beside(x_TD, routing, context)  # while tokens travel
            y_TD = shipment.receive()
        else:
            if self.loss_weights.get("mutual_distillation", 0) > 0:
                y_TD, routing.losses["mutual_distillation"] = dispatch_and_compare(
                    x_TD, routing, self.experts, context.ranks
                )
            elif self.router.defaults is not None and self.training:
                y_TD = dispatch_and_watch(x_TD, routing, self.experts, self.router.defaults)
            else:
                y_TD = dispatch(x_TD, routing, self.experts)
            beside_TD = self._beside(x_TD, routing, context)
        if self.demand is not None and self.training and self.spawner.measure == "load":
            self.demand.add(routing.load_E())
        y_TD = y_TD if free_TD is None else y_TD + free_TD
        if self.router.defaults is not None:
            y_TD = y_TD + self.router.defaults(routing).to(y_TD.dtype)
        y_TD = y_TD if self.scaling_factor == 1 else y_TD * self.scaling_factor
        return y_TD if beside_TD is None else y_TD + beside_TD

    def _beside(self, x_TD: Tensor, routing: Routing, context: RoutingContext) -> Optional[Tensor]:
        """What the modules beside the experts add to their output; the layer's own loss is computed too."""
        if self.loss_weights.get("penalty", 0) > 0:
            widths = torch.tensor(self.experts.widths)
            routing.losses["penalty"] = penalty_loss(routing, widths, context.ranks)
        y_TD: Optional[Tensor] = None
        if self.shared is not None:
            y_TD = self.shared(x_TD, [x_TD.shape[0]])
        if self.hyper_adapter is not None:
            adapter_TD = self.hyper_adapter(x_TD, routing)
            y_TD = adapter_TD if y_TD is None else y_TD + adapter_TD
        return y_TD

    def _note(self, routing: Routing, context: RoutingContext) -> None:
        """Tell whoever wants to know how the batch was routed."""
        for record in open_records():
            routing.phase = 0 if not self.spawned else 2 if context.hard else 1
            routing.temperature = context.temperature
            record[self] = routing


def _sample(
    x_TD: Tensor, keep_T: Optional[Tensor], context: RoutingContext, stride: int
) -> Tuple[Tensor, int]:
    """Places of every so many-th token without padding, of all ranks' tokens as one batch, of the update.

    Returns:
        int64, the places; the number of the first among those of all ranks.
    """
    place_T = torch.arange(x_TD.shape[0], device=x_TD.device) if keep_T is None else keep_T
    before = context.first_row + context.rows_of_ranks(place_T.shape[0], x_TD.device)[0]
    return place_T[-before % stride :: stride], -(-before // stride)


def _select(x_T: Optional[Tensor], keep_T: Optional[Tensor]) -> Optional[Tensor]:
    return x_T if x_T is None or keep_T is None else x_T.index_select(0, keep_T)


def _to_single_expert(x_TD: Tensor, tokens: int) -> Routing:
    """The routing of a layer with one expert: every token to it, with weight 1."""
    index_T = torch.zeros(tokens, dtype=torch.long, device=x_TD.device)
    weight_T = torch.ones(tokens, device=x_TD.device)
    return Routing(index_T, index_T, weight_T, tokens=tokens, experts=1)
