"""Grow experts, and share them out among ranks, inside a running fairseq ``Trainer``.

fairseq has no hook that is given the Trainer, so ``install`` wraps methods of it (``trainer.py``):

- ``__init__``: checks the configuration as a whole before time is wasted, and tells the layers of the ranks;
- ``train_step``: before it the experts spawn, or come and go; after it statistics of all ranks are added up,
  and the loss is looked at;
- ``_prepare_sample``: it alone knows that a batch is fairseq's dummy batch;
- ``clip_grad_norm``: the last that is done to gradients; see ``parallel.py``;
- ``_build_optimizer``: an optimizer must take this rank's part of a checkpoint's state;
- ``consolidate_optimizer``, ``state_dict``, ``save_checkpoint``: a checkpoint has all experts, in one file or
  in several (``shards.py``), for which ``should_save_checkpoint_on_current_rank`` and ``checkpoint_suffix``
  are there, and ``checkpoint_utils.load_checkpoint_to_cpu`` reads them;
- ``load_checkpoint``: the distributed wrapper is rebuilt if the model has spawned;
- ``_build_ema``: its EMA would average whatever a checkpoint holds, tables of integers too.

Two more functions are wrapped so that errors tell what to do: ``fsdp_enable_wrap``, which would ask for
fairscale before our check is made, and ``NanDetector.add_hooks``, which cannot look at a ``Routing``.
"""

import functools
import logging
import sys
from typing import List, Optional, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.nan_detector import NanDetector
from fairseq.trainer import Trainer

from ..checkpoints import shards
from ..checkpoints import whole as checkpoints
from ..models.feed_forward import CheckpointMismatch, MoEFeedForward, MoEModel, moe_layers
from ..moe import MoELayer, Router, record
from . import growth
from . import ranks as parallel
from .checks import check_before_trainer, check_optimizer, check_run, settle_options

logger = logging.getLogger(__name__)


def install() -> None:
    """Teach fairseq's ``Trainer`` about experts.  A second call does nothing."""
    if getattr(Trainer, "_evomoe", False):
        return
    Trainer._evomoe = True
    for name, wrap in (
        ("__init__", _checked_init),
        ("train_step", _growing_train_step),
        ("_prepare_sample", _telling_prepare_sample),
        ("clip_grad_norm", _whole_clip_grad_norm),
        ("_build_optimizer", _sharing_build_optimizer),
        ("consolidate_optimizer", _gathering_consolidate_optimizer),
        ("state_dict", _whole_state_dict),
        ("save_checkpoint", _noting_save_checkpoint),
        ("load_checkpoint", _growing_load_checkpoint),
        ("_build_ema", _build_ema_of_integers),
    ):
        setattr(Trainer, name, wrap(getattr(Trainer, name)))
    for name, wrap in (
        ("should_save_checkpoint_on_current_rank", _saving_on_ranks_with_shards),
        ("checkpoint_suffix", _suffix_of_shard),
    ):
        setattr(Trainer, name, property(wrap(getattr(Trainer, name).fget)))
    checkpoint_utils.load_checkpoint_to_cpu = shards.assembling(checkpoint_utils.load_checkpoint_to_cpu)
    NanDetector.add_hooks = _add_hooks_to_tensors(NanDetector.add_hooks)
    for name in ("fairseq.distributed", "fairseq_cli.train", "__main__"):  # python fairseq_cli/train.py
        module = sys.modules.get(name)
        if hasattr(module, "fsdp_enable_wrap"):
            module.fsdp_enable_wrap = _checked_enable_wrap(module.fsdp_enable_wrap)


def _checked_enable_wrap(original):
    # fairseq_cli/train.py calls it before it builds a model, and it asks for fairscale
    @functools.wraps(original)
    def fsdp_enable_wrap(cfg):
        run = cfg._get_parent()
        if issubclass(ARCH_MODEL_REGISTRY.get(run.model._name, object), MoEModel):
            check_before_trainer(run)
        return original(cfg)

    return fsdp_enable_wrap


