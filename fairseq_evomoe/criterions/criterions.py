"""The registered criterions: each is fairseq's own with ``MoECriterion`` mixed in."""

from fairseq.criterions import register_criterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
from fairseq.criterions.sentence_prediction import (
    SentencePredictionConfig,
    SentencePredictionCriterion,
)
from fairseq.tasks import FairseqTask

from .moe import MoECriterion


@register_criterion("evomoe_cross_entropy", dataclass=CrossEntropyCriterionConfig)
class EvoMoECrossEntropy(MoECriterion, CrossEntropyCriterion):
    """``cross_entropy`` for models with MoE layers."""


@register_criterion("evomoe_adaptive_loss", dataclass=AdaptiveLossConfig)
class EvoMoEAdaptiveLoss(MoECriterion, AdaptiveLoss):
    """``adaptive_loss``, for models with MoE layers and an adaptive softmax."""


@register_criterion("evomoe_label_smoothed_cross_entropy", dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class EvoMoELabelSmoothedCrossEntropy(MoECriterion, LabelSmoothedCrossEntropyCriterion):
    """``label_smoothed_cross_entropy`` for models with MoE layers."""


@register_criterion("evomoe_masked_lm", dataclass=MaskedLmConfig)
class EvoMoEMaskedLm(MoECriterion, MaskedLmLoss):
    """``masked_lm`` for models with MoE layers."""


@register_criterion("evomoe_sentence_prediction", dataclass=SentencePredictionConfig)
class EvoMoESentencePrediction(MoECriterion, SentencePredictionCriterion):
    """``sentence_prediction`` for models with MoE layers."""

    def __init__(self, cfg: SentencePredictionConfig, task: FairseqTask) -> None:
        try:
            super().__init__(cfg, task)
        except AttributeError as error:  # of the task, which may be of any class
            raise ValueError(
                "--criterion evomoe_sentence_prediction needs a task that classifies, with a "
                f"label_dictionary ({error}): use --task sentence_prediction, or another criterion."
            ) from error
