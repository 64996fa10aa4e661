"""What ``evomoe doctor`` tries in a process of its own: imports, devices, ranks and a toy training.

    python doctor_steps.py USER_DIR FOLDER

Each step is told before it begins, and then what it has found or its error, as a line of JSON, so that it is
known where a process was that died.
"""

import json
import os
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

TOY = {
    "task": "language_modeling",
    "arch": "evomoe_lm_tiny",
    "criterion": "evomoe_cross_entropy",
    "optimizer": "adam",
    "lr": "0.005",
    "tokens-per-sample": "16",
    "batch-size": "8",
    "max-update": "6",
    "moe-experts": "4",
    "moe-spawn-update": "2",
    "moe-anneal-updates": "2",
    "moe-hard-update": "3",
    "log-format": "none",
    "num-workers": "0",
    "save-interval-updates": "3",
}
TOY_SWITCHES = ["disable-validation", "no-epoch-checkpoints"]


def try_torch() -> Dict[str, Any]:
    """It is imported, and multiplies."""
    import torch

    torch.randn(8, 8) @ torch.randn(8, 8)
    torch.zeros(2).numpy()
    return {"version": str(torch.__version__), "threads": torch.get_num_threads()}


def try_gpu() -> Dict[str, Any]:
    """Each GPU multiplies."""
    import torch

    devices = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        x = torch.randn(64, 64, device=f"cuda:{number}")
        (x @ x).sum().item()
        capability = f"{properties.major}.{properties.minor}"
        devices.append(
            {"name": properties.name, "gigabytes": properties.total_memory / 1e9, "capability": capability}
        )
    return {"devices": devices, "built": torch.version.cuda}


def try_ranks() -> Dict[str, Any]:
    """A group of one process adds up."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return {"backends": [], "gpus": torch.cuda.device_count()}
    known = {"gloo": getattr(dist, "is_gloo_available", lambda: True), "nccl": dist.is_nccl_available}
    backends = [name for name, is_available in known.items() if is_available()]
    if "gloo" in backends:
        path = os.path.join(os.getcwd(), "ranks")
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
    return {"backends": backends, "gpus": torch.cuda.device_count()}


def try_fairseq() -> Dict[str, Any]:
    """It is imported, with its command line."""
    import fairseq
    import fairseq_cli.train  # type: ignore[import-untyped]  # noqa: F401

    return {"version": str(fairseq.__version__), "folder": os.path.dirname(fairseq.__file__)}


def try_plugin(user_dir: str) -> Dict[str, Any]:
    """The package is imported as ``--user-dir`` does it."""
    from argparse import Namespace

    import torch
    from fairseq.models import MODEL_REGISTRY
    from fairseq.utils import import_user_module

    import_user_module(Namespace(user_dir=user_dir))
    package = sys.modules.get("fairseq_evomoe")
    if package is None:
        raise ImportError("the --user-dir does not import fairseq_evomoe")
    from fairseq_evomoe import patching
    from fairseq_evomoe.moe.dispatch.local import way
    from fairseq_evomoe.moe.routers import ROUTERS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mended = [each.name[len("compat.") :] for each in patching.applied() if each.name.startswith("compat.")]
    return {
        "models": [name for name in MODEL_REGISTRY if name.startswith("evomoe")],
        "routers": sorted(ROUTERS),
        "mended": [name for name in dict.fromkeys(mended) if not name.startswith("_")],
        "way": way(device),
    }


def try_training(user_dir: str) -> Dict[str, Any]:
    """``fairseq-train`` on made-up words: one expert, the spawn, top-1, a checkpoint, which is resumed."""
    import torch
    from fairseq_cli import preprocess, train

    with open("text", "w", encoding="utf-8") as file:
        for line in range(40):
            file.write(" ".join(f"w{(line * word) % 23}" for word in range(1, 20)) + "\n")
    arguments = "--only-source --trainpref text --validpref text --destdir data --workers 1".split()
    _call(preprocess.cli_main, "fairseq-preprocess", arguments)
    flags = ["data", "--user-dir", user_dir, "--save-dir", "checkpoints"]
    flags += [word for name, value in TOY.items() for word in (f"--{name}", value)]
    flags += [f"--{name}" for name in TOY_SWITCHES] + ["--cpu"] * (not torch.cuda.is_available())
    start = time.perf_counter()
    _call(train.cli_main, "fairseq-train", flags)
    _call(train.cli_main, "fairseq-train", [*flags, "--max-update", "7"])
    state = torch.load("checkpoints/checkpoint_last.pt", map_location="cpu")
    updates = state["optimizer_history"][-1]["num_updates"]
    if updates != 7 or not any(".moe.router." in key for key in state["model"]):
        raise RuntimeError(f"the checkpoint is of update {updates}, or its experts have not spawned")
    return {
        "updates": updates,
        "device": "GPU" if torch.cuda.is_available() else "CPU",
        "seconds": time.perf_counter() - start,
    }


def _call(function: Callable[[], Any], name: str, arguments: List[str]) -> None:
    sys.argv = [name, *arguments]
    function()


def _tell(**values: Any) -> None:
    print(json.dumps(values), file=_output, flush=True)


def main(user_dir: str) -> None:
    """All steps; one that needs another that has failed is left out."""
    steps: Dict[str, Tuple[Callable[[], Dict[str, Any]], str]] = {
        "torch": (try_torch, ""),
        "gpu": (try_gpu, "torch"),
        "ranks": (try_ranks, "torch"),
        "fairseq": (try_fairseq, "torch"),
        "plugin": (lambda: try_plugin(user_dir), "fairseq"),
        "training": (lambda: try_training(user_dir), "plugin"),
    }
    fine = {""}
    for name, (step, needed) in steps.items():
        if needed not in fine:
            continue
        _tell(step=name, begins=True)
        try:
            found = step()
            fine.add(name)
            _tell(step=name, **found)
        except (Exception, SystemExit) as error:
            text = str(error).strip().splitlines()
            _tell(step=name, error=f"{type(error).__name__}: {text[-1] if text else ''}".rstrip(": "))


if __name__ == "__main__":
    _output = os.fdopen(os.dup(1), "w")  # what others print goes where errors go
    os.dup2(2, 1)
    sys.path[0] = ""  # not the folder of this file, whose modules have names that others may look for
    main(*sys.argv[1:2])
