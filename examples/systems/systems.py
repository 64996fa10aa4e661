"""The systems, which are presets of the package, and the commands that train and evaluate them."""

from __future__ import annotations

import re
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

PLUGIN = Path(__file__).resolve().parent.parent.parent / "fairseq_evomoe"
SCRIPTS = Path(sysconfig.get_path("scripts"))
sys.path.insert(0, str(PLUGIN.parent))

from fairseq_evomoe.config import presets  # noqa: E402
from fairseq_evomoe.config.errors import as_flags  # noqa: E402
from fairseq_evomoe.moe.options import OptionError  # noqa: E402

EXPERTS = {"moe_experts": 8, "moe_freq": 2}
"""What all systems have in common, but for those whose preset says how many experts it has."""
PHASES = {"moe_anneal_updates": "40%", "moe_hard_update": "48%"}
"""The Dense-To-Sparse gate's stages: the published 5000 updates are more than a run here may have. A preset
that says itself when routing becomes sparse keeps that."""
DENSE_WIDTHS = (1, 1.5, 2, 4.5, 6.5)
"""How wide the dense models are, in units of the others' feed-forward layers. With `EXPERTS` they have as
many active parameters as one expert a token (1), two (1.5) or two gated ones (2), or as many parameters as
eight experts (4.5) or eight gated ones (6.5). A gated expert has three matrices instead of two."""


class UnknownSystem(ValueError):
    """A system that there is not, or a file that does not describe one."""


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        id: name of its preset, or of the file of one without `.yaml`.
        name: what it is called.
        paper: where it was published.
        preset: what `--moe-preset` is given; empty: its options are all named.
        common: options that all systems have in common, which come first.
        options: further `moe_*` options.
        differs: what differs from the paper.
        dense: whether it is fairseq's model without experts.
        width: of a dense model's feed-forward layers, in units of the others'.
        dense_updates: how long a dense model is trained first, out of which the experts are made, as `50%`.
        dense_as: the option that is given that model's checkpoint.
        not_for: the tasks that it cannot do, each with the reason.
    """

    id: str
    name: str
    paper: str = ""
    preset: str = ""
    common: dict[str, Any] = field(default_factory=lambda: EXPERTS)
    options: dict[str, Any] = field(default_factory=dict)
    differs: str = ""
    dense: bool = False
    width: float = 1
    dense_updates: str = ""
    dense_as: str = "finetune_from_model"
    not_for: dict[str, str] = field(default_factory=dict)

    def flags(self) -> list[str]:
        """Its options as flags of `fairseq-train`."""
        if self.dense:
            return []
        preset = ["--moe-preset", self.preset] if self.preset else []
        return [*as_arguments(self.common), *preset, *as_arguments(self.options)]


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Options as flags; those that are false or `None` are left out."""
    result = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        result.append("--" + name.replace("_", "-"))
        if value is not True:
            result.append(str(value))
    return result


def share(percentage: str, updates: int) -> int:
    """`10%` of so many updates, at least one."""
    return max(round(float(percentage.rstrip("%")) / 100 * updates), 1)


def without_experts(flags: Sequence[str]) -> list[str]:
    """Flags of `fairseq-train` but for `--moe-...` and their values, which a dense model does not know."""
    kept, keep = [], True
    for flag in flags:
        keep = not flag.startswith("--moe-") and (keep or flag.startswith("--"))
        if keep:
            kept.append(flag)
    return kept


def dense(width: float = 1) -> System:
    """fairseq's own model, with feed-forward layers so many times as wide as the others'."""
    wider = "" if width == 1 else f", with feed-forward layers {width:g} times as wide"
    return System(
        id="dense" if width == 1 else f"dense_{width:g}x",
        name="Dense" + wider,
        paper="Vaswani et al., arXiv 1706.03762",
        differs=f"fairseq's own model of the same sizes and without experts{wider}, for reference.",
        dense=True,
        width=width,
    )


