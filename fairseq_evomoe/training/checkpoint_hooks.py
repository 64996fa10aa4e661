"""What stands in for methods of a fairseq ``Trainer`` that save and load.

A checkpoint has all experts, in one file or in several, whatever ranks share them.  fairseq calls
``consolidate_optimizer`` on all ranks before the first rank alone asks for the state, then, on each rank that
is to write, ``checkpoint_suffix`` and ``save_checkpoint``.
"""

import contextlib
import logging
import math
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from fairseq import checkpoint_utils
from fairseq.data.iterators import EpochBatchIterating
from fairseq.dataclass.configs import CheckpointConfig, FairseqConfig
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer

from ..checkpoints import index, saving, shards, versions
from ..checkpoints import whole as checkpoints
from ..checkpoints.saved_options import SPAWNED_BEFORE
from ..config.errors import ConfigError, flag
from ..criterions.distillation import Distillation
from ..models.feed_forward import CheckpointMismatch, MoEFeedForward, MoEModel, has_experts, moe_layers
from ..moe import MoELayer
from ..moe.options import OptionError
from ..moe.ranks import ALONE
from ..patching import Patches, wrap
from . import growth, ranks, telling
from .drift import Drift
from .state import RunState

logger = logging.getLogger(__name__)

Original = Callable[..., Any]

patches = Patches()
patches.replaces(checkpoint_utils, "load_checkpoint_to_cpu")(shards.load_all_files)
patches.replaces(checkpoint_utils, "torch_persistent_save")(saving.write)
patches.replaces(checkpoint_utils, "checkpoint_paths")(saving.found)
patches.replaces(PathManager, "copy")(saving.copy)


@patches.replaces(checkpoint_utils, "save_checkpoint")
def save_safely(
    original: Original,
    cfg: CheckpointConfig,
    trainer: Trainer,
    epoch_itr: EpochBatchIterating,
    val_loss: Optional[float],
) -> Optional[str]:
    """At every moment a whole checkpoint is on the disk, whatever rank dies."""
    model = trainer.get_model()
    local = not cfg.write_checkpoints_asynchronously and PathManager.supports_rename(cfg.save_dir)
    if cfg.no_save or not local or not has_experts(model):
        return original(cfg, trainer, epoch_itr, val_loss)
    own = ranks.ranks_of(model)
    several = ranks.is_sharded(trainer) and trainer.cfg.model.moe_sharded_checkpoint
    under_way = saving.Saving(own if several and own.rank < own.parallel else ALONE)
    with saving.recorded(under_way):
        result = original(cfg, trainer, epoch_itr, val_loss)
    under_way.commit()
    if trainer.data_parallel_rank == 0:
        saving.delete_old(cfg, epoch_itr.end_of_epoch(), trainer.cfg.checkpoint.checkpoint_suffix)
    return result


@patches.replaces(Trainer, "consolidate_optimizer")
def gather_experts(original: Original, trainer: Trainer) -> None:
    """The last that all ranks do before a checkpoint is saved: experts are gathered, or their files named."""
    original(trainer)
    run = RunState.of(trainer)
    run.forget_checkpoint()
    if not ranks.is_sharded(trainer) or run.in_update:
        return
    if trainer.cfg.model.moe_sharded_checkpoint:
        run.shards = checkpoints.name_set(trainer)
    else:
        run.gathered = checkpoints.gather_whole(trainer)


@patches.replaces(Trainer, "state_dict")
def state_of_all_experts(original: Original, trainer: Trainer) -> Dict[str, Any]:
    """What is saved has the experts of all ranks, or those of one file."""
    state: Dict[str, Any] = original(trainer)
    run = RunState.of(trainer)
    criterion = trainer.get_criterion()
    if isinstance(criterion, Distillation) and not isinstance(trainer.get_model(), MoEModel):
        # fairseq-validate makes the criterion anew, in an installation that knows nothing of this package
        state["cfg"]["criterion"] = criterion.config_of_task()
    if run.shards is not None:
        return checkpoints.shard_of(trainer, state, run.shards)
    if ranks.is_sharded(trainer):
        gathered = run.gathered or checkpoints.gather_whole(trainer)
        gathered.fill(state, checkpoints.layout_of(trainer))
        run.forget_checkpoint()
    checkpoints.note_layout(trainer, state)
    return state


