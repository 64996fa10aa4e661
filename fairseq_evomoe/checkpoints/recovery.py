"""Whether a checkpoint is whole, and which one a run goes on from when it is not."""

import contextlib
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional

from fairseq.file_io import PathManager
from torch import Tensor

from ..moe.sharding import rows_per_expert
from . import storage
from .index import (
    EXPERTS,
    INDEX,
    NUMBER,
    DamagedCheckpoint,
    Index,
    UnreadableCheckpoint,
    is_expert,
    layer_of,
    name_of,
    path_of,
    places_of,
    suffix_of,
)

UNUSABLE = (DamagedCheckpoint, UnreadableCheckpoint)
"""What is raised of a checkpoint that is not whole."""


def explanation(path: str, error: Exception) -> Exception:
    """What to raise in place of an error of reading a file, which is named in one sentence."""
    local = _local(path)
    if isinstance(error, UNUSABLE):
        return error
    if isinstance(error, PermissionError) or (os.path.exists(local) and not os.access(local, os.R_OK)):
        return UnreadableCheckpoint(f"{path} cannot be read: its permissions do not let you.")
    if os.path.isdir(local):
        return DamagedCheckpoint(f"{path} is a folder: give a file.")
    return DamagedCheckpoint(f"{path} cannot be read: it is truncated or damaged, or no checkpoint.")


def peek(path: str) -> Dict[str, Any]:
    """What a file of a checkpoint holds; tensors have shapes and no values.

    Raises:
        DamagedCheckpoint: it cannot be read.
        UnreadableCheckpoint: it must not be.
    """
    try:
        state = storage.skim(_local(path))
    except Exception as error:  # whatever unpickling other bytes leads to
        raise explanation(path, error) from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path} cannot be read: it is no checkpoint of fairseq's.")
    return state


def load(path: str) -> Dict[str, Any]:
    """What a file of a checkpoint holds, on the CPU, with nothing in it executed.

    Raises:
        DamagedCheckpoint: it cannot be read, or holds something that no checkpoint needs.
        UnreadableCheckpoint: it must not be read.
    """
    try:
        state = storage.load(_local(path))
    except pickle.UnpicklingError as error:
        raise DamagedCheckpoint(
            f"{path} is refused: it holds objects that no checkpoint needs, and nothing in it is executed."
        ) from error
    except Exception as error:
        raise explanation(path, error) from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path} cannot be read: it is no checkpoint of fairseq's.")
    return state


def check_first(state: Dict[str, Any], path: str) -> None:
    """Refuse what is not the first file of a set, or has lost its index.

    Args:
        state: what a file holds.
        path: of the file.

    Raises:
        DamagedCheckpoint: one sentence that says what to give.
    """
    if state.get(NUMBER, 0) != 0:
        raise DamagedCheckpoint(
            "{} has a part of the experts of a checkpoint: give its first file, without {} in its "
            "name.".format(path, suffix_of(1)[:-1] + "N")
        )
    model = state.get("model")
    model = model if isinstance(model, dict) else {}
    without = [key for key, x in model.items() if is_expert(key) and isinstance(x, Tensor) and not x.numel()]
    if INDEX not in state and (NUMBER in state or EXPERTS in state or without):
        raise DamagedCheckpoint(
            f"{path} is the first file of a checkpoint in several files and has no index of them: it is "
            "damaged."
        )


def find_file(path: str, index: Index, number: int) -> str:
    """Where a file of a set is, on this machine.

    Args:
        path: of the set's first file.
        index: what that says.
        number: of the file, not the first.

    Raises:
        DamagedCheckpoint: it is missing, damaged or of another set.
    """
    errors: List[Exception] = []
    for place in places_of(path, number):
        if not PathManager.exists(place):
            continue
        try:
            state = peek(place)
            _check_part(state, place, path, index, number)
            return _local(place)
        except UNUSABLE as error:
            errors.append(error)
    if errors:
        raise errors[0]
    raise DamagedCheckpoint(
        f"{path_of(path, number)} is missing: the checkpoint has {index.files} files, which belong together."
    )


def _check_part(state: Dict[str, Any], place: str, path: str, index: Index, number: int) -> None:
    if INDEX not in state or not isinstance(state.get(EXPERTS), dict):
        raise DamagedCheckpoint(f"{place} is no part of a checkpoint in several files, as {path} is.")
    own = Index.from_dict(state[INDEX], place)
    if own.name != index.name:
        raise DamagedCheckpoint(
            f"{place} belongs to another checkpoint (update {own.update}) than {path} (update "
            f"{index.update}): put the files of one checkpoint there."
        )
    if state.get(NUMBER) != number or not own.is_of_same_set(index):
        raise DamagedCheckpoint(f"{place} and {path} contradict each other: one of them is damaged.")
    check_rows(state[EXPERTS].get("model"), index, number, place)


