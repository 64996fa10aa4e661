"""A teacher out of a dense checkpoint, and the meta model of its sizes, for m2mKD (arXiv 2402.16918)."""

import copy
from contextlib import nullcontext
from typing import Any, Dict, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.file_io import PathManager
from fairseq.models import build_model
from fairseq.tasks import FairseqTask
from omegaconf import OmegaConf, open_dict
from torch import nn

from ..evolution.module_distillation import DistillationOptions, DistillationPhase
from ..moe.noise import seed_of
from ..moe.options import OptionError
from .module_distillation import Kind, ModuleDistillation, kind_of, modules_of, stack_of
from .requirements import task_name

DROPOUT = ("dropout", "attention_dropout", "activation_dropout")


def make_distillation(
    student: Any, student_cfg: Any, task: FairseqTask, options: DistillationOptions, seed: int
) -> ModuleDistillation:
    """The teacher of a checkpoint and a meta model for a student.

    Args:
        student: the model.
        student_cfg: its configuration, whose dropout is the meta model's.
        task: what it is trained for.
        options: how its modules learn.
        seed: of the meta model's initial weights.

    Raises:
        OptionError: a model of two stacks, or a teacher that its modules cannot learn from.
    """
    kind = kind_of(student)
    if kind is None:
        raise OptionError(
            "teacher",
            "`teacher` is for models of one stack of layers, whose modules stand between two others: use "
            "--arch evomoe_lm or evomoe_roberta, or leave it out.",
        )
    state, cfg = _load(str(options.teacher), kind)
    modules = len(modules_of(student, kind))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "meta"))
        teacher = _built(cfg, task, state, str(options.teacher))
        dropout = {name: getattr(student_cfg, name) for name in DROPOUT}
        sizes = {kind.layers: modules, kind.layers + "_to_keep": None}
        meta = build_model(_changed(cfg, **sizes, **dropout), task)
        _check(student, teacher, kind, modules, options)
        made = ModuleDistillation(student, teacher, meta, kind, options)
    made.enter(DistillationPhase.META)
    return made


def _load(path: str, kind: Kind) -> Tuple[Dict[str, Any], Any]:
    """State and configuration of a dense checkpoint.

    Raises:
        OptionError: it is none, or of another model.
    """
    if not PathManager.isfile(path):
        raise OptionError("teacher", f"`teacher` {path} is no file: give the path of a dense checkpoint.")
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    cfg = state.get("cfg")
    if cfg is None:
        cfg = convert_namespace_to_omegaconf(state["args"])
    name = str(getattr(cfg["model"], "_name", None) or getattr(cfg["model"], "arch", None))
    if not (name == kind.dense or name.startswith(kind.dense + "_")):
        raise OptionError(
            "teacher",
            f"`teacher` {path} is a checkpoint of {name}, and these modules learn from fairseq's own "
            f"{kind.dense}: give one of that.",
        )
    return state["model"], cfg["model"]


def _built(cfg: Any, task: FairseqTask, state: Dict[str, Any], path: str) -> nn.Module:
    teacher = build_model(_changed(cfg), task)
    try:
        teacher.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise OptionError(
            "teacher",
            f"`teacher` {path} does not fit --task {task_name(task)}, presumably because it has another "
            "dictionary: train it on the same data.",
        ) from error
    return teacher.eval()


def _changed(cfg: Any, **options: Any) -> Any:
    """A copy of a model's configuration, with other values of some options."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg) if OmegaConf.is_config(cfg) else nullcontext():
        for name, value in options.items():
            setattr(cfg, name, value)
    return cfg


def _check(student: Any, teacher: nn.Module, kind: Kind, modules: int, options: DistillationOptions) -> None:
    """Refuse a teacher that a student cannot learn from."""
    layers = len(list(stack_of(teacher, kind).layers.children()))
    if layers < modules:
        raise OptionError(
            "teacher",
            f"`teacher` {options.teacher} has {layers} layers, too few for the {modules} modules of the "
            "model: give a deeper one, or raise `freq`.",
        )
    width, own = (stack_of(model, kind).layers[0].embed_dim for model in (teacher, student))
    if (width != own) != options.stitch:
        raise OptionError(
            "stitch",
            f"`teacher` {options.teacher} has layers of width {width} and the model of {own}: "
            + (
                "give `stitch`, or a teacher of the same width."
                if width != own
                else "leave out `stitch`, which has nothing to do."
            ),
        )
    longest, asked = teacher.max_positions(), student.max_positions()  # type: ignore[operator]
    if longest < asked:
        raise OptionError(
            "teacher",
            f"`teacher` {options.teacher} reads {longest} tokens at most, and the model {asked}: train on "
            "shorter sequences, or give another teacher.",
        )
    for model in (student, teacher):
        if getattr(stack_of(model, kind), "adaptive_softmax", None) is not None:
            raise OptionError(
                "teacher",
                "`teacher` is compared by the logits of all words, which a model with "
                "--adaptive-softmax-cutoff does not give: leave one of them out.",
            )
