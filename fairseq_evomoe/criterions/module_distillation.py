"""The loss while a student's modules learn in a meta model: m2mKD (arXiv 2402.16918)."""

from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import Tensor, nn

from ..evolution.module_distillation import divergence

Criterion = Callable[[Any, Dict[str, Any], bool], Tuple[Tensor, int, Dict[str, Any]]]
"""``forward`` of a criterion of fairseq's."""


class _Asked:
    """A model, as a criterion knows it, that is called once and then says what comes out at each place."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs: List[Any] = []
        self.place = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.outputs:
            self.outputs = self.model(*args, **kwargs)
        return self.outputs[self.place].student

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def loss_of_modules(
    criterion: Criterion, model: Any, sample: Dict[str, Any], reduce: bool, padding: int
) -> Tuple[Tensor, int, Dict[str, Any]]:
    """The sum over modules of ``(1 - alpha) task + alpha divergence``; means of what is logged.

    Modules share no parameter that is trained, so that each learns as it would alone.  In evaluation it is
    the mean of the task's losses.

    Args:
        criterion: that of the task.
        model: the student, whose modules are being learnt.
        sample: the batch.
        reduce: whether losses are summed up over tokens.
        padding: index of a target that does not count.
    """
    distillation, asked = model.distillation, _Asked(model)
    losses, logs, sample_size = [], [], 0
    place, places = 0, 1
    while place < places:
        asked.place = place
        loss, sample_size, log = criterion(asked, sample, reduce)
        places, teacher = len(asked.outputs), asked.outputs[place].teacher
        if teacher is not None and reduce:
            student_TV, teacher_TV = _rows(
                asked.outputs[place].student[0], teacher, sample["target"], padding
            )
            apart = divergence(student_TV, teacher_TV, distillation.temperature)
            loss = (1 - distillation.alpha) * loss + distillation.alpha * apart
            log["moe_divergence"] = apart.detach()
        losses.append(loss)
        logs.append(log)
        place += 1
    total = torch.stack(losses).sum(0)
    return total if model.training else total / places, sample_size, _mean(logs)


def _rows(student: Tensor, teacher: Tensor, target: Tensor, padding: int) -> Tuple[Tensor, Tensor]:
    """The logits of the tokens that count; a masked LM gives those of the masked ones alone."""
    student_TV, teacher_TV = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    if student_TV.shape[0] != target.numel():
        return student_TV, teacher_TV
    keep_T = target.reshape(-1).ne(padding)
    return student_TV[keep_T], teacher_TV[keep_T]


def _mean(logs: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Losses as their means over modules; what counts tokens is the same in all of them."""
    means = {}
    for key, first in logs[0].items():
        values = [log[key] for log in logs]
        loss = torch.is_tensor(first) and first.is_floating_point()
        means[key] = torch.stack(values).mean(0) if loss else first
    return means
