"""A checkpoint as a folder that transformers loads, without fairseq and without this package."""

from typing import Any, Dict, List, Mapping, Optional

from torch import Tensor

from ..files import CommandError
from .architecture import CLASSES, EOS, PAD, Architecture
from .code import files_of_model
from .folder import safetensors, write_json, write_tensors, written
from .nllb import to_nllb_moe
from .tokenizer import write_tokenizer

CONFIG = "config.json"


def export_model(
    state: Mapping[str, Any],
    out: str,
    force: bool = False,
    data: Optional[str] = None,
    sentencepiece: Optional[str] = None,
) -> List[str]:
    """Write a folder for ``from_pretrained(..., trust_remote_code=True)``.

    Args:
        state: the checkpoint, with all experts.
        out: the folder.
        force: whether to replace one that is there.
        data: folder of the dictionary, for the tokenizer; see ``write_tokenizer``.
        sentencepiece: SentencePiece's model, for the tokenizer.

    Returns:
        what was written, in a line or two.

    Raises:
        CommandError: it cannot be exported, or not written.
    """
    safetensors()
    architecture = Architecture(state)
    config = {**architecture.as_config(), **_for_transformers(architecture)}
    auto, _ = CLASSES[architecture.kind]
    with written(out, force) as folder:
        told = write_tokenizer(folder, architecture, config, data, sentencepiece)
        for name, text in files_of_model(architecture.config.router).items():
            (folder / name).write_text(text, encoding="utf-8")
        write_json(folder / CONFIG, {**config, "fairseq": _for_fairseq(state, architecture)})
        if architecture.kind != "masked_lm":
            write_json(folder / "generation_config.json", _generation(config))
        write_tensors(untied(architecture), folder)
    return [told, f"load it with {auto}.from_pretrained({out!r}, trust_remote_code=True)"]


def export_nllb_moe(state: Mapping[str, Any], out: str, force: bool = False) -> None:
    """Write a folder for transformers' own NLLB-MoE; without a tokenizer.

    Raises:
        CommandError: the model is another, or it cannot be written.
    """
    safetensors()
    architecture = Architecture(state)
    config, tensors = to_nllb_moe(architecture)
    with written(out, force) as folder:
        write_json(folder / CONFIG, {**config, "torch_dtype": _for_transformers(architecture)["torch_dtype"]})
        write_json(folder / "generation_config.json", _generation(config))
        write_tensors(tensors, folder)


def export_tensors(state: Mapping[str, Any], out: str, force: bool = False) -> int:
    """Write the weights alone, all of them under the names that they have in the checkpoint.

    Returns:
        how many tensors there are.

    Raises:
        CommandError: there are none, or they cannot be written.
    """
    tensors = state.get("model")
    if not isinstance(tensors, dict) or not tensors:
        raise CommandError("The file is no checkpoint of a model: it has no tensors of one.")
    safetensors()
    with written(out, force) as folder:
        write_tensors(tensors, folder)
    return len(tensors)


def untied(architecture: Architecture) -> Dict[str, Tensor]:
    """The tensors without those that are others under another name."""
    return {key: x for key, x in architecture.tensors.items() if key not in architecture.tied}


def _for_transformers(architecture: Architecture) -> Dict[str, Any]:
    auto, cls = CLASSES[architecture.kind]
    dtypes = [str(x.dtype).rpartition(".")[2] for x in architecture.tensors.values() if x.is_floating_point()]
    return {
        "model_type": "evomoe",
        "architectures": [cls],
        "auto_map": {
            "AutoConfig": "configuration_evomoe.EvoMoEConfig",
            auto: f"modeling_evomoe.{cls}",
        },
        "torch_dtype": max(set(dtypes), key=dtypes.count),
    }


def _for_fairseq(state: Mapping[str, Any], architecture: Architecture) -> Dict[str, Any]:
    """What ``evomoe import`` needs to make a checkpoint of the folder again; no path of this machine."""
    cfg = state.get("cfg") or {}
    kept = {name: dict(cfg[name]) for name in ("model", "task", "criterion") if cfg.get(name)}
    args = state.get("args")
    if not kept and args is not None:  # fairseq's oldest: all options together
        kept["args"] = {k: x for k, x in vars(args).items() if not k.endswith("_dir") and k != "restore_file"}
    for options in kept.values():
        if "data" in options:
            options["data"] = ""
    return {**kept, "tied": architecture.tied, "num_updates": architecture.update}


def _generation(config: Dict[str, Any]) -> Dict[str, Any]:
    """As fairseq generates: never the padding symbol, and at least one token beside what is given."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    assert config["pad_token_id"] == PAD and config["eos_token_id"] == EOS
    least = {"min_new_tokens": 1} if config["is_encoder_decoder"] else {}
    return {
        **{key: config[key] for key in keys if config[key] is not None},
        "suppress_tokens": [PAD],
        **least,
    }
