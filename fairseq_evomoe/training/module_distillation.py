"""The phases of m2mKD (arXiv 2402.16918) inside a running fairseq ``Trainer``."""

import logging
from typing import Any

from fairseq import checkpoint_utils
from fairseq.criterions import FairseqCriterion
from fairseq.dataclass.configs import FairseqConfig
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from ..checkpoints import optimizer_state
from ..checkpoints.optimizer_state import ParameterState
from ..config.errors import ConfigError
from ..criterions.moe import MoECriterion
from ..evolution.module_distillation import DistillationPhase
from ..models.teacher import make_distillation
from ..moe.options import OptionError
from . import ranks

logger = logging.getLogger(__name__)


def begin(cfg: FairseqConfig, task: FairseqTask, model: Any, criterion: FairseqCriterion) -> None:
    """Before a Trainer is built, give a model that has a teacher its teacher and its meta model.

    Raises:
        ConfigError: what does not go with a teacher, in a sentence.
    """
    config = getattr(model, "moe_config", None)
    if config is None or config.distillation.teacher is None:
        return
    try:
        _check(cfg, criterion)
        distillation = make_distillation(model, cfg.model, task, config.distillation, config.seed)
    except OptionError as error:
        raise ConfigError([error]) from error
    model.distillation = distillation
    options, modules = config.distillation, len(distillation.modules_to_learn)
    logger.info(
        f"a meta model of {modules} layers learns until update {options.meta_updates}, and in it {modules} "
        f"modules from those of {options.teacher} until update {options.student_update}"
    )


def _check(cfg: FairseqConfig, criterion: FairseqCriterion) -> None:
    if not isinstance(criterion, MoECriterion):
        raise OptionError(
            "teacher",
            f"`teacher` needs a criterion that knows modules, and {type(criterion).__name__} does not: use "
            "--criterion evomoe_cross_entropy, or evomoe_masked_lm.",
        )
    if cfg.checkpoint.finetune_from_model:
        raise OptionError(
            "teacher",
            "With `teacher` modules begin as they are drawn, and with --finetune-from-model as those of a "
            "checkpoint: leave one of them out.",
        )
    if cfg.ema.store_ema:
        raise OptionError(
            "teacher",
            "--store-ema would average over the phases that `teacher` begins with: leave one of them out.",
        )


def advance(trainer: Trainer) -> None:
    """Before an update, let the next phase begin if it is due; the last one drops what it does not need."""
    model = trainer.get_model()
    config = getattr(model, "moe_config", None)
    if config is None or config.distillation.teacher is None:
        return
    update, distillation = trainer.get_num_updates(), model.distillation
    phase = config.distillation.phase(update)
    if distillation is None:
        if phase != DistillationPhase.STUDENT:
            text = (
                f"The checkpoint has no meta model, which `teacher` needs before update "
                f"{config.distillation.student_update}: begin anew without --restore-file, or leave it out."
            )
            raise ConfigError([OptionError("teacher", text)])
        return
    while distillation.phase < phase:  # a phase may have no updates
        _enter(trainer, DistillationPhase(distillation.phase + 1))


def _enter(trainer: Trainer, phase: DistillationPhase) -> None:
    model, optimizer, scheduler = trainer.get_model(), trainer.optimizer, trainer.lr_scheduler
    # float32 weights go on, and statistics begin anew, as in the authors' separate runs
    masters = {
        parameter: ParameterState({}, state.master)
        for parameter, state in optimizer_state.read(optimizer).items()
    }
    distillation, text = model.distillation, "the student is trained end to end"
    distillation.enter(phase)
    if phase == DistillationPhase.MODULES:
        given, own = distillation.give_outside()
        text = f"modules learn; embeddings and output from the meta model: {given} of {own} tensors"
    else:
        model.distillation = None
    vars(checkpoint_utils.save_checkpoint).pop("best", None)  # of another model
    ranks.keep_from_ddp(model)
    trainer.reinitialize()
    optimizer_state.write(trainer.optimizer, masters)
    optimizer_state.take_over_settings(optimizer, trainer.optimizer)
    optimizer_state.repoint(scheduler, optimizer, trainer.optimizer)
    trainer._lr_scheduler = scheduler
    logger.info(f"from update {trainer.get_num_updates()} {text}")
