"""A checkpoint as transformers' own NLLB-MoE, which needs no code beside it.

That model is one kind only: an encoder-decoder with the norms before, sinusoidal positions, one embedding for
all, ReLU, and a top-2 gate whose weights sum to 1.  What does not fit is named.
"""

from typing import Any, Dict, Iterator, List, Mapping, Tuple

from torch import Tensor

from ...moe.experts import to_dense
from ..files import CommandError
from .architecture import BOS, EOS, PAD, Architecture

_NAMES = {
    "encoder_attn.": "cross_attention.",
    "encoder_attn_layer_norm.": "cross_attention_layer_norm.",
    "final_layer_norm.": "ff_layer_norm.",
    "fc1.": "ffn.fc1.",
    "fc2.": "ffn.fc2.",
}
"""What that model calls parts of a layer that fairseq calls otherwise."""

_IGNORED = ("version", "embed_positions._float_tensor")


def to_nllb_moe(architecture: Architecture) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
    """Configuration and tensors of an ``NllbMoeForConditionalGeneration``.

    Raises:
        CommandError: the model is another; the sentence says by what.
    """
    config = architecture.as_config()
    misfits = list(_misfits(architecture, config))
    if misfits:
        raise CommandError(f"NLLB-MoE cannot be this model, which has {', '.join(misfits)}: use `to` hf.")
    encoder, decoder = config["encoder_stack"], config["decoder_stack"]
    steps = {side: _step(config[side + "_stack"]) for side in ("encoder", "decoder")}
    moe = next(layer["moe"] for layer in encoder["layers"] + decoder["layers"] if "moe" in layer)
    longest = (architecture.options.of_model(f"max_{x}_positions", 1024) for x in ("source", "target"))
    found = {
        "model_type": "nllb-moe",
        "architectures": ["NllbMoeForConditionalGeneration"],
        "vocab_size": encoder["vocabulary"],
        "max_position_embeddings": max(map(int, longest)),
        "d_model": encoder["dim"],
        "scale_embedding": encoder["scale"] != 1,
        "num_experts": len(moe["widths"]),
        "router_bias": False,
        "router_dtype": "float32",
        "second_expert_policy": "all",
        "moe_eval_capacity_token_fraction": 1.0,  # nothing is left out
        "moe_token_dropout": 0.0,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
        "is_encoder_decoder": True,
    }
    for side, stack in (("encoder", encoder), ("decoder", decoder)):
        found.update(
            {
                f"{side}_layers": len(stack["layers"]),
                f"{side}_attention_heads": stack["heads"],
                f"{side}_ffn_dim": moe["widths"][0],
                f"{side}_sparse_step": steps[side],
            }
        )
    return found, dict(_tensors(architecture, len(moe["widths"])))


def _misfits(architecture: Architecture, config: Mapping[str, Any]) -> Iterator[str]:
    """What the model has and NLLB-MoE has not."""
    if architecture.kind != "seq2seq":
        yield "no encoder and decoder"
        return
    stacks = config["encoder_stack"], config["decoder_stack"]
    for name, what in (
        ("pre_norm", "layer norms behind the sublayers"),
        ("final_norm", "no layer norm at the end"),
    ):
        if not all(stack[name] for stack in stacks):
            yield what
    wanted = {"positions": 0, "embedding_norm": False, "activation": "relu", "output_dim": None}
    wanted.update(dict.fromkeys(("scale_attn", "scale_heads", "scale_resids", "scale_fc"), False))
    for name, value in wanted.items():
        if any(stack[name] != value for stack in stacks):
            yield f"`{name}` {next(stack[name] for stack in stacks if stack[name] != value)}".replace("`", "")
    if stacks[1]["own_embeddings"] or not stacks[1]["tied_output"]:
        yield "several embeddings (--share-all-embeddings is not given)"
    if stacks[0]["dim"] != stacks[1]["dim"] or stacks[0]["input_dim"] != stacks[0]["dim"]:
        yield "several widths"
    yield from _misfits_of_experts(architecture, [layer for stack in stacks for layer in stack["layers"]])


def _misfits_of_experts(architecture: Architecture, layers: List[Dict[str, Any]]) -> Iterator[str]:
    options: Any = architecture.config.router_options
    sparse = [x["moe"] for x in layers if "moe" in x]
    if any(moe["router"] is None for moe in sparse):
        yield "experts that have not spawned"
        return
    given: Dict[str, Any] = {
        name: getattr(options, name, None) for name in ("top_k", "gate_input", "balance", "free_experts")
    }
    fits = architecture.config.router == "topk" and given["top_k"] == 2
    fits = fits and options.renormalize.value != "never" and given["gate_input"].value == "hidden"
    fits = fits and given["balance"].value == "loss" and given["free_experts"] == 0
    fits = fits and options.gate_activation.value == options.gate_input_activation.value == "identity"
    if not fits:
        yield f"the router {architecture.config.router} instead of a plain top-2 gate whose weights sum to 1"
    widths = {width for moe in sparse for width in moe["widths"]} | {
        x["ffn_dim"] for x in layers if "ffn_dim" in x
    }
    if len(widths) > 1:
        yield "feed-forward networks of several widths"
    for name, what in (("gated", "gated experts"), ("shared_width", "a shared expert"), ("norm", "a norm")):
        if any(moe[name] for moe in sparse):
            yield what
    if any(moe["activation"] != "relu" for moe in sparse):
        yield "experts with another activation function than ReLU"
    if any(moe["heads"] > 1 or moe["hyper_adapter"] or moe["scaling_factor"] != 1 for moe in sparse):
        yield "heads, a hyper-adapter or a scaling factor around the experts"


def _step(stack: Mapping[str, Any]) -> int:
    """Of how many layers each is sparse; 0: none is."""
    return next((number + 1 for number, layer in enumerate(stack["layers"]) if "moe" in layer), 0)


def _tensors(architecture: Architecture, experts: int) -> Iterator[Tuple[str, Tensor]]:
    scale = getattr(architecture.config.router_options, "gate_lr_scale", 1.0)
    for key, tensor in architecture.tensors.items():
        if key.endswith(_IGNORED) or key.startswith("plateau."):
            continue
        if key == "encoder.embed_tokens.weight":
            for name in (
                "model.shared",
                "model.encoder.embed_tokens",
                "model.decoder.embed_tokens",
                "lm_head",
            ):
                yield f"{name}.weight", tensor
        elif key in architecture.tied:
            continue
        elif ".moe." in key:
            layer, _, name = key.partition(".moe.")
            if name == "router.weight":
                yield f"model.{layer}.ffn.router.classifier.weight", tensor * scale
            elif name.startswith("experts."):
                for number, part in enumerate(tensor.chunk(experts)):
                    dense, value = to_dense(name[len("experts.") :], part)
                    yield f"model.{layer}.ffn.experts.expert_{number}.{dense}", value
        else:
            for name, other in _NAMES.items():
                key = key.replace("." + name, "." + other)
            yield "model." + key, tensor
