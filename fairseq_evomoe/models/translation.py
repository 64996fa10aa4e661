"""``evomoe_transformer``: fairseq's ``transformer`` with MoE layers, for any translation task."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerModel,
    TransformerModelBase,
    base_architecture,
    transformer_iwslt_de_en,
    transformer_vaswani_wmt_en_de_big,
    transformer_wmt_en_de,
)
from fairseq.tasks import FairseqTask
from omegaconf import II

from ..config.models import resolve_model
from ..config.options import MoEOptions, complete, option, set_defaults
from .build import add_experts
from .feed_forward import MoEModel
from .flat_config import config_from_parser, to_namespace
from .registration import options_of
from .requirements import check_task


def _defaults() -> dict:
    args = Namespace()
    base_architecture(args)
    # fairseq's architectures derive the decoder's sizes from the encoder's
    args.decoder_embed_dim = II("model.encoder_embed_dim")
    args.decoder_ffn_embed_dim = II("model.encoder_ffn_embed_dim")
    args.decoder_input_dim = args.decoder_output_dim = II("model.decoder_embed_dim")
    return vars(args)


_Options: Any = config_from_parser("TransformerOptions", TransformerModelBase.add_args, _defaults())


@dataclass
class EvoMoETransformerConfig(_Options, MoEOptions):
    """Options of ``transformer``, under their flat names, and of the MoE layers."""

    moe_experts: Optional[int] = option(
        None, "Number of experts in each MoE layer once the experts have spawned. Default: 4."
    )


@register_model("evomoe_transformer", dataclass=EvoMoETransformerConfig)
class EvoMoETransformer(MoEModel, TransformerModel):
    """Encoder-decoder with MoE layers in both."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the flags of the dataclass (not those of ``transformer``, which has none)."""
        super(TransformerModelBase, cls).add_args(parser)

    @classmethod
    def build_model(cls, cfg: Any, task: FairseqTask) -> "EvoMoETransformer":
        """Build the model that the configuration describes."""
        cfg = complete(cfg, options_of(cls))
        check_task(cls, cfg, task)
        ffn_dims = [cfg.encoder_ffn_embed_dim, cfg.decoder_ffn_embed_dim]
        config = resolve_model(cfg, ffn_dims=ffn_dims, experts=4)
        args = to_namespace(cfg)
        model = super().build_model(args, task)
        words = add_experts(args, config, {"encoder": model.encoder, "decoder": model.decoder})
        return model.with_config(config, words)


@register_model_architecture("evomoe_transformer", "evomoe_transformer_iwslt_de_en")
def evomoe_transformer_iwslt_de_en(args: Namespace) -> None:
    """The sizes of ``transformer_iwslt_de_en``."""
    transformer_iwslt_de_en(args)


@register_model_architecture("evomoe_transformer", "evomoe_transformer_wmt_en_de")
def evomoe_transformer_wmt_en_de(args: Namespace) -> None:
    """The sizes of ``transformer_wmt_en_de``."""
    transformer_wmt_en_de(args)


@register_model_architecture("evomoe_transformer", "evomoe_transformer_vaswani_wmt_en_de_big")
def evomoe_transformer_vaswani_wmt_en_de_big(args: Namespace) -> None:
    """The sizes of ``transformer_vaswani_wmt_en_de_big``, with which EvoMoE was published."""
    transformer_vaswani_wmt_en_de_big(args)


@register_model_architecture("evomoe_transformer", "evomoe_transformer_tiny")
def evomoe_transformer_tiny(args: Namespace) -> None:
    """Two layers of width 64 in encoder and decoder, for a CPU and for tests."""
    set_defaults(
        args,
        encoder_embed_dim=64,
        encoder_ffn_embed_dim=128,
        encoder_layers=2,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_attention_heads=2,
    )
    base_architecture(args)
