"""Experts on TensorBoard and Weights & Biases: their load, where they come from, and when they spawn.

fairseq itself shows its statistics there (``--tensorboard-logdir``, ``--wandb-project``), those of the MoE
layers among them (``moe_...``).  What is added are pictures of single experts.
"""

from functools import partial
from typing import Any, Callable, Dict, List, Protocol

from fairseq.dataclass.configs import CommonConfig
from fairseq.logging import progress_bar

Record = Dict[str, Any]
"""A line of ``checkpoints/trace_file.py``."""


class Board(Protocol):
    """Shows records."""

    def tell(self, record: Record) -> None:
        """Show a record of kind ``update`` or ``experts``; others are none of its business."""


def boards_of(cfg: CommonConfig) -> List[Callable[[], Board]]:
    """What begins those that a run has, and whose packages are installed.

    fairseq itself warns of one that is not.  All ranks know of them, and one begins them: TensorBoard follows
    the last file of a folder alone, which would be any rank's.
    """
    boards: List[Callable[[], Board]] = []
    if cfg.tensorboard_logdir and getattr(progress_bar, "SummaryWriter", None) is not None:
        boards.append(partial(TensorBoard, cfg.tensorboard_logdir))
    if cfg.wandb_project and getattr(progress_bar, "wandb", None) is not None:
        boards.append(partial(WeightsAndBiases, progress_bar.wandb))
    return boards


class TensorBoard:
    """Histograms of loads, and changes of experts as text and numbers, in a run named ``moe``.

    Args:
        folder: ``--tensorboard-logdir``.
    """

    def __init__(self, folder: str) -> None:
        # fairseq's own, which is closed when the process ends
        self.writer = progress_bar.TensorboardProgressBarWrapper(None, folder)._writer("moe")

    def tell(self, record: Record) -> None:
        """See ``Board``."""
        if record["kind"] == "update":
            for name, layer in record["layers"].items():
                self._load(name, layer["load"], record["update"])
                if layer["probe"] is not None and layer["probe"]["drift"] is not None:
                    self.writer.add_scalar(f"drift/{name}", layer["probe"]["drift"], record["update"])
        elif record["kind"] == "experts":
            self.writer.add_text("experts", in_words(record), record["update"])
            for name, layer in record["layers"].items():
                self.writer.add_scalar(f"experts/{name}", len(layer["parents"]), record["update"])
                self.writer.add_scalar(f"generations/{name}", max(layer["generations"]), record["update"])
        self.writer.flush()

    def _load(self, name: str, load: List[int], update: int) -> None:
        """A bin for each expert."""
        numbers = range(len(load))
        self.writer.add_histogram_raw(
            f"load/{name}",
            min=-0.5,
            max=len(load) - 0.5,
            num=sum(load),
            sum=float(sum(e * n for e, n in zip(numbers, load))),
            sum_squares=float(sum(e * e * n for e, n in zip(numbers, load))),
            bucket_limits=[e + 0.5 for e in numbers],
            bucket_counts=load,
            global_step=update,
        )


class WeightsAndBiases:
    """The same in the run that fairseq has begun.

    Args:
        wandb: the package.
    """

    def __init__(self, wandb: Any) -> None:
        self.wandb = wandb

    def tell(self, record: Record) -> None:
        """See ``Board``."""
        shown: Dict[str, Any] = {}
        if record["kind"] == "update":
            for name, layer in record["layers"].items():
                edges = [e - 0.5 for e in range(len(layer["load"]) + 1)]
                shown[f"moe/load/{name}"] = self.wandb.Histogram(np_histogram=(layer["load"], edges))
                if layer["probe"] is not None and layer["probe"]["drift"] is not None:
                    shown[f"moe/drift/{name}"] = layer["probe"]["drift"]
        elif record["kind"] == "experts":
            shown["moe/event"] = self.wandb.Html(f"<p>{in_words(record)}</p>")
            for name, layer in record["layers"].items():
                shown[f"moe/experts/{name}"] = len(layer["parents"])
                shown[f"moe/generations/{name}"] = max(layer["generations"])
        if shown and self.wandb.run is not None:
            # a step that has passed already is refused, and this one fairseq has not logged yet
            self.wandb.log(shown, step=record["update"] + (record["kind"] == "experts"))


def in_words(record: Record) -> str:
    """A change of experts as a sentence."""
    layers = "; ".join(
        f"{name}: {len(layer['parents'])} experts, of parents {' '.join(map(str, layer['parents']))}"
        for name, layer in record["layers"].items()
    )
    return f"Experts changed before update {record['update']}: {layers}."
