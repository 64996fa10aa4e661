"""What our models need of a task, so that a wrong one is refused in a sentence before anything is trained.

Nothing here asks for a task by its name: a task of somebody else's that provides what a model needs is as
good as fairseq's.  What is known of a setup comes in three steps:

- names of classes (``check_names``), when flags are read: options that one part takes from another;
- the task (``check_task``), when the model is built: dictionaries, and what sequences there are;
- a batch (``check_batch``), when the data is loaded: whether it has the decoder's input.
"""

import re
from argparse import Namespace
from dataclasses import dataclass, fields
from typing import Any, Dict, FrozenSet, Iterator, Optional

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY, FairseqTask
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask
from torch import nn

from ..config.errors import ConfigError
from ..moe.options import OptionError
from .feed_forward import MoEModel


@dataclass(frozen=True)
class Requirement:
    """What a kind of model needs of a task.

    Attributes:
        targets: what a task for language models may ask it for: ``future`` are the next tokens.
        decoder: whether it has a decoder that predicts each token from those before it.
        pairs: whether there are pairs of sequences, the second of which a decoder reads.
        tasks: those of fairseq that fit.
        criterions: ours that fit.
    """

    targets: FrozenSet[str]
    decoder: bool
    pairs: bool
    tasks: str
    criterions: str


REQUIREMENTS: Dict[type, Requirement] = {
    TransformerLanguageModel: Requirement(
        targets=frozenset(["future"]),
        decoder=True,
        pairs=False,
        tasks="language_modeling",
        criterions="evomoe_cross_entropy",
    ),
    RobertaModel: Requirement(
        targets=frozenset(["self"]),
        decoder=False,
        pairs=False,
        tasks="masked_lm or sentence_prediction",
        criterions="evomoe_masked_lm, or evomoe_sentence_prediction with its task",
    ),
    TransformerModel: Requirement(
        targets=frozenset(),
        decoder=True,
        pairs=True,
        tasks="translation",
        criterions="evomoe_label_smoothed_cross_entropy",
    ),
}
"""By the class of fairseq's that a model of ours extends."""


def requirement_of(model: type) -> Optional[Requirement]:
    """What a class of models needs; ``None``: that is not known."""
    return next((needed for base, needed in REQUIREMENTS.items() if issubclass(model, base)), None)


def advice(model: nn.Module, criterion: bool = False) -> str:
    """What to use instead of a task, or a criterion, that does not fit a model."""
    needed = requirement_of(type(model))
    if criterion and has_adaptive_softmax(model):
        return "use --criterion evomoe_adaptive_loss"
    if needed is None:
        return "use another one"
    return f"use --criterion {needed.criterions}" if criterion else f"use --task {needed.tasks}"


def has_adaptive_softmax(model: nn.Module) -> bool:
    """Whether a model gives no logits of all words, so that only a criterion made for that can use it."""
    return getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None


def architecture_of(cfg: Any) -> str:
    """The architecture that a model's configuration is of."""
    return str(getattr(cfg, "arch", None) or getattr(cfg, "_name", None))


def task_name(task: FairseqTask) -> str:
    """The name under which a task is registered, or else that of its class."""
    return next((name for name, cls in TASK_REGISTRY.items() if cls is type(task)), type(task).__name__)


def check_names(args: Namespace) -> None:
    """Refuse flags of parts that do not go together, by their classes alone.

    fairseq lets a dataclass take an option of another part (``${task.tokens_per_sample}``), whose absence it
    reports as an error of omegaconf's; so does a task that needs a model made of several.

    Args:
        args: what ``fairseq-train`` was given; of a model that is not ours nothing is said.

    Raises:
        ConfigError: one sentence that names the setting and the way out.
    """
    model = ARCH_MODEL_REGISTRY.get(getattr(args, "arch", None))
    task = getattr(args, "task", None)
    if model is None or not issubclass(model, MoEModel) or task not in TASK_REGISTRY:
        return
    needed = requirement_of(model)
    fitting = "another task" if needed is None else f"--task {needed.tasks}"
    if issubclass(TASK_REGISTRY[task], MultilingualTranslationTask):
        raise _error(
            "task",
            f"--task {task} trains a model for each pair of languages, and --arch {args.arch} is one model: "
            f"use {fitting}.",
        )
    dataclasses = {
        "model": MODEL_DATACLASS_REGISTRY.get(ARCH_MODEL_NAME_REGISTRY[args.arch]),
        "task": TASK_DATACLASS_REGISTRY.get(task),
        "criterion": CRITERION_DATACLASS_REGISTRY.get(getattr(args, "criterion", None)),
    }
    flags = {"model": f"--arch {args.arch}", "task": f"--task {task}"}
    ways_out = {"task": fitting, "criterion": _criterions_of(args.task)}
    for part, flag in flags.items():
        for other, option in _taken(dataclasses[part]):
            # an architecture may have set it
            if other != part and not hasattr(args, option) and option not in _names(dataclasses[other]):
                raise _error(
                    other,
                    f"{flag} takes {option} from the {other}, and --{other} {getattr(args, other)} has no "
                    f"such option: use {ways_out[other]}.",
                )


