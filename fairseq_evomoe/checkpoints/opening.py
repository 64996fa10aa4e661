"""What a checkpoint says of itself, without reading what its tensors hold."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from . import recovery
from .files import CommandError
from .guessed_layout import guessed_keys
from .index import EXPERTS, INDEX, Index, is_expert
from .saved_optimizer import LAYOUT, Layout
from .saved_options import SavedOptions


@dataclass
class Opened:
    """A checkpoint in one file or several.

    Attributes:
        state: what the first file holds, with all experts; tensors may be in the file still, or have a shape
            and no values (those of experts in several files).
        files: where its files are.
        layout: of the optimizer's state; ``None`` if it does not say it.
        statistics: the optimizer's statistics of experts in several files, which ``state`` lacks.
    """

    state: Dict[str, Any]
    files: List[str]
    layout: Optional[Layout] = None
    statistics: List[Tensor] = field(default_factory=list)

    @property
    def model(self) -> Dict[str, Tensor]:
        """The model's tensors."""
        return self.state["model"]

    def parameters(self) -> Dict[str, Tensor]:
        """Those of them that are parameters, shared ones once."""
        trained = [] if self.layout is None else [key for key in self.layout.keys if key in self.model]
        if trained and not SavedOptions(self.state).given.get("freeze"):
            return {key: self.model[key] for key in trained}
        known = dict.fromkeys([*trained, *(key for key in self.model if is_expert(key))])
        return {key: self.model[key] for key in guessed_keys(self.model, list(known))}

    def optimizer_tensors(self) -> List[Tensor]:
        """The optimizer's statistics of parameters."""
        state = (self.state.get("last_optimizer_state") or {}).get("state") or {}
        found = [x for each in state.values() if isinstance(each, dict) for x in each.values()]
        return [x for x in found if torch.is_tensor(x) and x.dim() > 0] + self.statistics


def open_checkpoint(path: str) -> Opened:
    """Open a checkpoint of fairseq's, in one file or several; a few kilobytes are read with torch >= 2.1.

    Raises:
        CommandError: there is none, or it is no checkpoint.
        DamagedCheckpoint: a file is missing, cannot be read or is from another checkpoint.
    """
    if not Path(path).exists():
        raise CommandError(f"There is no checkpoint {path}.")
    files = recovery.files_of_checkpoint(path) or [path]
    state = recovery.load(path)
    if not isinstance(state.get("model"), dict):
        raise CommandError(f"{path} is no checkpoint of fairseq's: it has no model.")
    saved = state.get(LAYOUT)
    opened = Opened(state, files, None if saved is None else Layout.from_dict(saved))
    if INDEX in state:
        _add_experts(opened, Index.from_dict(state[INDEX], path))
    return opened


def _add_experts(opened: Opened, index: Index) -> None:
    """Let the state have experts of the shapes that those of all files have together."""
    opened.layout = index.layout
    parts = [recovery.peek(file)[EXPERTS] for file in opened.files]
    extra = opened.state.get("extra_state") or {}
    kinds = {
        "model": opened.model,
        "ema": extra.get("ema") or {},
        "ema_fp32": extra.get("ema_fp32_params") or {},
    }
    for kind, tensors in kinds.items():
        for key in parts[0].get(kind) or {} if tensors else ():
            rows = [part[kind][key] for part in parts]
            tensors[key] = rows[0].new_empty((sum(map(len, rows)), *rows[0].shape[1:]))
    opened.statistics = [x for part in parts for each in part["optimizer"].values() for x in each.values()]


def size_of(files: List[str]) -> int:
    """Bytes of some files."""
    return sum(os.path.getsize(file) for file in files)