def _add_hooks_to_tensors(original):
    # fairseq/nan_detector.py looks for the module that made a NaN with torch's backward hooks, which take
    # the first item of a module's output; a Routing has none
    @functools.wraps(original)
    def add_hooks(self, module):
        if not isinstance(module, Router):
            original(self, module)

    return add_hooks


def _checked_init(original):
    @functools.wraps(original)
    def __init__(self, cfg, task, model, criterion, *args, **kwargs):
        layers = [layer for _, layer in moe_layers(model)]
        if layers:
            check_before_trainer(cfg)
            if isinstance(model, MoEModel):
                settle_options(cfg, model.moe_config)
            parallel.attach_ranks(cfg, model)
        original(self, cfg, task, model, criterion, *args, **kwargs)
        if layers:
            check_run(self.cfg, layers, criterion)

    return __init__


def _build_ema_of_integers(original):
    @functools.wraps(original)
    def _build_ema(self):
        original(self)
        if self._ema is not None:
            growth.copy_integers(self._ema)
            if _is_sharded(self):
                _take_shard(self._ema)

    return _build_ema


def _take_shard(ema) -> None:
    # trainer.py hands the float32 weights of a checkpoint, those of all experts, to this method
    original = ema.build_fp32_params

    @functools.wraps(original)
    def build_fp32_params(state_dict=None):
        if state_dict is not None:
            state_dict = checkpoints.local_tensors(ema.get_model(), state_dict)
        original(state_dict)

    ema.build_fp32_params = build_fp32_params


def _is_sharded(trainer: Trainer) -> bool:
    return next(parallel.sharded_parameters(trainer.get_model()), None) is not None


def _growing_train_step(original):
    @functools.wraps(original)
    def train_step(self, samples, raise_oom=False):
        layers = [layer for _, layer in moe_layers(self.get_model())]
        if not layers:
            return original(self, samples, raise_oom)
        if growth.spawn_is_due(self):
            growth.spawn(self)
        growth.resize(self)
        for layer in layers:
            layer.begin_update()
        before = self.get_num_updates()
        self._evomoe_whole = self._evomoe_set = None  # what was being saved is saved
        self._evomoe_broken = []
        self._evomoe_in_step = True
        try:
            # a rank that gives up a batch for want of memory would leave the others waiting
            with record() as self._evomoe_routings:
                result = original(self, samples, raise_oom or layers[0].moe.ranks.size > 1)
        except FloatingPointError as error:
            names = self._evomoe_broken
            if not names:
                raise
            raise FloatingPointError("{}: NaN or Inf in {}".format(error, ", ".join(names))) from error
        finally:
            self._evomoe_in_step = False
            self._evomoe_routings = None
        updated = self.get_num_updates() > before
        growth.collect(self, updated)
        if updated:
            growth.watch_loss(self, result)
        return result

    return train_step


def _telling_prepare_sample(original):
    @functools.wraps(original)
    def _prepare_sample(self, *args, **kwargs):
        sample, is_dummy = original(self, *args, **kwargs)
        parallel.set_dummy_batch([layer for _, layer in moe_layers(self.get_model())], is_dummy)
        return sample, is_dummy

    return _prepare_sample


def _whole_clip_grad_norm(original):
    @functools.wraps(original)
    def clip_grad_norm(self, clip_norm):
        norm = parallel.clip_grad_norm(self, clip_norm) if _is_sharded(self) else original(self, clip_norm)
        if torch.is_tensor(norm) and not torch.isfinite(norm).all():
            # now, since fairseq clears the gradients before it raises its error
            self._evomoe_broken = parallel.broken_parts(self)
        return norm

    return clip_grad_norm


def _sharing_build_optimizer(original):
    @functools.wraps(original)
    def _build_optimizer(self):
        original(self)
        check_optimizer(self.cfg, self._optimizer)
        load = self._optimizer.load_state_dict

        @functools.wraps(load)
        def load_state_dict(state_dict, *args, **kwargs):
            if _is_sharded(self):
                state_dict = checkpoints.local_optimizer_state(self, state_dict)
            load(state_dict, *args, **kwargs)

        self._optimizer.load_state_dict = load_state_dict

    return _build_optimizer


