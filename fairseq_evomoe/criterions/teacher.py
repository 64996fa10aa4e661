"""A trained model that another one learns from: any checkpoint of fairseq, with experts or without."""

import logging
from typing import Any, Dict, Optional

import torch
from fairseq import checkpoint_utils, models
from fairseq.file_io import PathManager
from fairseq.tasks import TASK_REGISTRY, FairseqTask
from torch import Tensor, nn

from ..config.errors import ConfigError
from ..moe.options import OptionError
from ..moe.recorder import no_record

logger = logging.getLogger(__name__)

_OPTION = "distillation_teacher"
_FLAG = "--distillation-teacher"


def load_teacher(path: str, task: FairseqTask) -> nn.Module:
    """The model of a checkpoint, for evaluation, without gradients.

    Args:
        path: of the checkpoint, or of the first of its files.
        task: that of the run; the teacher's must be of the same kind, with dictionaries as large.

    Raises:
        ConfigError: there is no such checkpoint, or it is of another task, dictionary or package.
    """
    if not PathManager.isfile(path):
        wrong = "is a folder" if PathManager.exists(path) else "does not exist"
        raise _error(f"{_FLAG} {path} {wrong}: give the path of the checkpoint to learn from.")
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    cfg = state.get("cfg")
    if not cfg or "model" not in state:
        raise _error(f"{_FLAG} {path} is no checkpoint of fairseq: give one that it has saved.")
    _check_task(path, cfg.task, task)
    _check_dictionaries(path, state["model"], task)
    if cfg.model._name not in {*models.MODEL_DATACLASS_REGISTRY, *models.ARCH_MODEL_REGISTRY}:
        raise _error(
            f"{_FLAG} {path} is of the model {cfg.model._name}, which is not known here: give the --user-dir "
            "that has it, or another teacher."
        )
    # not by the task, which may keep what it makes for its own model, such as a generator
    built: Any = models.build_model(cfg.model, task)
    model: nn.Module = built
    built.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    history = state.get("optimizer_history") or [{}]
    if hasattr(built, "set_num_updates"):  # a gate's temperature is that of the update, as in generation
        built.set_num_updates(history[-1].get("num_updates", 0))
    if has_adaptive_softmax(model):
        raise _error(
            f"{_FLAG} {path} has an adaptive softmax, which gives no logits of all words: give a teacher "
            "that was trained without --adaptive-softmax-cutoff."
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    logger.info(f"learning from {path}: {cfg.model._name}, {count:,} parameters")
    return model.eval().requires_grad_(False)


def has_adaptive_softmax(model: nn.Module) -> bool:
    """Whether a model gives no logits of all words."""
    return getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None


def logits_of(model: nn.Module, inputs: Dict[str, Any], masked: Optional[Tensor] = None) -> Tensor:
    """What a model gives for every word: (batch, seq, V), or (tokens, V) of those that are masked.

    Args:
        model: of fairseq.
        inputs: what a batch has for the model.
        masked: bool, (batch, seq): the masked tokens, for a masked language model; ``None``: all.
    """
    more = {} if masked is None else {"masked_tokens": masked}
    logits: Tensor = model(**inputs, **more)[0]
    return logits


@torch.no_grad()
def logits_of_teacher(model: nn.Module, inputs: Dict[str, Any], masked: Optional[Tensor] = None) -> Tensor:
    """``logits_of``; nobody is told how the teacher's experts were chosen."""
    with no_record():
        return logits_of(model, inputs, masked)


def _check_task(path: str, saved: Any, task: FairseqTask) -> None:
    theirs, ours = TASK_REGISTRY.get(saved._name, object), type(task)
    if not (issubclass(ours, theirs) and theirs is not object) and not issubclass(theirs, ours):
        name = next((name for name, cls in TASK_REGISTRY.items() if cls is ours), ours.__name__)
        raise _error(
            f"{_FLAG} {path} was trained with --task {saved._name}, and this run has --task {name}: give a "
            "teacher of the same task."
        )


def _check_dictionaries(path: str, state: Dict[str, Tensor], task: FairseqTask) -> None:
    """The rows of the embeddings, which are the entries of the dictionaries."""
    source, target = task.source_dictionary, task.target_dictionary
    for part, dictionary in (
        ("encoder.embed_tokens", source),
        ("encoder.sentence_encoder.embed_tokens", source),
        ("decoder.embed_tokens", target),
    ):
        rows = state.get(f"{part}.weight")
        if rows is not None and len(rows) != len(dictionary):
            raise _error(
                f"{_FLAG} {path} knows {len(rows)} words, and the dictionary of this run has "
                f"{len(dictionary)}: give a teacher that was trained with the same dictionary."
            )


def _error(text: str) -> ConfigError:
    return ConfigError([OptionError(_OPTION, text)])
