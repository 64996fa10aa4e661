"""A folder that ``export`` has written as a checkpoint of fairseq's again."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict

from ..files import CommandError
from .export import CONFIG
from .folder import read_tensors


def read_folder(path: str) -> Dict[str, Any]:
    """The checkpoint, without an optimizer's state.

    Args:
        path: the folder.

    Raises:
        CommandError: it is none that ``evomoe export --to hf`` has written.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        fairseq = config["fairseq"]
        tied, update = fairseq["tied"], fairseq["num_updates"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CommandError(
            f"{path} is no folder that evomoe export --to hf has written: its {CONFIG} is missing, or does "
            "not say what fairseq needs."
        ) from error
    tensors = read_tensors(folder)
    missing = sorted(set(tied.values()) - set(tensors))
    if missing:
        raise CommandError(f"{path} has no whole model: {missing[0]} is missing.")
    tensors.update({name: tensors[other] for name, other in tied.items()})
    cfg = {name: fairseq[name] for name in ("model", "task", "criterion") if name in fairseq}
    history = {"num_updates": int(update), "optimizer_name": "", "lr_scheduler_state": {}}
    return {
        "args": Namespace(**fairseq["args"]) if "args" in fairseq else None,
        "cfg": cfg or None,
        "model": tensors,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {},
    }