@patches.replaces(Trainer, "should_save_checkpoint_on_current_rank")
def has_own_file(original: Original, trainer: Trainer) -> bool:
    """Of a checkpoint in several files, each rank that shares the experts writes one."""
    own = ranks.ranks_of(trainer.get_model())
    return original(trainer) or (RunState.of(trainer).shards is not None and own.rank < own.parallel)


@patches.replaces(Trainer, "checkpoint_suffix")
def suffix_of_file(original: Original, trainer: Trainer) -> str:
    """The files of one checkpoint have names of their own."""
    suffix: str = original(trainer)
    # only while saving: a checkpoint of another number of files can be loaded
    if RunState.of(trainer).shards is not None:
        suffix += index.suffix_of(ranks.ranks_of(trainer.get_model()).group_rank)
    return suffix


@patches.replaces(Trainer, "save_checkpoint")
def save_whole_checkpoint(
    original: Original, trainer: Trainer, filename: str, extra_state: Dict[str, Any]
) -> Optional[str]:
    """When an update fails, perhaps on this rank alone, experts of other ranks would be missing."""
    if RunState.of(trainer).in_update and ranks.is_sharded(trainer):
        logger.error(f"{filename} is not written, since experts of other ranks would be missing")
        return None
    checkpoints.note_ranks(trainer, extra_state)
    if RunState.of(trainer).spawned_before:
        extra_state[SPAWNED_BEFORE] = RunState.of(trainer).spawned_before
    if getattr(trainer.get_model(), "moe_config", None) is not None:  # ours, whatever experts it has
        extra_state[versions.KEY] = versions.here()
    drift = RunState.of(trainer).drift.state()
    if drift:
        extra_state[Drift.KEY] = drift
    return original(trainer, filename, extra_state)


