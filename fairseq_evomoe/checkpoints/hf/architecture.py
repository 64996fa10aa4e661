"""What a checkpoint's model is, in the words of ``configuration_evomoe.py``.

What tensors tell is taken from them, and the rest from the options that the checkpoint has.
"""

import math
from argparse import Namespace
from dataclasses import dataclass
from enum import Enum
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from fairseq.models import ARCH_MODEL_NAME_REGISTRY
from torch import Tensor

from ...config.config import ExpertBias, MoEConfig, declarations
from ...config.errors import ConfigError
from ...config.resolve import resolve
from ...evolution.plateau import Plateau
from ...evolution.schedule import Phase
from ...moe.loading import STAGE
from ...moe.routers import ROUTERS, Router
from ..files import CommandError
from ..index import is_low_rank
from ..saved_options import SavedOptions

PAD, BOS, EOS = 1, 0, 2
"""What fairseq's dictionaries have first."""

KINDS = {"evomoe_lm": "causal_lm", "evomoe_roberta": "masked_lm", "evomoe_transformer": "seq2seq"}
"""What transformers calls the models, by the names of ours."""

CLASSES = {
    "causal_lm": ("AutoModelForCausalLM", "EvoMoEForCausalLM"),
    "masked_lm": ("AutoModelForMaskedLM", "EvoMoEForMaskedLM"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "EvoMoEForSeq2SeqLM"),
}
"""For each, the class of transformers that loads it, and that of ``modeling_evomoe.py``."""

_REFUSED = {
    "adaptive_softmax_cutoff": "an adaptive softmax, which gives no logits of all words",
    "adaptive_input": "adaptive inputs",
    "character_embeddings": "embeddings of characters",
    "char_inputs": "embeddings of characters",
    "base_layers": "BASE layers beside the MoE layers",
    "cross_self_attention": "attention to both sides at once",
    "no_cross_attention": "a decoder that does not see the encoder",
    "encoder_xformers_att_config": "attention of xformers",
    "decoder_xformers_att_config": "attention of xformers",
}
"""Options of fairseq's models without a counterpart here, and what they are."""


_NORMFORMER = {
    "scale_attn": "attn_ln.weight",
    "scale_heads": "c_attn",
    "scale_resids": "w_resid",
    "scale_fc": "ffn_layernorm.weight",
}
"""Tensors that a layer has with some options, which not all of fairseq's models hand on."""


@dataclass
class Side:
    """Where the encoder's or the decoder's options and tensors are.

    Attributes:
        name: ``encoder`` or ``decoder``.
        prefix: of its tensors.
    """

    name: str
    prefix: str