def check_rows(model: Any, index: Index, number: int, path: str) -> None:
    """Refuse a file whose tensors are not those of the experts that the index says it has.

    Args:
        model: tensors of its experts by key.
        index: of the set.
        number: of the file.
        path: of the file.

    Raises:
        DamagedCheckpoint: it has other experts.
    """
    model = model if isinstance(model, dict) else {}
    for layer, widths in index.widths.items():
        own = {key: x for key, x in model.items() if is_expert(key) and layer_of(key) == layer}
        units = [widths[expert] for expert in index.experts_of[layer][number]]
        if not own or any(len(x) != sum(rows_per_expert(name_of(key), units)) for key, x in own.items()):
            raise DamagedCheckpoint(
                f"{path} has other experts of {layer} than the checkpoint's index says: it is damaged."
            )


def files_of_checkpoint(path: str) -> List[str]:
    """Where the files of a checkpoint are on this machine, if they are all there and belong together.

    This reads a few kilobytes of each.

    Raises:
        DamagedCheckpoint: they are not.
    """
    if _is_old(_local(path)):
        return []  # there is nothing in it that could be checked
    state = peek(path)
    check_first(state, path)
    if not isinstance(state.get("model"), dict):
        raise DamagedCheckpoint(f"{path} cannot be read: it is no checkpoint of fairseq's.")
    if INDEX not in state:
        return [_local(path)]
    index = Index.from_dict(state[INDEX], path)
    check_rows((state.get(EXPERTS) or {}).get("model"), index, 0, path)
    return [_local(path)] + [find_file(path, index, number) for number in range(1, index.files)]


def check_sums(path: str) -> None:
    """Refuse a file in which a bit is not what was written: one gigabyte takes 0.4 s.

    Raises:
        DamagedCheckpoint: its name, and what is damaged.
    """
    try:
        broken = storage.broken_record(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise explanation(path, error) from error
    if broken is not None:
        raise DamagedCheckpoint(f"{path} is damaged: its {broken} is not what was written.")


def check(path: str) -> None:
    """Refuse a checkpoint that is not whole, to the last bit.

    Raises:
        DamagedCheckpoint: what is wrong with it.
        UnreadableCheckpoint: it must not be read.
    """
    for file in files_of_checkpoint(path):
        check_sums(file)


def fault_of_file(path: str) -> Optional[str]:
    """What is wrong with the bytes of one file; ``None``: nothing."""
    try:
        check_sums(path)
    except UNUSABLE as error:
        return str(error)
    return None


def fault(path: str) -> Optional[str]:
    """What is wrong with a checkpoint; ``None`` if it is whole."""
    try:
        check(path)
    except UNUSABLE as error:
        return str(error)
    return None


def newest_whole(path: str) -> Optional[str]:
    """The newest whole checkpoint in the folder of one that is not whole; ``None``: there is no other."""
    others = [file for file in Path(path).parent.glob("checkpoint*.pt") if file.is_file()]
    others = [file for file in others if file.resolve() != Path(path).resolve()]
    others.sort(key=lambda file: -file.stat().st_mtime)
    return next((str(file) for file in others if fault(str(file)) is None), None)


def settle(path: str, number: int) -> None:
    """Give a file of a set its name, if the rank that has written it died before it could.

    Args:
        path: of the first file, which has its name: with that the set is what is to be loaded.
        number: of the file, not the first.
    """
    target = path_of(path, number)
    if not os.path.exists(target + storage.TEMPORARY):
        return
    name = set_name(path)
    if name is not None and set_name(target + storage.TEMPORARY) == name:
        storage.rename(target)
        storage.flush_folders([target])


def settle_all(path: str) -> None:
    """As ``settle``, of all files of a local checkpoint; where nothing may be written, they stay."""
    with contextlib.suppress(OSError):
        for file in parts_of(path, storage.TEMPORARY):
            settle(path, int(re.findall(r"\d+", os.path.basename(file))[-1]))


def parts_of(path: str, ending: str = "") -> List[str]:
    """The files that have a name as parts of a set with a certain first file; ``ending`` is after theirs."""
    stem = path_of(path, 1)[: -len("1.pt")]
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return []
    name = re.compile(re.escape(os.path.basename(stem)) + r"\d+\.pt" + re.escape(ending))
    return [os.path.join(os.path.dirname(path), file) for file in os.listdir(folder) if name.fullmatch(file)]


def set_name(path: str) -> Optional[str]:
    """The name of the set that a file belongs to, ``None`` if it cannot be told."""
    try:
        return Index.from_dict(peek(path)[INDEX], path).name
    except (DamagedCheckpoint, UnreadableCheckpoint, KeyError):
        return None


def _local(path: str) -> str:
    return str(PathManager.get_local_path(path)) if PathManager.path_requires_pathmanager(path) else path


def _is_old(path: str) -> bool:
    """Whether a file is in the format of torch < 1.6, which has no sums."""
    try:
        with open(path, "rb") as file:
            return file.read(1) == b"\x80"
    except OSError:
        return False