DENSE = dense()


def read(name: str) -> System:
    """A system by the name of its preset, or by the path of a file like those in the package.

    Dense models are `dense` and, of any width, `dense_1.5x`.

    Raises:
        UnknownSystem: a name that there is not, or a file that is no preset.
    """
    width = re.fullmatch(r"dense(?:_(\d+(?:\.\d+)?)x)?", name)
    if width:
        return dense(float(width.group(1) or 1))
    try:
        preset = presets.load(name)
    except OptionError as error:
        raise UnknownSystem(as_flags(str(error))) from error
    options = {key.replace("moe_", "", 1): value for key, value in preset.options.items()}
    return System(
        id=preset.id,
        name=preset.name,
        paper=preset.paper,
        preset=name if name in presets.names() else str(Path(name).resolve()),
        common={key: value for key, value in EXPERTS.items() if key[len("moe_") :] not in options},
        options=PHASES if options.get("router", "dts") == "dts" and "hard_update" not in options else {},
        differs=preset.differs,
        dense_updates=preset.dense_updates,
        dense_as=preset.dense_as,
        not_for=preset.not_for,
    )


def read_all(names: list[str]) -> list[System]:
    """Read systems by name, each once; `all` stands for all of them.

    Raises:
        UnknownSystem: a name that there is not.
    """
    known = [*(dense(width).id for width in DENSE_WIDTHS), *presets.names()]
    every = [one for name in names for one in (known if name == "all" else [name])]
    return [read(name) for name in dict.fromkeys(every)]


@dataclass(frozen=True)
class Task:
    """What all systems have in common on one of the tasks.

    Attributes:
        flags: of `fairseq-train`: the task, and the sizes of the model, of the batch and of the step.
        moe: architecture and criterion with experts.
        dense: architecture and criterion without.
        metric: what tells how good a system is.
        validation: the statistic of the validation that is the loss.
    """

    flags: str
    moe: str
    dense: str
    metric: str = "perplexity"
    validation: str = "valid_loss"


SIZES = "--{0}-layers 4 --{0}-embed-dim {1} --{0}-ffn-embed-dim {2} --{0}-attention-heads 4 "
SIZES += "--{0}-normalize-before "
BLOCKS = "--tokens-per-sample 64 --sample-break-mode none --lr 0.002 --lr-scheduler polynomial_decay "
TASKS = {
    "lm": Task(
        flags="--task language_modeling --batch-size 16 --batch-size-valid 64 --decoder-input-dim 64 "
        "--decoder-output-dim 64 --share-decoder-input-output-embed "
        + BLOCKS
        + SIZES.format("decoder", 64, 128),
        moe="--arch evomoe_lm --criterion evomoe_cross_entropy",
        dense="--arch transformer_lm --criterion cross_entropy",
    ),
    "masked_lm": Task(
        flags="--task masked_lm --mask-prob 0.15 --batch-size 32 --max-positions 256 --attention-dropout 0 "
        + BLOCKS
        + SIZES.format("encoder", 64, 128),
        moe="--arch evomoe_roberta --criterion evomoe_masked_lm",
        dense="--arch roberta --criterion masked_lm",
    ),
    "translation": Task(
        flags="--task translation --share-all-embeddings --max-tokens 2048 --label-smoothing 0.1 "
        "--lr 0.002 --lr-scheduler inverse_sqrt "
        + SIZES.format("encoder", 128, 256)
        + SIZES.format("decoder", 128, 256),
        moe="--arch evomoe_transformer --criterion evomoe_label_smoothed_cross_entropy",
        dense="--arch transformer --criterion label_smoothed_cross_entropy",
        metric="BLEU",
        validation="valid_nll_loss",
    ),
}
COMMON = (
    # No thread that loads ahead: it would be a second one, it can abort at the end, and in a masked LM it
    # shares its random numbers with the validation, so that a run could not be repeated exactly.
    "--num-workers 0 --data-buffer-size 0 "
    "--dropout 0.1 --optimizer adam --adam-betas (0.9,0.98) --clip-norm 1.0 "
    "--log-format json --no-progress-bar --no-epoch-checkpoints --keep-interval-updates 1"
)
NEVER = "1000000"


