"""Where a fairseq ``Trainer`` asks this package: what stands in for methods of it that build and update.

fairseq has no hook that is given the Trainer, so ``install`` replaces methods of it (``trainer.py``) by
functions that call the original and, beside it, what the modules of this folder do: ``growth.py``,
``ranks.py``, ``checks.py``.  Those that save and load are in ``checkpoint_hooks.py``.
"""

import sys
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from fairseq import options
from fairseq.criterions import FairseqCriterion
from fairseq.dataclass.configs import DistributedTrainingConfig, FairseqConfig
from fairseq.models import ARCH_MODEL_REGISTRY, BaseFairseqModel
from fairseq.nan_detector import NanDetector
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from torch import Tensor, nn

from ..checkpoints import whole as checkpoints
from ..models.feed_forward import MoEModel, has_experts, moe_layers
from ..models.requirements import check_batch, check_names
from ..moe import Router, record
from ..moe.recorder import Record
from ..patching import Patches, wrap
from . import (
    checkpoint_hooks,
    ema,
    freezing,
    growth,
    module_distillation,
    preemption,
    ranks,
    telling,
    waiting,
)
from .checks import check_before_trainer, check_length, check_optimizer, check_run, settle_options
from .state import RunState
from .statistics import commit_statistics, watch_gradients

Original = Callable[..., Any]
"""What a hook stands in for, of which it is given the arguments too."""

patches = Patches()
outermost = Patches()
"""What is put around everything else, that of ``checkpoint_hooks.py`` too."""


def install() -> None:
    """Teach fairseq's ``Trainer`` about experts.  A second call does nothing."""
    patches.apply()
    checkpoint_hooks.patches.apply()
    outermost.apply()
    for name in ("fairseq.distributed", "fairseq_cli.train", "__main__"):  # python fairseq_cli/train.py
        module = sys.modules.get(name)
        if hasattr(module, "fsdp_enable_wrap"):
            wrap(module, "fsdp_enable_wrap", refuse_fully_sharded)


def refuse_fully_sharded(original: Original, cfg: DistributedTrainingConfig) -> Any:
    """``fairseq_cli/train.py`` asks for fairscale before it builds the model that cannot use it."""
    run = cfg._get_parent()
    if issubclass(ARCH_MODEL_REGISTRY.get(run.model._name, object), MoEModel):
        check_before_trainer(run)
    return original(cfg)


@patches.replaces(Trainer, "__init__")
def begin_run(
    original: Original,
    trainer: Trainer,
    cfg: FairseqConfig,
    task: FairseqTask,
    model: BaseFairseqModel,
    criterion: FairseqCriterion,
    *args: Any,
    **kwargs: Any,
) -> None:
    """The configuration is checked as a whole before time is wasted, and the layers are told of the ranks."""
    trainer.evomoe = RunState()
    weakref.finalize(trainer, trainer.evomoe.listener.let_go).atexit = False
    layers, ours = [layer for _, layer in moe_layers(model)], has_experts(model)
    if ours:
        if isinstance(model, MoEModel):
            settle_options(cfg, model.moe_config)
        check_before_trainer(cfg)
        pulse = trainer.evomoe.pulse = ranks.attach_ranks(cfg, model)
        if pulse is not None:
            weakref.finalize(trainer, pulse.end)
        module_distillation.begin(cfg, task, model, criterion)
    original(trainer, cfg, task, model, criterion, *args, **kwargs)
    if ours:
        check_run(trainer.cfg, model, layers, criterion)
        freezing.tell(model)
        _listen_in_loop()


def _listen_in_loop() -> None:
    """Ask, after each update of the training loop that there is now, whether a signal has come."""
    for name in ("fairseq_cli.train", "__main__"):  # python fairseq_cli/train.py
        module = sys.modules.get(name)
        if hasattr(module, "validate_and_save"):
            wrap(module, "validate_and_save", preemption.stop_or_go_on)


