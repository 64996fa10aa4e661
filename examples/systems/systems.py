"""The systems that the YAML files describe, and the commands that train and evaluate them."""

from __future__ import annotations

import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

import yaml

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parent.parent / "fairseq_evomoe"
SCRIPTS = Path(sysconfig.get_path("scripts"))


class UnknownSystem(ValueError):
    """A system that there is not, or a file that does not describe one."""


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        id: name of its file without `.yaml`.
        name: what it is called.
        paper: where it was published.
        options: its `moe_*` options; values such as `0.1u` are fractions of the updates.
        note: the comments in its file: what it is and what differs from the paper.
        dense: whether it is fairseq's model without experts.
        dense_updates: how long a dense model is trained first, out of which the experts are made.
        not_for: the tasks that it cannot do, each with the reason.
    """

    id: str
    name: str
    paper: str
    options: dict[str, Any]
    note: str = ""
    dense: bool = False
    dense_updates: str = ""
    not_for: dict[str, str] = field(default_factory=dict)

    def flags(self, updates: int | None = None) -> list[str]:
        """Its options as flags of `fairseq-train`, for a run of so many updates; as they are if not given."""
        result = []
        for name, value in self.options.items():
            if value is False or value is None:
                continue
            result.append("--" + name.replace("_", "-"))
            if value is not True:
                result.append(str(scaled(value, updates)))
        return result


def scaled(value: Any, updates: int | None) -> Any:
    """`0.1u` is a tenth of the updates, at least one; anything else is what it is."""
    fraction = re.fullmatch(r"(\d*\.?\d+)u", str(value))
    return max(round(float(fraction.group(1)) * updates), 1) if fraction and updates else value


def without_experts(flags: Sequence[str]) -> list[str]:
    """Flags of `fairseq-train` but for `--moe-...` and their values, which a dense model does not know."""
    kept, keep = [], True
    for flag in flags:
        keep = not flag.startswith("--moe-") and (keep or flag.startswith("--"))
        if keep:
            kept.append(flag)
    return kept


def read(path: Path) -> System:
    """Read a system's YAML file.

    Raises:
        UnknownSystem: keys that are not known.
    """
    text = path.read_text(encoding="utf-8")
    keys, note = yaml.safe_load(text), " ".join(re.findall(r"^# (.*)", text, flags=re.MULTILINE))
    options = {key: keys.pop(key) for key in list(keys) if key.startswith("moe_")}
    try:
        return System(id=path.stem, options=options, note=note, **keys)
    except TypeError as error:
        raise UnknownSystem(f"{path}: {error}") from None


def read_all(names: list[str], folder: Path = HERE) -> list[System]:
    """Read systems by name; `all` stands for all of them, and a path to a YAML file for itself.

    Raises:
        UnknownSystem: a name that there is not.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    paths = []
    for name in names:
        if name == "all":
            paths += known.values()
        elif name in known or Path(name).is_file():
            paths.append(known.get(name, Path(name)))
        else:
            raise UnknownSystem(
                f"there is no system {name!r}: choose from {', '.join(known)}, or give a file."
            )
    return [read(path) for path in dict.fromkeys(paths)]


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
EXPERTS = "--moe-experts 8 --moe-freq 2"
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
            updates = max(updates - scaled(system.dense_updates, updates), 1)
        command = [str(SCRIPTS / "fairseq-train"), str(self.data), *task.flags.split(), *COMMON.split()]
        command += (task.dense if system.dense else task.moe).split()
        command += ["--user-dir", str(PLUGIN), "--seed", str(seed), "--save-dir", str(save_dir)]
        command += self._durations(updates)
        if not system.dense:
            command += EXPERTS.split() + system.flags(self.updates)
        if dense is not None:
            command += ["--finetune-from-model", str(dense)]
        return command + (without_experts(self.more) if system.dense else list(self.more))

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

    def generate(self, checkpoint: Path) -> list[str]:
        """The command that translates the test set and scores it."""
        command = [str(SCRIPTS / "fairseq-generate"), str(self.data), "--user-dir", str(PLUGIN)]
        command += ["--path", str(checkpoint), "--gen-subset", "test", "--beam", "4", "--batch-size", "64"]
        # with a multiple of 8, its default, fairseq leaves out what is left over, up to seven sentences
        command += ["--required-batch-size-multiple", "1", "--num-workers", "0"]
        return command + ["--remove-bpe", "sentencepiece", "--scoring", "sacrebleu"]
