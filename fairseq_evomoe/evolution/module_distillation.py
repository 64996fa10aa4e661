"""Modules learn from a teacher's before they are trained together: m2mKD (arXiv 2402.16918).

Pure functions and options; the models are in ``models/module_distillation.py``.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import List, Optional, Sequence, Tuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..moe.options import Options, option

_T = TypeVar("_T")


class DistillationPhase(IntEnum):
    """What a run that has a teacher trains."""

    META = 0  # the meta model, of one dense layer for each module
    MODULES = 1  # each module of the student, in its place in the meta model
    STUDENT = 2  # the student, end to end


@dataclass(frozen=True)
class DistillationOptions(Options):
    """How modules learn from a teacher's before the run itself; the names are flat."""

    teacher: Optional[str] = option(
        None,
        "Checkpoint of fairseq's own dense model, trained on the same dictionary, from whose layers those of "
        "the model learn, module by module, before they are trained together (m2mKD); needs "
        "moe-meta-updates and moe-module-updates.",
    )
    meta_updates: int = option(
        0,
        "Updates at the start of the run that train the meta model, which has the teacher's sizes and one "
        "layer for each module.",
        at_least=0,
        duration=True,
    )
    module_updates: int = option(
        0,
        "Updates after those, in which each module, the layers up to and with an MoE layer, learns in the "
        "meta model what the teacher's module does there.",
        at_least=0,
        duration=True,
    )
    module_alpha: float = option(
        0.5,
        "Weight of the divergence from the teacher's module, and 1 minus it that of the task's loss, while "
        "modules learn.",
        at_least=0,
        at_most=1,
    )
    module_temperature: float = option(
        1.0, "Temperature of the distributions that are compared while modules learn.", above=0
    )
    stitch: bool = option(
        False,
        "Let modules learn from a teacher of another width, by a normalisation and a linear map before and "
        "after each, which are dropped afterwards.",
    )

    @property
    def student_update(self) -> int:
        """The update from which the student is trained end to end."""
        return self.meta_updates + self.module_updates

    def phase(self, update: int) -> DistillationPhase:
        """What an update of a run that has a teacher trains."""
        if update < self.meta_updates:
            return DistillationPhase.META
        return DistillationPhase.MODULES if update < self.student_update else DistillationPhase.STUDENT


def split_at(layers: Sequence[_T], last: Sequence[int]) -> List[List[_T]]:
    """Layers as modules, each of which ends with one of the given numbers; the last takes what is left."""
    starts = [0, *(number + 1 for number in last[:-1])]
    return [list(layers[start:end]) for start, end in zip(starts, [*starts[1:], len(layers)])]


def split_evenly(layers: Sequence[_T], modules: int) -> List[List[_T]]:
    """Layers as so many modules of the same length, or lengths that differ by one, the longer ones last."""
    ends = [len(layers) * (i + 1) // modules for i in range(modules)]
    return split_at(layers, [end - 1 for end in ends])


def divergence(student_TV: Tensor, teacher_TV: Tensor, temperature: float) -> Tensor:
    """``temperature^2 KL(teacher || student)`` of softened distributions, summed over tokens: a scalar.

    The authors' code divides the sum by the number of classes too, which leaves next to nothing of it with a
    vocabulary: with C classes, that is the weight 1 / (C + 1) here, but for a factor of the whole loss.

    Args:
        student_TV: logits, shape (T, V).
        teacher_TV: logits, shape (T, V), without gradient.
        temperature: of both.
    """
    student = F.log_softmax(_float32(student_TV) / temperature, dim=-1)
    teacher = F.log_softmax(_float32(teacher_TV) / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def cost(
    meta: Sequence[int], teacher: Sequence[int], student: Sequence[int], rest: int
) -> Tuple[float, float]:
    """Cost of an update of the first two phases, in parameters of a model that is trained.

    A parameter costs 2 FLOPs a token forward, 2 back to its input and 2 for its own gradient, that is 6 if
    it is trained.  Each module is learnt in two passes: with the student's module, back to which the gradient
    goes, and with the teacher's.

    Args:
        meta: parameters of each of the meta model's layers.
        teacher: those of each of the teacher's modules.
        student: those of each of the student's, with stitches, that a token uses.
        rest: those of the meta model's output.
    """
    whole, modules = sum(meta) + rest, 0.0
    for i in range(len(meta)):
        before, after = sum(meta[:i]), sum(meta[i + 1 :]) + rest
        modules += 2 * before + 6 * student[i] + 4 * after
        modules += 2 * before + 2 * teacher[i] + 2 * after
    return float(whole), modules / 6
