"""``evomoe_roberta``: fairseq's ``roberta`` with MoE layers, for ``masked_lm`` and fine-tuning."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta import RobertaModel, base_architecture, roberta_large_architecture
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from fairseq.tasks import FairseqTask

from ..config.models import resolve_model
from ..config.options import MoEOptions, complete, option, set_defaults
from .build import add_experts
from .feed_forward import MoEModel
from .flat_config import config_from_parser, to_namespace
from .registration import options_of
from .requirements import check_task, positions_of


def _defaults() -> dict:
    args = Namespace()
    base_architecture(args)
    return vars(args)


_Options: Any = config_from_parser("RobertaOptions", RobertaModel.add_args, _defaults())


@dataclass
class EvoMoERobertaConfig(_Options, MoEOptions):
    """Options of ``roberta`` and of the MoE layers."""

    checkpoint_activations: bool = option(
        False, "Recompute the activations of each layer in the backward pass, to save memory."
    )
    offload_activations: bool = option(
        False, "Keep the inputs of checkpointed layers on the CPU; implies checkpoint-activations."
    )
    max_positions: Optional[int] = option(
        None, "Number of positional embeddings to learn; tokens-per-sample if not given."
    )


@register_model("evomoe_roberta", dataclass=EvoMoERobertaConfig)
class EvoMoERoberta(MoEModel, RobertaModel):
    """Masked language model with MoE layers in the encoder."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the flags of the dataclass (not those of ``roberta``, which has none)."""
        super(RobertaModel, cls).add_args(parser)

    @classmethod
    def build_model(cls, cfg: Any, task: FairseqTask) -> "EvoMoERoberta":
        """Build the model that the configuration describes."""
        cfg = complete(cfg, options_of(cls))
        check_task(cls, cfg, task)
        config = resolve_model(cfg, ffn_dims=[cfg.encoder_ffn_embed_dim], masked=True)
        args = to_namespace(cfg)
        if args.max_positions is None:
            args.max_positions = positions_of(cfg, task)
        args.checkpoint_activations = args.checkpoint_activations or args.offload_activations
        model = super().build_model(args, task)
        words = add_experts(args, config, {"encoder": model.encoder.sentence_encoder}, init=init_bert_params)
        return model.with_config(config, words)


@register_model_architecture("evomoe_roberta", "evomoe_roberta_large")
def evomoe_roberta_large(args: Namespace) -> None:
    """The sizes of ``roberta_large``, with which EvoMoE was published."""
    roberta_large_architecture(args)


@register_model_architecture("evomoe_roberta", "evomoe_roberta_tiny")
def evomoe_roberta_tiny(args: Namespace) -> None:
    """Two layers of width 64, for a CPU and for tests."""
    set_defaults(
        args,
        encoder_embed_dim=64,
        encoder_ffn_embed_dim=128,
        encoder_layers=2,
        encoder_attention_heads=2,
    )
    base_architecture(args)