@patches.replaces(Trainer, "load_checkpoint")
def load_with_experts(
    original: Original,
    trainer: Trainer,
    filename: str,
    reset_optimizer: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Optional[Dict[str, Any]]:
    """Experts may have spawned in the checkpoint, which the distributed wrapper must be rebuilt for."""
    layers = [layer for _, layer in moe_layers(trainer.get_model())]
    ours = has_experts(trainer.get_model())
    if ours:
        _refuse_to_begin_anew(trainer, filename)
        for module in ("fairseq_cli.train", "__main__"):  # python fairseq_cli/train.py
            if hasattr(sys.modules.get(module), "validate_and_save"):
                wrap(sys.modules[module], "train", end_finished_run)
    before = [_form(layer.moe) for layer in layers]
    RunState.of(trainer).forget_checkpoint()
    try:
        with checkpoints.loading(trainer, filename) as filename, _ema_begins_with_model(trainer):
            result = original(trainer, filename, reset_optimizer, *args, **kwargs)
    except Exception as error:
        # trainer.py:560 replaces every error by "please ensure that the architectures match"
        mismatch = _mismatch_behind(error, layers, reset_optimizer)
        if mismatch in (None, error):
            raise
        raise mismatch from error
    if [_form(layer.moe) for layer in layers] != before:
        # trainer.py:514 builds the distributed wrapper, around other experts, before it loads
        trainer._wrapped_model = None
        ranks.keep_from_ddp(trainer.get_model())
    if ours:
        _refuse_untrained_backbone(trainer, result)
        growth.resume(trainer, result)
        telling.start(trainer)
        checkpoints.move_to_position(trainer, result)
        if result and not reset_optimizer:  # else another run begins
            RunState.of(trainer).drift.load(result.get(Drift.KEY, {}))
    return result


@contextlib.contextmanager
def _ema_begins_with_model(trainer: Trainer) -> Iterator[None]:
    """``trainer.py`` forgets a checkpoint's model before an EMA that the checkpoint lacks begins with it."""
    load = checkpoint_utils.load_checkpoint_to_cpu

    def load_with_ema(*args: Any, **kwargs: Any) -> Dict[str, Any]:
        state: Dict[str, Any] = load(*args, **kwargs)
        extra = state.get("extra_state")
        if isinstance(extra, dict) and "ema" not in extra and "model" in state:
            logger.warning("the checkpoint has no EMA: --store-ema begins with the checkpoint's model")
            extra["ema"] = dict(state["model"])
        return state

    if not trainer.cfg.ema.store_ema:
        yield
        return
    checkpoint_utils.load_checkpoint_to_cpu = load_with_ema
    try:
        yield
    finally:
        checkpoint_utils.load_checkpoint_to_cpu = load


def _refuse_to_begin_anew(trainer: Trainer, filename: str) -> None:
    """``trainer.py`` begins anew, and says it in a line of the log, if there is no file of that name."""
    if PathManager.isfile(filename) or checkpoints.is_last(trainer, filename):
        return
    options = trainer.cfg.checkpoint
    asked = options.restore_file == filename or not options.finetune_from_model
    option = "restore_file" if asked else "finetune_from_model"
    wrong = "is a folder" if PathManager.exists(filename) else "does not exist"
    way_out = "give the path of a checkpoint, or leave it out to go on from checkpoint_last.pt"
    raise ConfigError([OptionError(option, f"{flag(option)} {filename} {wrong}: {way_out}.")])


def _refuse_untrained_backbone(trainer: Trainer, loaded: Optional[Dict[str, Any]]) -> None:
    """Low-rank experts beside what nobody has trained, and nobody will, would learn to live with noise."""
    config = getattr(trainer.get_model(), "moe_config", None)
    if loaded is None and config is not None and config.low_rank.rank > 0:
        if "backbone" in config.frozen_parts:
            text = (
                f"With `rank` {config.low_rank.rank} and `freeze` {config.training.freeze} the model that "
                "the experts stand beside is not trained: give it with --finetune-from-model."
            )
            raise ConfigError([OptionError("rank", text)])


def end_finished_run(
    original: Original, cfg: FairseqConfig, trainer: Trainer, *args: Any, **kwargs: Any
) -> Tuple[List[Optional[float]], bool]:
    """A run that has ended and is started again would make one more update, and save it as the last."""
    last, hours = cfg.optimization.max_update or math.inf, cfg.optimization.stop_time_hours
    finished = trainer.get_num_updates() >= last or 0 < hours < trainer.cumulative_training_time() / 3600
    if not finished or not has_experts(trainer.get_model()):
        return original(cfg, trainer, *args, **kwargs)
    logger.info(f"nothing is left to do: the run has made its {trainer.get_num_updates()} updates")
    return [None], True


def _form(moe: MoELayer) -> Tuple[bool, List[int]]:
    return moe.router is not None, list(moe.experts.widths)


def _mismatch_behind(
    error: BaseException, layers: List[MoEFeedForward], reset_optimizer: bool
) -> Optional[CheckpointMismatch]:
    if any(layer.moe.spawned_on_load for layer in layers) and not reset_optimizer:
        return CheckpointMismatch(
            "The checkpoint has one expert and the state of an optimizer for it, but with "
            "--moe-spawn-update 0 the experts are there from the start: add --reset-optimizer to spawn "
            "them from the checkpoint, or give the --moe-spawn-update that it was trained with."
        )
    cause: Optional[BaseException] = error
    while cause is not None and not isinstance(cause, CheckpointMismatch):
        cause = cause.__cause__ or cause.__context__
    return cause