def _gathering_consolidate_optimizer(original):
    # checkpoint_utils.py calls it on all ranks before the first rank alone asks for the state
    @functools.wraps(original)
    def consolidate_optimizer(self):
        original(self)
        self._evomoe_whole = self._evomoe_set = None
        if not _is_sharded(self) or self.__dict__.get("_evomoe_in_step"):
            return
        if self.cfg.model.moe_sharded_checkpoint:
            self._evomoe_set = checkpoints.name_set(self)
        else:
            self._evomoe_whole = checkpoints.gather_whole(self)

    return consolidate_optimizer


def _whole_state_dict(original):
    @functools.wraps(original)
    def state_dict(self):
        state = original(self)
        if _saves_shards(self):
            state = checkpoints.shard_of(self, state, self._evomoe_set)
        elif _is_sharded(self):
            whole = self.__dict__.pop("_evomoe_whole", None) or checkpoints.gather_whole(self)
            whole.fill(state, checkpoints.layout_of(self))
        checkpoints.note_layout(self, state)
        return state

    return state_dict


def _saves_shards(trainer: Trainer) -> bool:
    """Whether a checkpoint is being saved in several files."""
    return trainer.__dict__.get("_evomoe_set") is not None


def _saving_on_ranks_with_shards(original):
    def should_save_checkpoint_on_current_rank(self) -> bool:
        ranks = parallel.ranks_of(self.get_model())
        return original(self) or (_saves_shards(self) and ranks.rank < ranks.parallel)

    return should_save_checkpoint_on_current_rank


def _suffix_of_shard(original):
    # only while saving: a checkpoint of another number of files can be loaded
    def checkpoint_suffix(self) -> str:
        suffix = original(self)
        if _saves_shards(self):
            suffix += shards.suffix_of(parallel.ranks_of(self.get_model()).group_rank)
        return suffix

    return checkpoint_suffix


def _noting_save_checkpoint(original):
    @functools.wraps(original)
    def save_checkpoint(self, filename, extra_state):
        # trainer.py saves crash.pt when an update fails, perhaps on this rank alone
        if self.__dict__.get("_evomoe_in_step") and _is_sharded(self):
            logger.error(f"{filename} is not written, since experts of other ranks would be missing")
            return None
        checkpoints.note_ranks(self, extra_state)
        return original(self, filename, extra_state)

    return save_checkpoint


def _growing_load_checkpoint(original):
    @functools.wraps(original)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        layers = [layer for _, layer in moe_layers(self.get_model())]
        before = [_form(layer.moe) for layer in layers]
        self._evomoe_set = None
        try:
            with checkpoints.loading(self, filename) as filename:
                result = original(self, filename, reset_optimizer, *args, **kwargs)
        except Exception as error:
            # trainer.py:560 replaces every error by "please ensure that the architectures match"
            mismatch = _mismatch_behind(error, layers, reset_optimizer)
            if mismatch in (None, error):
                raise
            raise mismatch from error
        if [_form(layer.moe) for layer in layers] != before:
            # trainer.py:514 builds the distributed wrapper, around other experts, before it loads
            self._wrapped_model = None
            parallel.keep_from_ddp(self.get_model())
        if layers:
            growth.resume(self)
            _warn_if_spawned_early(self, layers)
            checkpoints.move_to_position(self, result)
        return result

    return load_checkpoint


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


def _warn_if_spawned_early(trainer: Trainer, layers: List[MoEFeedForward]) -> None:
    update, spawn_update = trainer.get_num_updates(), layers[0].schedule.spawn_update
    if layers[0].moe.router is not None and update < spawn_update:
        logger.warning(
            "the checkpoint's experts have spawned already, so nothing spawns at --moe-spawn-update "
            f"{spawn_update}; the gate is dense until then and anneals from there (to start from the sparse "
            "gate, set --moe-spawn-update 0 --moe-hard-update 0)"
        )