@patches.replaces(options, "parse_args_and_arch")
def check_flags(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Flags of parts that do not go together would end in an error of omegaconf's."""
    flags = original(*args, **kwargs)
    check_names(flags[0] if isinstance(flags, tuple) else flags)
    return flags


@patches.replaces(Trainer, "reset_dummy_batch")
def check_first_batch(original: Original, trainer: Trainer, batch: Any) -> None:
    """It is given the first batch before anything is trained."""
    check_batch(trainer.get_model(), trainer.cfg.model, trainer.task, batch)
    RunState.of(trainer).drift.see_batch(batch)
    original(trainer, batch)


@patches.replaces(Trainer, "train_step")
def update(
    original: Original, trainer: Trainer, samples: List[Dict[str, Any]], raise_oom: bool = False
) -> Optional[Dict[str, Any]]:
    """Before an update experts spawn, or come and go; after it statistics and the loss are looked at."""
    model, run = trainer.get_model(), RunState.of(trainer)
    layers = [layer for _, layer in moe_layers(model)]
    if not has_experts(model):
        return original(trainer, samples, raise_oom)
    module_distillation.advance(trainer)
    if growth.spawn_is_due(trainer):
        growth.spawn(trainer)
    growth.resize(trainer)
    telling.watch(trainer)
    run.drift.probe_if_due(trainer)
    for layer in layers:
        layer.begin_update()
    run.listener.listen()
    before = trainer.get_num_updates()
    run.forget_checkpoint()
    run.broken = []
    run.in_update = True
    try:
        # a rank that gives up a batch for want of memory would leave the others waiting
        with record() as run.routings:
            routings = run.routings
            result = original(trainer, samples, raise_oom or ranks.ranks_of(model).size > 1)
    except FloatingPointError as error:
        if not run.broken:
            raise
        raise FloatingPointError(f"{error}: NaN or Inf in {', '.join(run.broken)}") from error
    finally:
        run.in_update = False
        run.routings = Record()
    updated = trainer.get_num_updates() > before
    commit_statistics(trainer, updated)
    if updated:
        growth.watch_loss(trainer, result)
        run.drift.log()
        run.trace.note_update(trainer, samples, routings, before)
    return result


@patches.replaces(Trainer, "get_train_iterator")
def check_epochs(original: Original, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """With the data it is known how many updates an epoch has, and whether the run is long enough."""
    epochs = original(trainer, *args, **kwargs)
    if not trainer.task.has_sharded_data("train"):  # whose epochs differ in length
        check_length(trainer.cfg, trainer.get_model(), trainer.get_num_updates(), epochs)
    return epochs


@outermost.replaces(Trainer, "train_step")
@outermost.replaces(Trainer, "valid_step")
@outermost.replaces(Trainer, "consolidate_optimizer")
@outermost.replaces(Trainer, "save_checkpoint")
@outermost.replaces(Trainer, "load_checkpoint")
def name_the_absent(original: Original, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """Where ranks exchange something, one that does not come is named."""
    with waiting.naming_the_absent(RunState.of(trainer).pulse, waiting.seconds(trainer.cfg)):
        return original(trainer, *args, **kwargs)


@patches.replaces(Trainer, "_prepare_sample")
def tell_dummy_batch(original: Original, trainer: Trainer, *args: Any, **kwargs: Any) -> Tuple[Any, bool]:
    """It alone knows that a batch is fairseq's dummy batch, which is not to be routed."""
    sample, is_dummy = original(trainer, *args, **kwargs)
    ranks.set_dummy_batch([layer for _, layer in moe_layers(trainer.get_model())], is_dummy)
    return sample, is_dummy


@patches.replaces(Trainer, "clip_grad_norm")
def clip_all_experts(original: Original, trainer: Trainer, clip_norm: float) -> Tensor:
    """The last that is done to gradients: those of experts are added up, and the norm is that of all."""
    if ranks.is_sharded(trainer):
        norm = ranks.clip_grad_norm(trainer, clip_norm)
    else:
        norm = original(trainer, clip_norm)
    if torch.is_tensor(norm) and not torch.isfinite(norm).all():
        # now, since fairseq clears the gradients before it raises its error
        RunState.of(trainer).broken = ranks.broken_parts(trainer)
    else:
        watch_gradients(trainer)
    return norm


@patches.replaces(Trainer, "_build_optimizer")
def build_optimizer(original: Original, trainer: Trainer) -> None:
    """An optimizer is checked, and takes this rank's rows of a checkpoint's state."""
    original(trainer)
    check_optimizer(trainer.cfg, trainer._optimizer)

    def load_local_state(original: Original, state_dict: Dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """The state has all experts, of which this rank has some."""
        if has_experts(trainer.get_model()):
            freezing.check_state(trainer._optimizer, state_dict)
        if ranks.is_sharded(trainer):
            state_dict = checkpoints.local_optimizer_state(trainer, state_dict)
        original(state_dict, *args, **kwargs)

    wrap(trainer._optimizer, "load_state_dict", load_local_state)


@patches.replaces(Trainer, "_build_ema")
def build_ema(original: Original, trainer: Trainer) -> None:
    """fairseq's EMA would average whatever a checkpoint holds, tables of integers too."""
    original(trainer)
    if trainer._ema is not None:
        ema.copy_integers(trainer._ema)
        ema.freeze(trainer._ema)
        ema.fit_saved(trainer._ema)
        ema.keep_versions(trainer._ema)


@patches.replaces(NanDetector, "add_hooks")
def add_hooks_to_tensors(original: Original, detector: NanDetector, module: nn.Module) -> None:
    """``nan_detector.py`` takes the first item of a module's output, and a ``Routing`` has none."""
    if not isinstance(module, Router):
        original(detector, module)
