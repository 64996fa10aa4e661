"""What ``config.json`` says of an EvoMoE model."""

from typing import Any, Dict, Optional

from transformers import PretrainedConfig


class EvoMoEConfig(PretrainedConfig):
    """A Transformer with Mixture-of-Experts layers, as fairseq has trained it.

    Args:
        kind: ``causal_lm``, ``masked_lm`` or ``seq2seq``.
        encoder_stack: of the encoder, see ``layers_evomoe.Stack``; ``None`` without one.
        decoder_stack: of the decoder; ``None`` without one.
        hidden_size: width of a token, in the decoder if there is one.
        num_hidden_layers: number of layers.
        num_attention_heads: heads of each layer.
        fairseq: what fairseq needs to train and run the model, for ``evomoe import``.
        kwargs: what all configurations have.
    """

    model_type = "evomoe"

    def __init__(
        self,
        kind: str = "causal_lm",
        encoder_stack: Any = None,
        decoder_stack: Any = None,
        hidden_size: int = 0,
        num_hidden_layers: int = 0,
        num_attention_heads: int = 1,
        fairseq: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        self.kind = kind
        self.encoder_stack = encoder_stack
        self.decoder_stack = decoder_stack
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.fairseq = fairseq or {}
        super().__init__(**kwargs)
