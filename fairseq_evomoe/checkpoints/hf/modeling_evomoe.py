"""EvoMoE models for transformers: a language model, an encoder-decoder and a masked language model.

The layers are in ``layers_evomoe.py``; shape suffixes are explained there.
"""

from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, Seq2SeqLMOutput

from .configuration_evomoe import EvoMoEConfig
from .layers_evomoe import ACTIVATIONS, Decoder, Stack

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls the keys and values of earlier tokens."""


class EvoMoEModel(PreTrainedModel, GenerationMixin):
    """Base of the models: weights under fairseq's names."""

    config_class = EvoMoEConfig
    base_model_prefix = ""
    _no_split_modules = ["Layer"]
    # buffers of fairseq's, heads of classifiers, and what only training needs
    _keys_to_ignore_on_load_unexpected = [
        r"version$",
        r"_float_tensor$",
        r"classification_heads\.",
        r"plateau\.",
        r"moe\.activity\.",
        r"moe\.demand\.",
        r"moe\.warmup\.",
        r"moe\.stage$",
    ]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: all weights come from a file."""


class EvoMoEForCausalLM(EvoMoEModel):
    """A language model."""

    def __init__(self, config: EvoMoEConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.decoder_stack)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """See ``Stack.forward``; ``labels``, -100 where there is none, are shifted here."""
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        logits = self.decoder.logits(self.decoder(input_ids, attention_mask, cache=cache)[0])
        loss = None if labels is None else _loss(logits[:, :-1], labels[:, 1:])
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def get_input_embeddings(self) -> Any:
        """See the parent."""
        return self.decoder.embed_tokens


class EvoMoEForSeq2SeqLM(EvoMoEModel):
    """An encoder-decoder, such as a translator."""

    def __init__(self, config: EvoMoEConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Stack(config.encoder_stack, causal=False), Decoder(config.decoder_stack)
        self.post_init()

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        decoder_input_ids: Optional[Tensor] = None,
        decoder_attention_mask: Optional[Tensor] = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        **unused: Any,
    ) -> Seq2SeqLMOutput:
        """See ``Stack.forward``; of ``labels`` the decoder's input is made if there is none."""
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        memory, pad = encoder_outputs[0], self.config.pad_token_id
        if attention_mask is not None:
            memory_mask = attention_mask.bool()
        elif input_ids is not None:
            memory_mask = input_ids.ne(pad)
        else:
            memory_mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = F.pad(labels, (1, 0), value=self.config.decoder_start_token_id)[:, :-1]
            decoder_input_ids = decoder_input_ids.masked_fill(decoder_input_ids == -100, pad)
        embed = self.encoder.embed_tokens if self.decoder.embed_tokens is None else None
        x = self.decoder(decoder_input_ids, decoder_attention_mask, embed, cache, memory, memory_mask)[0]
        logits = self.decoder.logits(x, embed)
        loss = None if labels is None else _loss(logits, labels)
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=memory, **{CACHE: cache})

    def get_input_embeddings(self) -> Any:
        """See the parent."""
        return self.encoder.embed_tokens


class MaskedLMHead(nn.Module):
    """RoBERTa's head."""

    def __init__(self, given: Dict[str, Any]) -> None:
        super().__init__()
        dim, vocabulary = given["dim"], given["vocabulary"]
        self.dense, self.layer_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.activation = ACTIVATIONS[given["activation"]]
        self.register_parameter("weight", None)
        if not given["tied_output"]:
            self.weight = nn.Parameter(torch.empty(vocabulary, dim))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x_BLD: Tensor, embed_tokens: Any) -> Tensor:
        """(B, L, vocabulary)."""
        x_BLD = self.layer_norm(self.activation(self.dense(x_BLD)))
        return F.linear(x_BLD, embed_tokens.weight if self.weight is None else self.weight) + self.bias


class EvoMoEForMaskedLM(EvoMoEModel):
    """A masked language model."""

    def __init__(self, config: EvoMoEConfig) -> None:
        super().__init__(config)
        self.encoder = nn.ModuleDict(
            {
                "sentence_encoder": Stack(config.encoder_stack, causal=False),
                "lm_head": MaskedLMHead(config.encoder_stack),
            }
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        **unused: Any,
    ) -> MaskedLMOutput:
        """See ``Stack.forward``; ``labels`` are -100 where there is none."""
        stack = self.encoder["sentence_encoder"]
        x = stack(input_ids, attention_mask)[0]
        logits = self.encoder["lm_head"](x, stack.embed_tokens)
        loss = None if labels is None else _loss(logits, labels)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=(x,))

    def get_input_embeddings(self) -> Any:
        """See the parent."""
        return self.encoder["sentence_encoder"].embed_tokens


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