def _criterions_of(task: str) -> str:
    """The criterions that are named after a task."""
    names = [name for name in (f"evomoe_{task}", task) if name in CRITERION_REGISTRY]
    return f"--criterion {names[0]}" if names else "another criterion"


def _taken(dataclass_: Any) -> Iterator[Any]:
    """Options that a dataclass takes from the task or the criterion: which, and the option's name."""
    for field in fields(dataclass_) if dataclass_ is not None else ():
        match = re.fullmatch(r"\$\{(task|criterion)\.(\w+)\}", str(field.default))
        if match is not None:
            yield match.groups()


def _names(dataclass_: Any) -> Any:
    return {field.name for field in fields(dataclass_)} if dataclass_ is not None else set()


def check_task(model: type, cfg: Any, task: FairseqTask) -> None:
    """Refuse a task that cannot train a model of ours.

    Args:
        model: class of the model.
        cfg: its configuration.
        task: the task.

    Raises:
        ConfigError: one sentence that names the setting and the way out.
    """
    needed = requirement_of(model)
    if needed is None:
        return
    arch, name = f"--arch {architecture_of(cfg)}", f"--task {task_name(task)}"
    way_out = f": use --task {needed.tasks}, or another one that does."
    unknown = sorted(set(getattr(task, "targets", None) or []) - needed.targets)
    if unknown:
        raise _error(
            "task",
            f"{name} asks for {' and '.join(unknown)} tokens, and {arch} is no language model that predicts "
            f"them: use --task {needed.tasks}, or --arch evomoe_lm.",
        )
    if isinstance(task.max_positions(), (tuple, list)) and not needed.pairs:
        raise _error("task", f"{arch} works on single sequences, and {name} has pairs of them{way_out}")
    heads = hasattr(getattr(task, "cfg", None), "classification_head_name")
    if heads and not hasattr(model, "register_classification_head"):
        raise _error(
            "task",
            f"{name} classifies sequences, and {arch} has no heads for that: use --arch evomoe_roberta, or "
            f"--task {needed.tasks}.",
        )
    for side in ("source", "target") if needed.decoder else ("source",):
        if _dictionary(task, side) is None:
            raise _error("task", f"{arch} needs a {side} dictionary, and {name} has none{way_out}")


def _dictionary(task: FairseqTask, side: str) -> Optional[Dictionary]:
    try:
        dictionary: Optional[Dictionary] = getattr(task, f"{side}_dictionary")
    except (AttributeError, NotImplementedError):
        return None
    return dictionary


def positions_of(cfg: Any, task: FairseqTask) -> int:
    """The length of the longest sequence that a task gives to a model.

    Raises:
        ConfigError: the task does not tell.
    """
    told = [task.max_positions()]
    # fairseq 0.12.2's masked_lm tells nothing, and older tasks keep their options under another name
    told += [getattr(getattr(task, name, None), "tokens_per_sample", None) for name in ("cfg", "args")]
    known = [positions for positions in told if isinstance(positions, int)]
    if not known:
        raise _error(
            "max_positions",
            f"--task {task_name(task)} does not tell how long its sequences are, so that --arch "
            f"{architecture_of(cfg)} has no number of positional embeddings: give --max-positions.",
        )
    return known[0]


def check_batch(model: nn.Module, cfg: Any, task: FairseqTask, batch: Any) -> None:
    """Refuse data that a model of ours cannot be given.

    Args:
        model: the model; of one that is not ours nothing is said.
        cfg: its configuration.
        task: the task.
        batch: the first one.

    Raises:
        ConfigError: one sentence that names the setting and the way out.
    """
    needed = requirement_of(type(model))
    net_input = batch.get("net_input") if isinstance(batch, dict) else None
    if needed is None or not isinstance(model, MoEModel) or not net_input:
        return
    given = "prev_output_tokens" in net_input
    if given == needed.pairs:
        return
    arch, name = f"--arch {architecture_of(cfg)}", f"--task {task_name(task)}"
    if given:
        text = f"{name} has a second sequence in its batches, and {arch} reads only one"
    else:
        text = f"{name} has single sequences in its batches, and {arch} reads pairs of them"
    raise _error("task", f"{text}: use --task {needed.tasks}, or another one that does.")


def _error(option: str, text: str) -> ConfigError:
    return ConfigError([OptionError(option, text)])
