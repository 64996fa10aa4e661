"""A folder that is there as a whole or not at all, and the tensors in it.

``model.safetensors``, or several files of at most 5 GB and ``model.safetensors.index.json``, as transformers
names them.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, List, Mapping

from torch import Tensor

from ..files import CommandError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MARK = {"written_by": "fairseq_evomoe"}
"""In the metadata of files of tensors, so that nobody else's are replaced."""
_EXPORTED = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_|tokenizer_)?config\.json"
    r"|(target_)?vocabulary\.json|sentencepiece\.model|\w+\.py|__pycache__"
)
"""The names of what exports write."""
MOST_BYTES = 5 * 10**9
"""How large a file of tensors becomes, unless a single tensor is larger."""


def safetensors() -> ModuleType:
    """The library of that name, for PyTorch.

    Raises:
        CommandError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise CommandError(
            "safetensors is not installed, which writes and reads the weights: pip install "
            "'fairseq-evomoe[export]', or safetensors alone."
        ) from error
    return safetensors.torch


@contextlib.contextmanager
def written(out: str, force: bool) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written.

    Args:
        out: its name.
        force: whether a folder that an export has written may be replaced.

    Raises:
        CommandError: it cannot be written.
    """
    check_folder(out, force)
    target = Path(out).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except OSError as error:
        raise CommandError(f"The folder `out` {out} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def check_folder(out: str, force: bool) -> None:
    """Refuse a folder that cannot be written, or is there already; see ``written``."""
    target = Path(out).resolve()
    if not target.parent.is_dir():
        raise CommandError(f"The folder in which `out` {out} is to be does not exist: create it.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise CommandError(f"The folder in which `out` {out} is to be cannot be written to: give another.")
    if not os.path.lexists(out):
        return
    if not force:
        raise CommandError(f"`out` {out} is there already: give another name, or `force` to replace it.")
    if not target.is_dir() or not any(map(_is_ours, target.glob("model*.safetensors"))):
        raise CommandError(
            f"`out` {out} is no folder that an export has written, and is not replaced: give another name."
        )
    others = sorted(entry.name for entry in target.iterdir() if not _EXPORTED.fullmatch(entry.name))
    if others:
        raise CommandError(
            f"`out` {out} has {others[0]}, which no export has written, and is not replaced: move that away, "
            "or give another name."
        )


def _is_ours(path: Path) -> bool:
    """Whether an export has written a file of tensors."""
    try:
        with safetensors().safe_open(path, "pt") as file:
            return MARK.items() <= (file.metadata() or {}).items()
    except Exception:  # safetensors has errors of its own, and then it is not known
        return False


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> List[str]:
    """Write tensors of any names; none shares its memory with another in the files.

    Returns:
        the names of the files.
    """
    save_file, parts = safetensors().save_file, _parts(tensors, MOST_BYTES)
    names = [SINGLE]
    if len(parts) > 1:
        names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for name, keys in zip(names, parts):
        copies = {key: tensors[key].detach().clone().contiguous() for key in keys}
        save_file(copies, folder / name, metadata={"format": "pt", **MARK})
    if len(parts) == 1:
        return names
    total = sum(_bytes(tensor) for tensor in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, keys in zip(names, parts) for key in keys},
    }
    write_json(folder / INDEX, index)
    return [*names, INDEX]


def _parts(tensors: Mapping[str, Tensor], most: int) -> List[List[str]]:
    """The names of tensors for each file, in their order."""
    parts: List[List[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if parts[-1] and size + _bytes(tensor) > most:
            parts.append([])
            size = 0
        parts[-1].append(key)
        size += _bytes(tensor)
    return parts


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def read_tensors(folder: Path) -> Dict[str, Tensor]:
    """The tensors of a folder, on the CPU.

    Raises:
        CommandError: one of the files is missing or damaged.
    """
    load_file, names = safetensors().load_file, [SINGLE]
    try:
        if not (folder / SINGLE).is_file():
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        tensors: Dict[str, Tensor] = {}
        for name in names:
            tensors.update(load_file(folder / name))
    except FileNotFoundError as error:
        raise CommandError(f"{folder} has no whole model: {error.filename or error} is missing.") from error
    except Exception as error:  # safetensors has errors of its own
        raise CommandError(f"The tensors in {folder} cannot be read: {error}.") from error
    return tensors


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON for people, too."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
