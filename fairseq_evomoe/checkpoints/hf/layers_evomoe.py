"""Fairseq's Transformers with Mixture-of-Experts layers, without fairseq.

For evaluation and generation: nothing here grows, balances loads or adds auxiliary losses.  Parameters have
the names that they have in fairseq.  Routers and experts are those of training, from ``moe/``, whose files
are copied beside this one.

Shape suffixes: B sequences, L tokens of each, M tokens attended to, D width; see also ``moe/routing.py``.
"""

import math
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ...moe.experts import Experts, Hidden
from ...moe.hyper_adapter import HyperAdapter
from ...moe.multi_head import MultiHead
from ...moe.output_masking import mask_outputs
from ...moe.routers import ROUTERS
from ...moe.routing import Routing, RoutingContext, Vocabulary


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "silu": F.silu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "relu_squared": lambda x: F.relu(x).square(),
}


class MoE(nn.Module):
    """A Mixture-of-Experts layer whose experts have spawned, or its only expert.

    Args:
        dim: D.
        given: ``widths`` of the experts, their ``activation``, whether they are ``gated``, have a
            ``bias`` and a ``norm``, ``heads``, ``shared_width``, ``hyper_adapter``, ``scaling_factor``,
            ``output_masking``, and of the ``router`` its name, options, and what it is told of each pass;
            ``None``: there is one expert.
        shared: where the layers of a stack keep what they share.
    """

    def __init__(self, dim: int, given: Dict[str, Any], shared: Dict[str, Any]) -> None:
        super().__init__()
        widths, gated, heads = given["widths"], given["gated"], given["heads"]
        norm = nn.LayerNorm(widths[0]) if given["norm"] else None
        hidden = Hidden(ACTIVATIONS[given["activation"]], None, norm)
        bias = given.get("bias", True)  # folders of before 0.2 do not say it
        self.experts = Experts(dim // heads, widths, hidden, gated, bias)
        self.heads = MultiHead(dim, heads) if heads > 1 else None
        self.scaling_factor = given["scaling_factor"]
        self.output_masking = given["output_masking"]
        self.router: Any = None
        self.shared: Optional[nn.Module] = None
        self.hyper_adapter: Optional[nn.Module] = None
        router = given["router"]
        if router is None:
            return
        self.told = {"temperature": router["temperature"], "hard": router["hard"]}
        size = router["vocabulary"]
        vocabulary = Vocabulary(size, torch.zeros(size), router["embedding_dim"])
        cls, options = ROUTERS[router["name"]], router["options"]
        self.router = cls(dim // heads, len(widths), vocabulary=vocabulary, shared=shared, **options)
        if given["shared_width"]:
            self.shared = Experts(dim // heads, [given["shared_width"]], hidden, gated, bias)
        if given["hyper_adapter"]:
            self.hyper_adapter = HyperAdapter(dim // heads, len(widths), shared)

    def forward(self, x_BLD: Tensor, residual_BLD: Tensor, batch: "Batch") -> Tensor:
        """What is to be added to ``residual_BLD``; padding gets zeros where there is a router."""
        x_TD = x_BLD.flatten(0, 1)
        if self.router is None:
            return self._around(x_TD, lambda rows: self.experts(rows, [len(rows)])).view_as(x_BLD)
        keep_T = batch.keep_BL.flatten().nonzero().squeeze(1)
        of_tokens: Dict[str, Any] = {
            "token_T": batch.token_BL.flatten()[keep_T],
            "sequence_T": torch.arange(len(x_BLD), device=keep_T.device).repeat_interleave(x_BLD.shape[1])[
                keep_T
            ],
            "embedding_TC": batch.embedding_BLC.flatten(0, 1)[keep_T],
        }
        if self.router.passes:
            of_tokens["residual_TD"] = residual_BLD.flatten(0, 1)[keep_T]
        if self.heads is not None:
            of_tokens = {name: self.heads.repeat(value) for name, value in of_tokens.items()}
        context = RoutingContext(
            **self.told, **of_tokens, memory=batch.memory, statistics=False, causal=batch.causal
        )
        y_TD = self._around(x_TD[keep_T], lambda rows: self._route(rows, context))
        return torch.zeros_like(x_TD).index_copy(0, keep_T, y_TD.to(x_TD.dtype)).view_as(x_BLD)

    def finish(self, x_BLD: Tensor) -> Tensor:
        """What becomes of the sum of the layer's output and what it was added to."""
        return x_BLD if self.router is None else self.router.finish(x_BLD)

    def _around(self, x_TD: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of sub-tokens as one of tokens."""
        if self.heads is None:
            return function(x_TD)
        return self.heads.merge_heads(function(self.heads.split_heads(x_TD)), len(x_TD))

    def _route(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        if self.router.passes:
            return self.router.run_passes(x_TD, context, self._apply_experts, False)[0]
        return self._apply_experts(x_TD, self.router(x_TD, context), context)

    def _apply_experts(self, x_TD: Tensor, routing: Routing, context: RoutingContext) -> Tensor:
        mask_outputs(routing, self.output_masking, False, context)
        free_TD = self.router.output_of_free(x_TD, routing) if self.router.free_experts else None
        slots = routing.slots
        y_TD = self._sum_of_outputs(x_TD if slots is None else slots.mix(x_TD), routing)
        y_TD = (y_TD if slots is None else slots.spread(y_TD)).to(x_TD.dtype)
        y_TD = y_TD if free_TD is None else y_TD + free_TD
        if self.router.defaults is not None:
            y_TD = y_TD + self.router.defaults(routing).to(y_TD.dtype)
        y_TD = y_TD * self.scaling_factor
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, [len(x_TD)])
        return y_TD if self.hyper_adapter is None else y_TD + self.hyper_adapter(x_TD, routing)

    def _sum_of_outputs(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted outputs of each token's experts, added up."""
        expert_N, order_N = torch.sort(routing.expert_N, stable=True)
        token_N, weight_N = routing.token_N[order_N], routing.weight_N[order_N]
        counts = torch.bincount(expert_N, minlength=len(self.experts.widths)).tolist()
        weighted_ND = self.experts(x_TD[token_N], counts) * weight_N.unsqueeze(1)
        return weighted_ND.new_zeros(x_TD.shape).index_add(0, token_N, weighted_ND)


class Batch:
    """What the MoE layers of a stack are told of a batch beside its hidden states."""

    def __init__(self, token_BL: Tensor, keep_BL: Tensor, embedding_BLC: Tensor, causal: bool) -> None:
        self.token_BL, self.keep_BL, self.embedding_BLC = token_BL, keep_BL, embedding_BLC
        self.causal = causal
        self.memory: Dict[str, Any] = {}


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, dim: int, heads: int, memory_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k_proj, self.v_proj = nn.Linear(memory_dim, dim), nn.Linear(memory_dim, dim)

    def keys_and_values(self, memory_BMD: Tensor) -> Tuple[Tensor, Tensor]:
        """Each of shape (B, heads, M, D / heads)."""
        return self._split(self.k_proj(memory_BMD)), self._split(self.v_proj(memory_BMD))

    def forward(self, x_BLD: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attend where ``mask``, which broadcasts to (B, heads, L, M), is true."""
        y = F.scaled_dot_product_attention(self._split(self.q_proj(x_BLD)), key, value, mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """A layer of the encoder or the decoder.

    Args:
        given: of the stack, see there.
        feed_forward: of the layer: ``moe``, or the width of a dense network, ``ffn_dim``.
        number: of the layer.
        shared: where the layers of a stack keep what they share.
    """

    def __init__(
        self, given: Dict[str, Any], feed_forward: Dict[str, Any], number: int, shared: Dict[str, Any]
    ) -> None:
        super().__init__()
        dim, heads, cross_dim = given["dim"], given["heads"], given["cross_dim"]
        self.number, self.pre_norm = number, given["pre_norm"]
        self.self_attn, self.self_attn_layer_norm = Attention(dim, heads, dim), nn.LayerNorm(dim)
        self.encoder_attn = Attention(dim, heads, cross_dim) if cross_dim else None
        self.encoder_attn_layer_norm = nn.LayerNorm(dim) if cross_dim else None
        # NormFormer's (arXiv 2110.09456)
        self.attn_ln = nn.LayerNorm(dim) if given["scale_attn"] else None
        self.c_attn = nn.Parameter(torch.ones(heads)) if given["scale_heads"] else None
        self.w_resid = nn.Parameter(torch.ones(dim)) if given["scale_resids"] else None
        self.ffn_layernorm = None
        self.moe: Optional[MoE] = None
        if "moe" in feed_forward:
            self.moe = MoE(dim, feed_forward["moe"], shared)
        else:
            width = feed_forward["ffn_dim"]
            self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, dim)
            self.ffn_layernorm = nn.LayerNorm(width) if given["scale_fc"] else None
        self.activation = ACTIVATIONS[given["activation"]]
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        batch: Batch,
        cache: Any = None,
        memory: Optional[Tensor] = None,
        memory_mask: Optional[Tensor] = None,
    ) -> Tensor:
        """Shape (B, L, D), as ``x``."""
        y = self._before(self.self_attn_layer_norm, x)
        key, value = self.self_attn.keys_and_values(y)
        if cache is not None:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            key, value = own.update(key, value, self.number)
        y = self.self_attn(y, key, value, mask)
        if self.c_attn is not None:
            y = (y.unflatten(2, (len(self.c_attn), -1)) * self.c_attn[:, None]).flatten(2)
        y = y if self.attn_ln is None else self.attn_ln(y)
        x = self._after(self.self_attn_layer_norm, x + y)
        if self.encoder_attn is not None and self.encoder_attn_layer_norm is not None:
            y = self._before(self.encoder_attn_layer_norm, x)
            y = self.encoder_attn(y, *self._memory(memory, cache), memory_mask)
            x = self._after(self.encoder_attn_layer_norm, x + y)
        y = self._feed_forward(self._before(self.final_layer_norm, x), x, batch)
        x = (x if self.w_resid is None else self.w_resid * x) + y
        x = x if self.moe is None else self.moe.finish(x)
        return self._after(self.final_layer_norm, x)

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.pre_norm else x

    def _after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.pre_norm else norm(x)

    def _memory(self, memory: Any, cache: Any) -> Tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, worked out once for each cache."""
        assert self.encoder_attn is not None
        if not isinstance(cache, EncoderDecoderCache):
            return self.encoder_attn.keys_and_values(memory)
        if not cache.is_updated.get(self.number):
            cache.is_updated[self.number] = True
            cross = self.encoder_attn.keys_and_values(memory)
            return cache.cross_attention_cache.update(*cross, self.number)
        layer = cache.cross_attention_cache.layers[self.number]
        return layer.keys, layer.values

    def _feed_forward(self, x: Tensor, residual: Tensor, batch: Batch) -> Tensor:
        if self.moe is not None:
            return self.moe(x, residual, batch)
        x = self.activation(self.fc1(x))
        return self.fc2(x if self.ffn_layernorm is None else self.ffn_layernorm(x))


class Stack(nn.Module):
    """The encoder or the decoder.

    Args:
        given: ``vocabulary``, ``input_dim`` and ``scale`` of the embeddings (which are another stack's if
            ``own_embeddings`` is false), ``positions`` (rows of learned ones, 0 for sinusoidal ones, ``None``
            for none), ``embedding_norm``, ``final_norm``, ``output_dim`` of what follows the last layer,
            ``pad``, and what ``Layer`` needs.
        causal: whether a token sees earlier ones only.
    """

    main_input_name = "input_ids"  # transformers asks for it

    def __init__(self, given: Dict[str, Any], causal: bool) -> None:
        super().__init__()
        dim, input_dim, output_dim = given["dim"], given["input_dim"], given["output_dim"]
        self.dim, self.pad, self.scale, self.causal = dim, given["pad"], given["scale"], causal
        self.embed_tokens: Any = None
        if given["own_embeddings"]:
            self.embed_tokens = nn.Embedding(given["vocabulary"], input_dim, self.pad)
        self.project_in_dim = nn.Linear(input_dim, dim, bias=False) if input_dim != dim else None
        self.has_positions, rows = given["positions"] is not None, given["positions"]
        self.embed_positions = nn.Embedding(rows, dim, self.pad) if rows else None
        self.layernorm_embedding = nn.LayerNorm(dim) if given["embedding_norm"] else None
        shared: Dict[str, Any] = {}
        self.layers = nn.ModuleList(
            [Layer(given, layer, number, shared) for number, layer in enumerate(given["layers"])]
        )
        self.layer_norm = nn.LayerNorm(dim) if given["final_norm"] else None
        self.project_out_dim = nn.Linear(dim, output_dim, bias=False) if output_dim else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        embed_tokens: Any = None,
        cache: Any = None,
        memory: Optional[Tensor] = None,
        memory_mask: Optional[Tensor] = None,
        **unused: Any,
    ) -> BaseModelOutput:
        """Hidden states of tokens.

        Args:
            input_ids: (B, L): tokens that the cache does not have.
            attention_mask: (B, M): 1 for tokens, 0 for padding, those in the cache too; known by the padding
                symbol if not given.
            embed_tokens: in place of the stack's own.
            cache: keys and values of earlier tokens, to which these are added.
            memory: what the encoder gives.
            memory_mask: bool, (B, its length).
            unused: what transformers adds.
        """
        length, earlier = input_ids.shape[1], 0 if cache is None else cache.get_seq_length()
        keep_BM = _mask_of(input_ids, attention_mask, self.pad, earlier)
        keep_BL = keep_BM[:, -length:]
        embedding_BLC = (self.embed_tokens if embed_tokens is None else embed_tokens)(input_ids)
        x = self.scale * embedding_BLC
        x = x if self.project_in_dim is None else self.project_in_dim(x)
        if self.has_positions:
            x = x + self._positions(keep_BM, x.dtype)[:, -length:]
        x = x if self.layernorm_embedding is None else self.layernorm_embedding(x)
        if not self.causal:
            x = x * keep_BL.unsqueeze(-1).to(x.dtype)
        mask = keep_BM[:, None, None, :]
        if self.causal:
            width = keep_BM.shape[1]
            order = torch.arange(width, device=x.device)
            # a token always sees itself, so that no row is empty, and padding gets numbers
            mask = mask & (order <= order[-length:, None]) | (order == order[-length:, None])
        batch = Batch(input_ids, keep_BL, embedding_BLC.detach(), self.causal)
        memory_mask = None if memory_mask is None else memory_mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask, batch, cache, memory, memory_mask)
        x = x if self.layer_norm is None else self.layer_norm(x)
        return BaseModelOutput(x if self.project_out_dim is None else self.project_out_dim(x))

    def _positions(self, keep_BM: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens are numbered from ``pad + 1`` on, without padding."""
        number_BM = keep_BM.long().cumsum(1) * keep_BM + self.pad
        if self.embed_positions is not None:
            return self.embed_positions(number_BM)
        half = self.dim // 2
        frequency = torch.exp(
            torch.arange(half, device=keep_BM.device).float() * -(math.log(10000) / (half - 1))
        )
        angle = number_BM.unsqueeze(-1).float() * frequency
        table = torch.cat([angle.sin(), angle.cos()], -1)
        table = F.pad(table, (0, self.dim - 2 * half)) * keep_BM.unsqueeze(-1)
        return table.to(dtype)


def _mask_of(input_ids: Tensor, attention_mask: Optional[Tensor], pad: int, earlier: int) -> Tensor:
    """Which tokens are no padding: bool, (B, those in the cache and these)."""
    if attention_mask is not None and attention_mask.shape[1] == earlier + input_ids.shape[1]:
        return attention_mask.bool()
    keep_BL = input_ids.ne(pad) if attention_mask is None else attention_mask.bool()
    return F.pad(keep_BL, (earlier, 0), value=True)


class Decoder(Stack):
    """A stack with a projection to the vocabulary."""

    def __init__(self, given: Dict[str, Any]) -> None:
        super().__init__(given, causal=True)
        width = given["output_dim"] or given["dim"]
        self.output_projection = None
        if not given["tied_output"]:
            self.output_projection = nn.Linear(width, given["vocabulary"], bias=False)

    def logits(self, x_BLD: Tensor, embed_tokens: Any = None) -> Tensor:
        """(B, L, vocabulary)."""
        if self.output_projection is not None:
            return self.output_projection(x_BLD)
        return F.linear(x_BLD, (self.embed_tokens if embed_tokens is None else embed_tokens).weight)
