"""``evomoe_lm``: fairseq's ``transformer_lm`` with MoE layers, for the task ``language_modeling``."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
    base_lm_architecture,
    transformer_lm_gpt,
    transformer_lm_gpt2_medium,
)
from fairseq.tasks import FairseqTask

from ..config.models import resolve_model
from ..config.options import MoEOptions, complete, set_defaults
from .build import add_experts
from .feed_forward import MoEModel
from .registration import options_of
from .requirements import check_task


@dataclass
class EvoMoELanguageModelConfig(MoEOptions, TransformerLanguageModelConfig):
    """Options of ``transformer_lm`` and of the MoE layers."""


@register_model("evomoe_lm", dataclass=EvoMoELanguageModelConfig)
class EvoMoELanguageModel(MoEModel, TransformerLanguageModel):
    """Causal language model with MoE layers in the decoder."""

    @classmethod
    def build_model(cls, cfg: Any, task: FairseqTask) -> "EvoMoELanguageModel":
        """Build the model that the configuration describes."""
        cfg = complete(cfg, options_of(cls))
        check_task(cls, cfg, task)
        config = resolve_model(cfg, ffn_dims=[cfg.decoder_ffn_embed_dim])
        model = super().build_model(cfg, task)
        words = add_experts(cfg, config, {"decoder": model.decoder})
        return model.with_config(config, words)


@register_model_architecture("evomoe_lm", "evomoe_lm_gpt")
def evomoe_lm_gpt(args: Namespace) -> None:
    """The sizes of ``transformer_lm_gpt``."""
    transformer_lm_gpt(args)


@register_model_architecture("evomoe_lm", "evomoe_lm_gpt2_medium")
def evomoe_lm_gpt2_medium(args: Namespace) -> None:
    """The sizes of ``transformer_lm_gpt2_medium``."""
    transformer_lm_gpt2_medium(args)


@register_model_architecture("evomoe_lm", "evomoe_lm_tiny")
def evomoe_lm_tiny(args: Namespace) -> None:
    """Two layers of width 64, for a CPU and for tests."""
    set_defaults(
        args,
        decoder_embed_dim=64,
        decoder_ffn_embed_dim=128,
        decoder_layers=2,
        decoder_attention_heads=2,
    )
    base_lm_architecture(args)
