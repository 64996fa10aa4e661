"""A task's loss, and how far a model's predictions are from those of a teacher."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Tuple

import torch
from fairseq import metrics, utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.masked_lm import MaskedLMTask
from fairseq.tasks.translation import TranslationTask
from omegaconf import II
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.errors import ConfigError
from ..moe.options import OptionError
from .moe import MoECriterion
from .teacher import has_adaptive_softmax, load_teacher, logits_of, logits_of_teacher

_TASKS = LanguageModelingTask, MaskedLMTask, TranslationTask


@dataclass
class DistillationConfig(FairseqDataclass):
    """Options of ``evomoe_distillation``."""

    distillation_teacher: str = field(
        default="",
        metadata={"help": "Checkpoint of fairseq's whose predictions are learned, as of an MoE model."},
    )
    distillation_weight: float = field(
        default=0.5,
        metadata={
            "help": "Share of the teacher in what is minimised, from 0 to 1; the task's loss has the rest."
        },
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature at which the predictions of both are compared."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Of the task's loss; not for masked language models."}
    )
    sentence_avg: bool = II("optimization.sentence_avg")


class Distillation(FairseqCriterion):
    """fairseq's ``cross_entropy``, ``label_smoothed_cross_entropy`` or ``masked_lm``, and the teacher's part.

    With the student's logits s, the teacher's t, a temperature T and a weight a (G. Hinton et al., arXiv
    1503.02531), for each token that counts in the task's loss::

        (1 - a) loss + a T^2 KL(softmax(t / T) || softmax(s / T))

    The teacher works as in evaluation.  What is reported as ``loss``, ``nll_loss`` and ``ppl`` is the task's
    loss alone, and ``distillation`` the divergence beside it, which is not computed in evaluation.

    Args:
        cfg: the options.
        task: that of the run: a causal or masked language model, or translation.

    Raises:
        ConfigError: another task, an option that is out of range, or a teacher that is none.
    """

    def __init__(self, cfg: DistillationConfig, task: FairseqTask) -> None:
        super().__init__(task)
        self.cfg = cfg
        self.masked = isinstance(task, MaskedLMTask)
        errors = list(_contradictions(cfg, task))
        if errors:
            raise ConfigError(errors)
        # in a list, where the optimizer, checkpoints and the distributed wrapper do not look for modules
        self._teacher = [load_teacher(cfg.distillation_teacher, task)]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "Distillation":
        """The teacher goes to the device and the precision of the run as the criterion does."""
        super()._apply(fn, *args, **kwargs)
        for teacher in self._teacher:
            teacher._apply(fn, *args, **kwargs)
        return self

    def config_of_task(self) -> Dict[str, Any]:
        """Configuration of fairseq's own criterion without a teacher, which a refined model goes on with."""
        if self.masked:
            return {"_name": "masked_lm", "tpu": False}
        kept = {"sentence_avg": self.cfg.sentence_avg}
        smoothing = self.cfg.label_smoothing
        if smoothing == 0:
            return {"_name": "cross_entropy", **kept}
        return {"_name": "label_smoothed_cross_entropy", "label_smoothing": smoothing, **kept}

    def forward(
        self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Any]]:
        """See fairseq's ``FairseqCriterion.forward``."""
        if has_adaptive_softmax(model):
            raise ConfigError(
                [
                    OptionError(
                        "criterion",
                        "--criterion evomoe_distillation needs the logits of all words, which a model with "
                        "--adaptive-softmax-cutoff does not give: leave that out.",
                    )
                ]
            )
        target, inputs = sample["target"], sample["net_input"]
        counted = target.ne(self.padding_idx)
        # without any, all are projected, as in fairseq's masked_lm
        masked = counted if self.masked and bool(counted.any()) else None
        student_NV = _rows(logits_of(model, inputs, masked), counted)
        target_N = target[counted]
        loss_N, nll_N = self._loss_of_task(student_NV, target_N)
        minimised_N, divergence_N = loss_N, torch.zeros_like(nll_N)
        if model.training:
            teacher_NV = _rows(logits_of_teacher(self._teacher[0], inputs, masked), counted)
            share, temperature = self.cfg.distillation_weight, self.cfg.distillation_temperature
            divergence_N = divergence(teacher_NV, student_NV, temperature)
            minimised_N = (1 - share) * loss_N + share * temperature**2 * divergence_N
        sample_size = target.size(0) if self.cfg.sentence_avg and not self.masked else sample["ntokens"]
        sample_size = int(counted.sum()) if self.masked else sample_size
        logging_output = {
            "loss": loss_N.sum().detach(),
            "nll_loss": nll_N.sum().detach(),
            "distillation": divergence_N.sum().detach(),
            "counted": int(counted.sum()),
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample_size,
        }
        return minimised_N.sum() if reduce else minimised_N, sample_size, logging_output

    def _loss_of_task(self, logits_NV: Tensor, target_N: Tensor) -> Tuple[Tensor, Tensor]:
        """With label smoothing as fairseq has it, and the negative log-likelihood; each of shape (N,)."""
        log_NV = utils.log_softmax(logits_NV, dim=-1)
        nll_N = -log_NV.gather(1, target_N.unsqueeze(1)).squeeze(1)
        smoothing = self.cfg.label_smoothing
        if smoothing == 0:
            return nll_N, nll_N
        each = smoothing / (log_NV.shape[1] - 1)
        return (1 - smoothing - each) * nll_N - each * log_NV.sum(1), nll_N

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """See fairseq's ``FairseqCriterion.reduce_metrics``: in bits, as its own are."""
        total = {
            key: sum(log.get(key, 0) for log in logging_outputs)
            for key in ("loss", "nll_loss", "distillation", "counted", "sample_size")
        }
        size, counted = max(total["sample_size"], 1), max(total["counted"], 1)
        metrics.log_scalar("loss", total["loss"] / size / math.log(2), size, round=3)
        metrics.log_scalar("nll_loss", total["nll_loss"] / counted / math.log(2), counted, round=3)
        if total["distillation"]:
            value = total["distillation"] / counted / math.log(2)
            metrics.log_scalar("distillation", value, counted, priority=100, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """See fairseq's ``FairseqCriterion``."""
        return True


@register_criterion("evomoe_distillation", dataclass=DistillationConfig)
class EvoMoEDistillation(MoECriterion, Distillation):
    """A task's loss and a teacher's predictions, for fairseq's own models and those with MoE layers."""


def divergence(teacher_NV: Tensor, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(t / T) || softmax(s / T))`` in nats, computed in float32 at least: shape (N,)."""
    teacher, student = (
        F.log_softmax(_at_least_float32(logits_NV) / temperature, dim=-1)
        for logits_NV in (teacher_NV, student_NV)
    )
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _at_least_float32(logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def _rows(logits: Tensor, counted: Tensor) -> Tensor:
    """The logits of the tokens that count: (N, V)."""
    return logits[counted] if logits.dim() == 3 else logits


def _contradictions(cfg: DistillationConfig, task: FairseqTask) -> Iterator[OptionError]:
    if not isinstance(task, _TASKS):
        yield _error(
            "task",
            "compares predictions of tokens: use it with --task language_modeling, masked_lm or translation, "
            "or use another criterion.",
        )
    if not cfg.distillation_teacher:
        yield _error("distillation_teacher", "learns from a checkpoint: give it as --distillation-teacher.")
    if not 0 <= cfg.distillation_weight <= 1:
        yield _error(
            "distillation_weight",
            f"takes a --distillation-weight from 0 to 1, but that is {cfg.distillation_weight}.",
        )
    if not 0 < cfg.distillation_temperature < math.inf:
        yield _error(
            "distillation_temperature",
            f"takes a --distillation-temperature above 0, but that is {cfg.distillation_temperature}.",
        )
    if not 0 <= cfg.label_smoothing < 1:
        yield _error(
            "label_smoothing",
            f"takes a --label-smoothing from 0 to below 1, but that is {cfg.label_smoothing}.",
        )
    if cfg.label_smoothing and isinstance(task, MaskedLMTask):
        yield _error("label_smoothing", "has no --label-smoothing for masked language models: leave it out.")


def _error(option: str, text: str) -> OptionError:
    return OptionError(option, f"--criterion evomoe_distillation {text}")
