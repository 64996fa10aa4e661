"""Files of checkpoints, read and written outside a run."""

import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

from . import recovery, shards, storage
from .index import INDEX


class CommandError(ValueError):
    """A command cannot be carried out; one sentence that tells why and what to do."""


def check_outputs(outputs: List[str], checkpoint: Optional[str], force: bool) -> None:
    """Refuse files to write that cannot be written, or that are there already.

    Args:
        outputs: the files, the first of a set first.
        checkpoint: what is read to make them, of which no file is ever replaced; ``None``: no checkpoint.
        force: whether other files may be.

    Raises:
        CommandError: what is in the way.
    """
    out = outputs[0]
    folder = Path(out).resolve().parent
    if not folder.is_dir():
        raise CommandError(f"The folder of `out` {out} does not exist: create it.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"The folder of `out` {out} cannot be written to: give another.")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise CommandError(f"There is no checkpoint {checkpoint}.")
    inputs = [] if checkpoint is None else [checkpoint, *recovery.files_of_checkpoint(checkpoint)]
    there = [path for path in [*outputs, *recovery.parts_of(out)] if os.path.lexists(path)]
    for path in there:
        if any(os.path.exists(path) and os.path.samefile(path, file) for file in inputs):
            raise CommandError(
                f"`out` {path} is a file of the checkpoint itself, which would be lost: give another name."
            )
        if os.path.isdir(path):
            raise CommandError(f"`out` {path} is a folder: give the name of a file.")
        if not force:
            raise CommandError(f"`out` {path} is there already: give another name, or `force` to replace it.")


def save(files: Iterable[Tuple[str, Dict[str, Any]]], first: str) -> List[str]:
    """Write the files of a checkpoint: they are all there at the end, or what was there before still is.

    Args:
        files: path and content of each.
        first: path of the first of the set.

    Returns:
        the paths, the first first.

    Raises:
        CommandError: they cannot be written.
    """
    recovery.settle_all(first)
    paths: List[str] = []
    try:
        for path, content in files:
            paths.append(path)
            storage.write(content, path + storage.TEMPORARY)
        storage.flush_folders(paths)
        storage.rename(first)  # as saving.py does: from now on the set is there
    except BaseException as error:
        storage.remove(path + storage.TEMPORARY for path in paths)
        if isinstance(error, (OSError, RuntimeError)):
            reason = str(error).rstrip(".")
            raise CommandError(
                f"The checkpoint cannot be written to {(paths or [first])[-1]}: {reason}."
            ) from error
        raise
    paths = [first, *(path for path in reversed(paths) if path != first)]
    storage.flush_folders([first])
    for path in paths[1:]:
        storage.rename(path)
    storage.flush_folders(paths)
    storage.remove(set(recovery.parts_of(first)) - set(paths))
    return paths


def load(path: str) -> Dict[str, Any]:
    """A checkpoint with all experts, from one file or several, checked to the last bit; on the CPU.

    Raises:
        CommandError: there is none.
        DamagedCheckpoint: one of the files is missing, damaged or from another checkpoint.
    """
    if not Path(path).is_file():
        raise CommandError(f"There is no checkpoint {path}.")
    recovery.check(path)
    state = recovery.load(path)
    if INDEX in state:
        shards.assemble(state, path)
    return state


def is_in_several_files(path: str) -> bool:
    """Whether a checkpoint is the first file of a set.

    Raises:
        CommandError: there is none.
        DamagedCheckpoint: it cannot be read, or is not the first file.
    """
    if not Path(path).is_file():
        raise CommandError(f"There is no checkpoint {path}.")
    recovery.files_of_checkpoint(path)
    return INDEX in recovery.peek(path)