@dataclass(frozen=True)
class Settings:
    """What is the same for all systems of a table.

    Attributes:
        data: folder that `fairseq-train` reads.
        task: name of the task.
        updates: length of a run.
        more: further flags, which come last.
    """

    data: Path
    task: str
    updates: int
    more: tuple[str, ...] = ()

    def train(self, system: System, seed: int, save_dir: Path, dense: Path | None = None) -> list[str]:
        """The command that trains a system.

        Args:
            system: the system.
            seed: of all random numbers.
            save_dir: folder for checkpoints.
            dense: the checkpoint that its experts are made of.
        """
        task = TASKS[self.task]
        updates = self.updates
        if dense is not None:
            updates = max(updates - share(system.dense_updates, updates), 1)
        command = [str(SCRIPTS / "fairseq-train"), str(self.data), *task.flags.split(), *COMMON.split()]
        command += (task.dense if system.dense else task.moe).split()
        command += ["--user-dir", str(PLUGIN), "--seed", str(seed), "--save-dir", str(save_dir)]
        command += self._durations(updates) + system.flags()
        if dense is not None:
            command += as_arguments({system.dense_as: dense})
        command += without_experts(self.more) if system.dense else self.more
        return command + (self._wider(command, system.width) if system.width != 1 else [])

    @staticmethod
    def _wider(command: list[str], width: float) -> list[str]:
        """Flags that make the feed-forward layers of a command so many times as wide."""
        found = {f: v for f, v in zip(command, command[1:]) if f.endswith("-ffn-embed-dim")}
        return [word for f, v in found.items() for word in (f, str(round(width * int(v))))]

    def _durations(self, updates: int) -> list[str]:
        validate = str(max(self.updates // 10, 1))
        flags = ["--max-update", str(updates), "--warmup-updates", str(max(updates // 20, 1))]
        if "polynomial_decay" in TASKS[self.task].flags:
            flags += ["--total-num-update", str(updates)]
        # an interval of saving is one of validation, too; at the end of an epoch there is neither, so that
        # the curves of all systems have the same updates
        flags += ["--save-interval-updates", validate, "--validate-interval-updates", validate]
        flags += ["--save-interval", NEVER, "--validate-interval", NEVER]
        return flags + ["--log-interval", str(max(self.updates // 40, 1))]

    def validate(self, checkpoint: Path, overrides: dict[str, Any] | None = None) -> list[str]:
        """The command that validates a checkpoint, with some options of its model replaced."""
        task = TASKS[self.task].flags.split()[:2]
        command = [str(SCRIPTS / "fairseq-validate"), str(self.data), "--user-dir", str(PLUGIN), *task]
        command += ["--path", str(checkpoint), "--valid-subset", "valid", "--batch-size", "64"]
        command += ["--num-workers", "0", "--data-buffer-size", "0", "--log-format", "json"]
        return command + ["--no-progress-bar", "--model-overrides", repr(overrides or {})]

    def generate(self, checkpoint: Path) -> list[str]:
        """The command that translates the test set and scores it."""
        command = [str(SCRIPTS / "fairseq-generate"), str(self.data), "--user-dir", str(PLUGIN)]
        command += ["--path", str(checkpoint), "--gen-subset", "test", "--beam", "4", "--batch-size", "64"]
        # with a multiple of 8, its default, fairseq leaves out what is left over, up to seven sentences
        command += ["--required-batch-size-multiple", "1", "--num-workers", "0"]
        return command + ["--remove-bpe", "sentencepiece", "--scoring", "sacrebleu"]
