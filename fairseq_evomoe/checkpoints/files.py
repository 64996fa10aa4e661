"""Files of checkpoints, read and written outside a run."""

import contextlib
import os
from pathlib import Path
from typing import Any, Dict

import torch
from fairseq.checkpoint_utils import torch_persistent_save

from . import shards


class CommandError(ValueError):
    """A command cannot be carried out; one sentence that tells why and what to do."""


def save(state: Dict[str, Any], path: str) -> None:
    """Write a checkpoint as fairseq does: under another name first, so that none is ever half written.

    Raises:
        CommandError: it cannot be written; what was there before is still there.
    """
    try:
        torch_persistent_save(state, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        if isinstance(error, (OSError, RuntimeError)):
            raise CommandError(f"The checkpoint cannot be written to {path}: {error}.") from error
        raise


def load_file(path: str) -> Dict[str, Any]:
    """What a file of a checkpoint holds, on the CPU.

    Raises:
        CommandError: there is no such file, or it is no checkpoint.
    """
    if not Path(path).is_file():
        raise CommandError(f"There is no checkpoint {path}.")
    try:
        state = torch.load(path, map_location="cpu")
    except Exception as error:  # whatever unpickling other bytes leads to
        raise CommandError(f"{path} is not a checkpoint that can be read.") from error
    if not isinstance(state, dict):
        raise CommandError(f"{path} is no checkpoint of fairseq's.")
    return state


def load(path: str) -> Dict[str, Any]:
    """A checkpoint with all experts, from one file or several.

    Raises:
        CommandError: it is none.
        DamagedCheckpoint: one of the files is missing, damaged or from another checkpoint.
    """
    state = load_file(path)
    if shards.INDEX in state:
        shards.assemble(state, path)
    return state