class Architecture:
    """A checkpoint's model.

    Attributes:
        kind: see ``KINDS``.
        options: the checkpoint's.
        config: of the MoE layers.
        tensors: of the model.
        task: the options of the checkpoint's task.
        update: the update after which it was written.
        tied: for tensors that are others under another name: the others.

    Args:
        state: the checkpoint, with all experts.

    Raises:
        CommandError: it is no checkpoint of a model of ours, or one that cannot be expressed.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.options = options = SavedOptions(state)
        model = state.get("model")
        if not isinstance(model, dict) or not options.found:
            raise CommandError("The file is no checkpoint of a model: it has no tensors and options of one.")
        self.tensors: Dict[str, Tensor] = model
        found = str(options.of_model("_name", None) or options.of_model("arch", None))
        name = ARCH_MODEL_NAME_REGISTRY.get(found, found)
        if name not in KINDS:
            raise CommandError(
                f"The checkpoint is of the model {found}, and only those of {', '.join(KINDS)} can be "
                "exported: transformers has models of its own for fairseq's dense ones."
            )
        self.kind = KINDS[name]
        self._refuse()
        self.sides = {
            "causal_lm": [Side("decoder", "decoder.")],
            "masked_lm": [Side("encoder", "encoder.sentence_encoder.")],
            "seq2seq": [Side("encoder", "encoder."), Side("decoder", "decoder.")],
        }[self.kind]
        self.config = self._moe_config()
        self.tied = self._find_tied()
        self.task = _task_of(state)
        history = state.get("optimizer_history") or [{}]  # without one, fairseq tells the model 0
        self.update = int(history[-1].get("num_updates", 0))

    def _refuse(self) -> None:
        if any(map(is_low_rank, self.tensors)):
            raise CommandError(
                "The model has low-rank experts (`rank`) beside its linear layers: it cannot be exported."
            )
        if any(key.startswith("distillation.") for key in self.tensors):
            raise CommandError(
                "The model's modules still learn from a `teacher`: export a checkpoint of a later update."
            )
        for name, what in _REFUSED.items():
            if self.options.of_model(name, None):
                raise CommandError(
                    f"The model has {what} (--{name.replace('_', '-')}): it cannot be exported."
                )
        cls = ROUTERS.get(self.options.router)
        if cls is None or cls.__module__.rpartition(".")[0] != Router.__module__.rpartition(".")[0]:
            raise CommandError(
                f"The checkpoint's `router` {self.options.router} is a plugin's, whose code would be missing "
                "in the folder: only this package's routers can be exported."
            )
        if "eval_capacity_factor" in cls.Options.declared() and self.options["eval_capacity_factor"] > 0:
            raise CommandError(
                "With `eval_capacity_factor` what a token gets depends on the other sentences of its batch, "
                "not on the weights alone: such a checkpoint cannot be exported."
            )

    def _moe_config(self) -> MoEConfig:
        options, known = self.options, {"router", "preset", *declarations()}
        try:
            return resolve(
                {name: value for name, value in options.given.items() if name in known},
                masked=self.kind == "masked_lm",
                seed=int(options.of_model("seed", 1)),
                max_update=int(options.of_model("max_update", 0)),
            )
        except ConfigError as error:
            raise CommandError(str(error)) from error

    def _find_tied(self) -> Dict[str, str]:
        option, tensors = self.options.of_model, self.tensors
        tied = {}
        if self.kind == "masked_lm" and not option("untie_weights_roberta", False):
            tied["encoder.lm_head.weight"] = "encoder.sentence_encoder.embed_tokens.weight"
        if self.kind == "seq2seq" and option("share_all_embeddings", False):
            tied["decoder.embed_tokens.weight"] = "encoder.embed_tokens.weight"
            tied["decoder.output_projection.weight"] = "encoder.embed_tokens.weight"
        elif self.kind != "masked_lm" and option("share_decoder_input_output_embed", False):
            tied["decoder.output_projection.weight"] = "decoder.embed_tokens.weight"
        # in old checkpoints the projection may be missing
        return {a: b for a, b in tied.items() if a not in tensors or torch.equal(tensors[a], tensors[b])}

    def as_config(self) -> Dict[str, Any]:
        """The keyword arguments of ``EvoMoEConfig``."""
        last = self.sides[-1]
        config: Dict[str, Any] = {"kind": self.kind, "encoder_stack": None, "decoder_stack": None}
        for side in self.sides:
            config[side.name + "_stack"] = self._stack(side)
        stack = config[last.name + "_stack"]
        return {
            **config,
            "vocab_size": stack["vocabulary"],
            "hidden_size": stack["dim"],
            "num_hidden_layers": len(stack["layers"]),
            "num_attention_heads": stack["heads"],
            "max_position_embeddings": self._longest(last, stack),
            "is_encoder_decoder": self.kind == "seq2seq",
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": self.first_token,
            "decoder_start_token_id": EOS if self.kind == "seq2seq" else None,
            "tie_word_embeddings": False,  # the modeling file looks after that
        }

    def _longest(self, side: Side, stack: Dict[str, Any]) -> int:
        """Tokens of the longest sequence."""
        if stack["positions"]:
            return int(stack["positions"]) - PAD - 1
        name = "max_target_positions" if side.name == "decoder" else "max_source_positions"
        return int(self.options.of_model(name, 1024))

    @property
    def first_token(self) -> int:
        """What a text begins with: fairseq's language models see the end of the text before, unless told."""
        lm_without = self.kind == "causal_lm" and not self.options.of_model("add_bos_token", False)
        return EOS if lm_without or self.kind == "seq2seq" else BOS

    def _stack(self, side: Side) -> Dict[str, Any]:
        """See ``layers_evomoe.Stack``."""
        option, of = self.options.of_model, side.name
        get = lambda name: self.tensors.get(side.prefix + name)  # noqa: E731
        embedding, embed_key = get("embed_tokens.weight"), side.prefix + "embed_tokens.weight"
        if embedding is None:
            embedding = self.tensors[self.tied[embed_key]]
        norm, out = get("layers.0.self_attn_layer_norm.weight"), get("project_out_dim.weight")
        positions, projection = get("embed_positions.weight"), get("output_projection.weight")
        assert norm is not None
        dim, cross = norm.shape[0], get("layers.0.encoder_attn.k_proj.weight")
        rows: Optional[int] = 0 if positions is None else positions.shape[0]
        if option("no_token_positional_embeddings", False):
            rows = None
        output_key = (
            "encoder.lm_head.weight" if self.kind == "masked_lm" else side.prefix + "output_projection.weight"
        )
        return {
            "vocabulary": (embedding if projection is None else projection).shape[0],
            "pad": PAD,
            "dim": dim,
            "input_dim": embedding.shape[1],
            "output_dim": None if out is None else out.shape[0],
            "cross_dim": None if cross is None else cross.shape[1],
            "heads": int(option(of + "_attention_heads", 8)),
            "scale": 1.0 if option("no_scale_embedding", False) else math.sqrt(dim),
            "own_embeddings": embed_key not in self.tied,
            "tied_output": output_key in self.tied,
            "positions": rows,
            "embedding_norm": get("layernorm_embedding.weight") is not None,
            "pre_norm": bool(option(of + "_normalize_before", False)),
            "final_norm": get("layer_norm.weight") is not None,
            "activation": str(option("activation_fn", "relu")),
            **{name: self._any_layer_has(side, tensor) for name, tensor in _NORMFORMER.items()},
            "layers": [self._feed_forward(side, number) for number in range(self._count_layers(side))],
        }

    def _any_layer_has(self, side: Side, name: str) -> bool:
        start, end = side.prefix + "layers.", "." + name
        return any(key.startswith(start) and key.endswith(end) for key in self.tensors)

    def _count_layers(self, side: Side) -> int:
        start = side.prefix + "layers."
        return 1 + max(int(key[len(start) :].split(".")[0]) for key in self.tensors if key.startswith(start))

    def _feed_forward(self, side: Side, number: int) -> Dict[str, Any]:
        prefix = f"{side.prefix}layers.{number}."
        moe = prefix + "moe."
        tensors = {key[len(moe) :]: x for key, x in self.tensors.items() if key.startswith(moe)}
        if tensors:
            return {"moe": self._moe(side, moe.rstrip("."), tensors)}
        return {"ffn_dim": self.tensors[prefix + "fc1.weight"].shape[0]}

    def _moe(self, side: Side, name: str, tensors: Dict[str, Tensor]) -> Dict[str, Any]:
        """See ``layers_evomoe.MoE``."""
        layer, found = self.config.layer, str(self.config.layer.expert_activation.value)
        of_gated = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
        activation = str(self.options.of_model("activation_fn", "relu")) if found == "model" else found
        shared = tensors.get("shared.w1")
        routed = any(key.startswith("router.") for key in tensors)
        return {
            "widths": self._widths(side, name, tensors),
            "gated": "experts.w3" in tensors,
            "bias": layer.expert_bias != ExpertBias.none,
            "activation": of_gated.get(activation, activation),
            "norm": "experts.hidden.norm.weight" in tensors,
            "heads": layer.heads,
            "shared_width": 0 if shared is None else shared.shape[0],
            "hyper_adapter": any(key.startswith("hyper_adapter.") for key in tensors),
            "scaling_factor": layer.scaling_factor,
            "output_masking": layer.output_masking,
            "router": self._router(side, tensors) if routed else None,
        }

    def _widths(self, side: Side, name: str, tensors: Dict[str, Tensor]) -> List[int]:
        experts, units = tensors["experts.b2"].shape[0], tensors["experts.w1"].shape[0]
        if experts == 1:
            return [units]
        ffn_dim = int(self.options.of_model(side.name + "_ffn_embed_dim", 2048))
        widths = self.config.widths(ffn_dim)
        if len(self.config.stages) > 1:  # all experts have the same in all stages
            widths = self.config.first_widths(ffn_dim)[:1] * experts
        origin = tensors.get("router.origin_E")
        if origin is not None:
            widths = [widths[number] for number in origin.round().long().tolist()]
        if len(widths) != experts or sum(widths) != units:
            raise CommandError(
                f"The {experts} experts of {name} have {units} hidden units in all, and the checkpoint's "
                f"options make {len(widths)} of {sum(widths)}: it is damaged, or has another model's options."
            )
        return widths

    def _router(self, side: Side, tensors: Dict[str, Tensor]) -> Dict[str, Any]:
        embedding = self.tensors.get(side.prefix + "embed_tokens.weight")
        if embedding is None:
            embedding = self.tensors[self.tied[side.prefix + "embed_tokens.weight"]]
        temperature, hard = self._stage(tensors)
        arguments = self.config.router_arguments()
        return {
            "name": self.config.router,
            "options": {k: x.value if isinstance(x, Enum) else x for k, x in arguments.items()},
            "vocabulary": embedding.shape[0],
            "embedding_dim": embedding.shape[1],
            "temperature": temperature,
            "hard": hard,
        }

    def _stage(self, tensors: Dict[str, Tensor]) -> Tuple[float, bool]:
        """What the router of a loaded model is told: temperature, and whether it is in the last stage."""
        spawned: Sequence[float] = ()
        plateau = self.config.make_plateau()
        if plateau is not None and all(key in self.tensors for key in Plateau.KEYS):
            plateau.load({key: self.tensors[key] for key in Plateau.KEYS})
            spawned = plateau.spawned
        schedule, stages = self.config.make_schedule(spawned), [x.experts for x in self.config.stages]
        stage = sum(experts <= len(tensors["experts.b2"]) for experts in stages)
        if STAGE in tensors:
            stage = round(tensors[STAGE].item())
        stage = min(max(stage, 1), len(stages))
        return schedule.temperature(self.update, stage), schedule.phase(self.update, stage) == Phase.HARD


def _task_of(state: Mapping[str, Any]) -> Dict[str, Any]:
    """Options of a checkpoint's task; fairseq's oldest have them among all others."""
    task = (state.get("cfg") or {}).get("task") or state.get("args") or {}
    return dict(vars(task) if isinstance(task, Namespace) else task)
