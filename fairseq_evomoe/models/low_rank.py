"""Low-rank experts beside linear layers of a fairseq encoder: SMoLA (arXiv 2312.00968).

The encoder keeps its own layers, under their own names, so that a dense checkpoint loads into it.  Each
chosen linear layer has a child ``low_rank``, whose output a hook adds to its own.
"""

from contextvars import ContextVar
from functools import partial
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from fairseq.modules.checkpoint_activations import unwrap_checkpoint
from torch import Tensor, nn

from .. import compat
from ..config.config import MoEConfig
from ..moe.loading import StateMismatch
from ..moe.low_rank import Beside, LowRankExperts
from ..moe.noise import seed_of
from ..moe.options import OptionError
from .recompute import recomputed

CHILD = "low_rank"
"""What a linear layer calls the experts beside it."""

LINEARS = {
    Beside.ffn: ("fc1", "fc2"),
    Beside.attention: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
}
LINEARS[Beside.all] = LINEARS[Beside.attention] + LINEARS[Beside.ffn]

_padding: ContextVar[Optional[Tensor]] = ContextVar("padding", default=None)
"""Padding of the batch that goes through a layer in this thread: bool, (batch, seq)."""


class AdaptedEncoderLayer(compat.EncoderLayer):
    """fairseq's encoder layer, whose linear layers have low-rank experts beside them.

    Attributes:
        checkpoint_activations: whether to recompute activations in the backward pass.
        offload_activations: whether to keep the layer's input on the CPU until then.
    """

    checkpoint_activations = False
    offload_activations = False

    def forward(
        self, x: Tensor, encoder_padding_mask: Optional[Tensor], attn_mask: Optional[Tensor] = None
    ) -> Any:
        """See fairseq's ``TransformerEncoderLayerBase``."""
        layer = partial(super().forward, encoder_padding_mask=encoder_padding_mask, attn_mask=attn_mask)

        def forward(x: Tensor) -> Any:
            before = _padding.set(encoder_padding_mask)
            try:
                return layer(x)
            finally:
                _padding.reset(before)

        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return forward(x)
        return recomputed(forward, x, self.offload_activations)


def add_low_rank_experts(
    cfg: Any, config: MoEConfig, chosen: Dict[str, List[Any]], stacks: Mapping[str, Sequence[nn.Module]]
) -> str:
    """Put low-rank experts beside linear layers of the chosen layers of the encoder.

    Args:
        cfg: fairseq's configuration of the model.
        config: of the experts.
        chosen: the layers of each stack that get some.
        stacks: all layers of each stack.

    Returns:
        which layers have which experts, in words.

    Raises:
        OptionError: there is no encoder, or a rank over the width of a linear layer.
    """
    if "encoder" not in chosen:
        raise OptionError(
            "rank",
            f"With `rank` {config.low_rank.rank} experts mix the tokens of a sequence, and a decoder must "
            "not see later ones: use --arch evomoe_roberta, or evomoe_transformer, whose encoder gets them.",
        )
    if not chosen["encoder"]:
        raise OptionError(
            "freq",
            f"`freq` {config.layer.freq} is greater than the number of layers of the encoder "
            f"({len(stacks['encoder'])}), so that none would have low-rank experts: lower it.",
        )
    for number, layer in enumerate(chosen["encoder"]):
        unwrap_checkpoint(layer)
        layer.__dict__.pop("forward", None)  # unwrapping leaves fairseq's own there
        layer.__class__ = AdaptedEncoderLayer
        layer.checkpoint_activations = bool(getattr(cfg, "checkpoint_activations", False))
        layer.offload_activations = bool(getattr(cfg, "offload_activations", False))
        for name in LINEARS[config.low_rank.beside]:
            _stand_beside(layer.get_submodule(name), config, (number, name))
        if config.low_rank.beside != Beside.ffn:
            _let_projections_be_called(layer.self_attn)
    compat.remove_encoder_fast_path(stacks["encoder"])
    low_rank, names = config.low_rank, ", ".join(LINEARS[config.low_rank.beside])
    return (
        f"encoder: {config.experts} experts of rank {low_rank.rank} beside {names} in "
        f"{len(chosen['encoder'])} of {len(stacks['encoder'])} layers"
        + ("; the decoder has none" if "decoder" in stacks else "")
    )


def _stand_beside(linear: Any, config: MoEConfig, key: Tuple[int, str]) -> None:
    slots = getattr(config.router_options, "slots")  # noqa: B009  (of the router soft alone)
    sizes = linear.in_features, linear.out_features
    experts = LowRankExperts(*sizes, config.experts, config.low_rank.rank, slots)
    experts.initialize(torch.Generator().manual_seed(seed_of(config.seed, *key)))
    linear.add_module(CHILD, experts)
    linear.register_forward_hook(_add)


def _let_projections_be_called(attention: Any) -> None:
    """``multihead_attention.py`` hands the weights to PyTorch's own function unless it is told not to."""
    if getattr(attention, "use_xformers", False):
        raise OptionError(
            "beside",
            "`beside` needs the projections of self-attention, which --encoder-xformers-att-config goes "
            "past: leave that out, or use ffn.",
        )
    attention.skip_embed_dim_check = True


def _add(linear: Any, inputs: Tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook: the output of the linear layer and of the experts beside it; x: (seq, batch, dim)."""
    x = inputs[0].transpose(0, 1)  # one sentence after another, as in feed_forward.py
    padding = _padding.get()
    x_TD = x.reshape(-1, x.shape[-1])
    sequence_T = torch.arange(x.shape[0], device=x.device).repeat_interleave(x.shape[1])
    if padding is None:
        y_TO = linear.low_rank(x_TD, sequence_T)
    else:
        keep_T = (~padding.reshape(-1).bool()).nonzero().squeeze(1)
        kept_TO = linear.low_rank(x_TD.index_select(0, keep_T), sequence_T.index_select(0, keep_T))
        y_TO = kept_TO.new_zeros(x_TD.shape[0], kept_TO.shape[1]).index_copy(0, keep_T, kept_TO)
    y = y_TO.view(x.shape[0], x.shape[1], -1).transpose(0, 1)
    return output + y.to(output.dtype)


def low_rank_experts(model: nn.Module) -> Iterator[Tuple[str, LowRankExperts]]:
    """Name and experts of each linear layer of a model that has low-rank experts beside it."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankExperts):
            yield name, module


def check_state(model: nn.Module, state_dict: Dict[str, Any], prefix: str) -> None:
    """Refuse low-rank experts beside other linear layers than the model's; a dense state has none.

    Raises:
        StateMismatch: it has.
    """
    end = f".{CHILD}.up_ERO"
    found = {key[: -len(end)] for key in state_dict if key.endswith(end)}
    expected = {prefix + name[: -len(CHILD) - 1] for name, _ in low_rank_experts(model)}
    if found and found != expected:
        raise StateMismatch(
            "beside",
            f"The checkpoint has low-rank experts beside {len(found)} linear layers and the model beside "
            f"{len(expected)}, not the same ones: give the `rank`, `beside` and `freq` that it was "
            "trained with.",
        )
