"""The files from which a tokenizer makes of text what fairseq made of it."""

import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from fairseq.data import Dictionary
from fairseq.data.data_utils import infer_language_pair

from ..files import CommandError
from .architecture import EOS, Architecture
from .code import text_of
from .folder import write_json

CODE = "tokenization_evomoe.py"
BEGIN, END, MASK = "<s>", "</s>", "<mask>"
"""Entries of fairseq's dictionaries."""


def write_tokenizer(
    folder: Path,
    architecture: Architecture,
    config: Dict[str, Any],
    data: Optional[str],
    sentencepiece: Optional[str],
) -> str:
    """Write a tokenizer for a model, if its dictionary is known.

    Args:
        folder: where to.
        architecture: the model.
        config: what it says of itself.
        data: folder of the dictionary; that of the checkpoint's task if not given and there.
        sentencepiece: the model that has split words into pieces, if any.

    Returns:
        a sentence that tells what was written.

    Raises:
        CommandError: there is no such file, or it does not fit the model.
    """
    task = architecture.task
    folder_of_data = Path(str(data or task.get("data") or ".").split(os.pathsep)[0])
    names = ["dict.txt"]
    if architecture.kind == "seq2seq":
        names = [f"dict.{language}.txt" for language in _languages(task, folder_of_data)]
    if not (folder_of_data / names[0]).is_file() and (folder_of_data / "input0").is_dir():
        folder_of_data = folder_of_data / "input0"  # of a classifier
    missing = [name for name in names if not (folder_of_data / name).is_file()]
    if missing and data is not None:
        raise CommandError(f"`data` {data} has no {missing[0]}: give the folder of the checkpoint's data.")
    if missing:
        return "no tokenizer was written: give --data, the folder of the checkpoint's dictionary"
    if sentencepiece is not None and not Path(sentencepiece).is_file():
        raise CommandError(f"There is no `sentencepiece` model {sentencepiece}.")
    symbols = [_symbols(folder_of_data / name, architecture.kind) for name in names]
    sizes = [
        stack["vocabulary"]
        for stack in (config["encoder_stack"], config["decoder_stack"])
        if stack is not None
    ]
    for name, entries, size in zip(names, symbols, sizes):
        if len(entries) != size:
            raise CommandError(
                f"{folder_of_data / name} has {len(entries)} entries with fairseq's own, and the model "
                f"{size}: give the folder of the checkpoint's data as `data`."
            )
    if len(names) > 1 and symbols[0] == symbols[1]:
        del symbols[1]
    for name, entries in zip(("vocabulary.json", "target_vocabulary.json"), symbols):
        write_json(folder / name, entries)
    if sentencepiece is not None:
        shutil.copyfile(sentencepiece, folder / "sentencepiece.model")
    (folder / CODE).write_text(text_of(CODE), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", _config(architecture))
    return told(names, symbols, sentencepiece)


def _languages(task: Mapping[str, Any], data: Path) -> Tuple[Any, Any]:
    """Source and target; without -s and -t fairseq infers them from the data, and the checkpoint has none."""
    source, target = task.get("source_lang"), task.get("target_lang")
    if (source is None or target is None) and data.is_dir():
        return infer_language_pair(str(data))
    return source, target


def told(names: List[str], symbols: List[List[str]], sentencepiece: Optional[str]) -> str:
    """What was written, of dictionaries with these names and entries; and what words would be unknown to."""
    if sentencepiece is not None:
        return f"tokenizer of {' and '.join(names)} and SentencePiece"
    warning = ""
    if any(entry.startswith("\u2581") for entries in symbols for entry in entries):
        warning = (
            ", whose entries are SentencePiece's: give --sentencepiece, the model that has made them, or "
        )
        warning += "most words will be <unk>"
    return f"tokenizer of {' and '.join(names)}{warning}"


def _symbols(path: Path, kind: str) -> List[str]:
    """The entries of a dictionary in fairseq's order, to which its masked language models add one."""
    entries = list(Dictionary.load(str(path)).symbols)
    return [*entries, MASK] if kind == "masked_lm" else entries


def _config(architecture: Architecture) -> Dict[str, Any]:
    first = END if architecture.first_token == EOS else BEGIN
    begins = {"causal_lm": first, "masked_lm": BEGIN, "seq2seq": None}
    return {
        "tokenizer_class": "EvoMoETokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_evomoe.EvoMoETokenizer", None]},
        "begin": begins[architecture.kind],
        "end": None if architecture.kind == "causal_lm" else END,
        "padding_side": "left" if architecture.kind == "causal_lm" else "right",
        "bos_token": BEGIN,
        "pad_token": "<pad>",
        "eos_token": END,
        "unk_token": "<unk>",
        "mask_token": MASK if architecture.kind == "masked_lm" else None,
    }
