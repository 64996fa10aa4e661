"""Seconds of an update, measured with fairseq's own Trainer, and what the model has in it."""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, NamedTuple, Sequence

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import make_builder
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from ..config.config import MoEConfig
from ..evolution.cost import Layer
from ..models.feed_forward import moe_layers
from .in_process import Training

WARM_UP = 2
"""Updates before those that are timed."""


@dataclass(frozen=True)
class Sizes:
    """A causal language model, where no command of fairseq's is given.

    Attributes:
        layers: number of its layers, of which every second has experts.
        dim: width of a token.
        ffn_dim: hidden units of the feed-forward networks that become base experts.
        vocabulary: entries of the dictionary.
        tokens: of an update.
        sequence: tokens of a sequence.
    """

    layers: int = 6
    dim: int = 512
    ffn_dim: int = 2048
    vocabulary: int = 8000
    tokens: int = 4096
    sequence: int = 128

    @property
    def heads(self) -> int:
        """Of attention, each as wide as the others and of 64 or a little more."""
        return max(heads for heads in range(1, max(self.dim // 64, 1) + 1) if self.dim % heads == 0)

    def flags(self, data: Path) -> List[str]:
        """The flags of ``fairseq-train`` for it, on data that ``write_data`` has made."""
        sizes = {
            "layers": self.layers,
            "embed-dim": self.dim,
            "input-dim": self.dim,
            "output-dim": self.dim,
            "ffn-embed-dim": self.ffn_dim,
            "attention-heads": self.heads,
        }
        flags = [str(data), "--task", "language_modeling", "--arch", "evomoe_lm"]
        flags += ["--criterion", "evomoe_cross_entropy", "--share-decoder-input-output-embed"]
        flags += [word for name, size in sizes.items() for word in (f"--decoder-{name}", str(size))]
        flags += ["--tokens-per-sample", str(self.sequence), "--sample-break-mode", "none"]
        flags += ["--batch-size", str(max(self.tokens // self.sequence, 1))]
        return [*flags, "--optimizer", "adam", "--lr", "0.0001"]

    def write_data(self, folder: Path, updates: int) -> None:
        """Write random text that is long enough for so many updates, as ``fairseq-preprocess`` does."""
        dictionary = Dictionary()
        for number in range(self.vocabulary - len(dictionary)):
            dictionary.add_symbol(f"w{number}")
        dictionary.save(str(folder / "dict.txt"))
        draw = torch.Generator().manual_seed(1)
        shape = (updates * self.tokens // self.sequence + 1, self.sequence)
        ids = torch.randint(dictionary.nspecial, len(dictionary), shape, generator=draw)
        builder = make_builder(str(folder / "train.bin"), impl="mmap", vocab_size=len(dictionary))
        for row in ids.int():
            builder.add_item(row)
        builder.finalize(str(folder / "train.idx"))


@dataclass(frozen=True)
class Measured:
    """What a model has and how long its updates take.

    Attributes:
        seconds: of each update that was timed.
        experts: parameters of the experts that are on this rank.
        others: all other parameters.
        layers: the MoE layers.
        tokens: of an update, as the criterion counts them.
        active: experts that a token has, in the mean.
    """

    seconds: List[float]
    experts: int
    others: int
    layers: List[Layer]
    tokens: float
    active: float

    @property
    def median(self) -> float:
        """Seconds of an update."""
        return statistics.median(self.seconds)


class Configured(NamedTuple):
    """What flags of ``fairseq-train`` mean for the MoE layers.

    Attributes:
        config: their options.
        ffn_dim: hidden units of the feed-forward networks in their place, the widest of them.
    """

    config: MoEConfig
    ffn_dim: int


def configured(flags: Sequence[str]) -> Configured:
    """What the flags of ``fairseq-train`` mean for the MoE layers.

    Raises:
        ConfigError: contradictions.
        OSError: there is no such data.
    """
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=list(flags))
    cfg = convert_namespace_to_omegaconf(args)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    return Configured(model.moe_config, max((layer.ffn_dim for _, layer in moe_layers(model)), default=0))


def measure(flags: Sequence[str], seconds: float, least: int = 3) -> Measured:
    """Time updates of the run that these flags describe, on its own data.

    Args:
        flags: of ``fairseq-train``, the folder of the data first.
        seconds: for how long updates are timed.
        least: how many are at least.
    """
    training = Training(flags, load=False)
    log = training.update(WARM_UP).logs[-1]
    found: List[float] = []
    while len(found) < least or sum(found) <= seconds:
        made = training.update()
        found.append(made.seconds)
        log = made.logs[-1] or log
    return _measured(training.model, found, log)


def _measured(model: Any, seconds: List[float], log: Any) -> Measured:
    experts, layers = 0, []
    for _, layer in moe_layers(model):
        moe = layer.moe
        experts += sum(p.numel() for p in moe.experts.parameters())
        widths = moe.experts.widths
        matrices = 3 if moe.experts.gated else 2
        layers.append(Layer(moe.experts.dim, round(sum(widths) / len(widths)), moe.num_experts, matrices))
    others = sum(p.numel() for p in model.parameters()) - experts
    tokens = float(log.get("sample_size", 0) or log.get("ntokens", 0))
    return Measured(seconds, experts, others, layers, tokens, float(log.get("moe_experts", 1) or 1))


def temporary_data(sizes: Sizes, updates: int) -> "tempfile.TemporaryDirectory[str]":
    """A folder with random text, which goes with the object."""
    folder = tempfile.TemporaryDirectory(prefix="evomoe-plan-")
    sizes.write_data(Path(folder.name), updates)
    return folder
