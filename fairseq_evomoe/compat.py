"""Every difference between versions of fairseq, torch and numpy that concerns this plugin.

Each function mends one fault, names the line that it mends and the versions that have it, and does
nothing where the fault is absent.  Those that stand in for a function of somebody else's are given the
original first; see ``patching.py``.  ``apply`` carries out all; doing so twice is harmless.
"""

import argparse
import contextlib
import dataclasses
import inspect
import os
import re
import sys
import warnings
from typing import Any, Callable, Dict, Iterator, Sequence

import numpy as np
import torch
from fairseq.data import data_utils, language_pair_dataset, token_block_dataset
from fairseq.dataclass import utils as dataclass_utils
from fairseq.dataclass.configs import DistributedTrainingConfig, FairseqConfig
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.models import ARCH_CONFIG_REGISTRY, distributed_fairseq_model
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from omegaconf import OmegaConf, open_dict
from torch import nn
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from . import patching
from .patching import Patches

_Original = Callable[..., Any]

patches = Patches()


def apply() -> None:
    """Mend the known faults of the fairseq, torch and numpy that are installed."""
    recognise_folder_by_any_path()
    allow_fairseq_checkpoints()
    restore_numpy_aliases()
    silence_harmless_overflow()
    with contextlib.suppress(RuntimeError):  # it is registered already
        register_rendezvous_handler("attempt", _rendezvous_of_attempt)
    patches.apply()


class _Folders(list):
    """A package's folders, each of which is in it by any path that leads there."""

    def __contains__(self, path: object) -> bool:
        return any(os.path.realpath(str(path)) == os.path.realpath(folder) for folder in self)


def recognise_folder_by_any_path() -> None:
    """``utils.py:504`` compares ``--user-dir`` with the path of a package that is imported already.

    A link to the folder, or a path through one, is refused as another package of that name (0.12.2 and
    0.12.3).
    """
    package = sys.modules[__package__]
    if not isinstance(package.__path__, _Folders):
        package.__path__ = _Folders(package.__path__)


def allow_fairseq_checkpoints() -> None:
    """torch >= 2.6 refuses the classes that fairseq pickles into checkpoints.

    ``checkpoint_utils.py`` (340 and 909 in ve-fairseq 0.12.3) calls ``torch.load`` without
    ``weights_only=False``.  Checkpoints of argparse-configured models hold ``argparse.Namespace``, and
    metrics may hold numpy scalars; both are harmless to unpickle.
    """
    add_safe_globals = getattr(torch.serialization, "add_safe_globals", None)
    if add_safe_globals is None:  # torch < 2.4 loads everything
        return
    multiarray = getattr(getattr(np, "_core", None), "multiarray", None)  # numpy 1.26 has an empty _core
    scalar = (multiarray or getattr(np, "core").multiarray).scalar  # noqa: B009  # of which mypy knows nothing
    dtypes = {type(np.dtype(t)) for t in (np.bool_, np.int32, np.int64, np.float32, np.float64)}
    add_safe_globals([argparse.Namespace, np.dtype, scalar, *dtypes])


@patches.replaces(
    distributed_utils,
    "_broadcast_object_slow",
    when=lambda original: hasattr(torch.serialization, "add_safe_globals"),
)
def allow_fairseq_broadcasts(
    original: _Original, obj: Any, src_rank: int, group: Any, dist_device: Any
) -> Any:
    """torch >= 2.6 refuses the configuration in a checkpoint that rank 0 sends to the other ranks.

    ``distributed/utils.py:805`` (ve-fairseq 0.12.3) receives with ``torch.load``, so that no run in more
    than one process could resume.  torch's own broadcast unpickles what the same job has sent.
    """
    if distributed_utils.use_xla():
        return original(obj, src_rank, group, dist_device)
    objects = [obj]
    torch.distributed.broadcast_object_list(objects, src=src_rank, group=group, device=dist_device)
    return objects[0]


@patches.replaces(distributed_utils, "_infer_torch_distributed_launch_init")
def allow_torchrun_without_gpu(original: _Original, cfg: DistributedTrainingConfig) -> None:
    """``distributed/utils.py:91`` (0.12.3) divides by the number of GPUs, which may be 0."""
    if torch.cuda.device_count() > 0:
        original(cfg)
        return
    cfg.distributed_init_method = "env://"
    cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
    cfg.distributed_rank = int(os.environ["RANK"])
    cfg.device_id = 0
    cfg.distributed_no_spawn = True  # torchrun has made the processes


@patches.replaces(distributed_utils, "_infer_torch_distributed_launch_init")
def keep_attempts_apart(original: _Original, cfg: DistributedTrainingConfig) -> None:
    """A run that torchrun restarts meets the addresses of the ranks before (torch >= 2.4, pytorch#135712).

    The launcher keeps one store for all attempts, in which new process groups have the names of old ones.
    Here the attempt's number is a part of their names.  Only within one node, since launchers of several do
    not count alike; those need ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``.
    """
    original(cfg)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt > 0 and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        cfg.distributed_init_method = "attempt://"


def _rendezvous_of_attempt(url: str, **kwargs: Any) -> Iterator[Any]:
    for store, rank, size in rendezvous("env://", **kwargs):
        prefix = "attempt{}".format(os.environ["TORCHELASTIC_RESTART_COUNT"])
        yield torch.distributed.PrefixStore(prefix, store), rank, size


@patches.replaces(LegacyDistributedDataParallel, "__init__")
def keep_experts_out_of_buffer(
    original: _Original, self: Any, module: nn.Module, process_group: Any, buffer_size: int = 2**28
) -> None:
    """``distributed/legacy_distributed_data_parallel.py:46`` has a buffer as large as a rank's parameters.

    All of it is added up, so that it must have one size on all ranks, which may have other numbers of
    parameters in their experts; these do not go through it (0.12.2 and 0.12.3).
    """
    shared = sum(p.numel() for p in module.parameters() if not hasattr(p, "expert"))
    original(self, module, process_group, min(buffer_size, shared))


@patches.replaces(distributed_utils, "_infer_slurm_init")
def allow_slurm_without_gpu(
    original: _Original, cfg: DistributedTrainingConfig, *args: Any, **kwargs: Any
) -> None:
    """``distributed/utils.py:84`` chooses the GPU of a SLURM task's local number (0.12.2 and 0.12.3)."""
    original(cfg, *args, **kwargs)
    if torch.cuda.device_count() == 0:
        cfg.device_id = 0


@patches.replaces(distributed_utils, "call_main")
def refuse_spawn_without_gpu(
    original: _Original, cfg: FairseqConfig, main: Callable[..., Any], **kwargs: Any
) -> Any:
    """``distributed/utils.py:385`` starts a process for each GPU: none at all, silently, without one.

    ``call_main`` of 0.12.2 and 0.12.3 then returns as if training had been done, or, without
    ``--distributed-init-method``, fails on an assertion that does not tell what to do.
    """
    parallel = cfg.distributed_training
    launched = parallel.distributed_no_spawn or parallel.tpu
    if parallel.distributed_init_method is None:
        launched = launched or any(key in os.environ for key in ("RANK", "SLURM_STEP_NODELIST"))
    if parallel.distributed_world_size > 1 and not launched and torch.cuda.device_count() == 0:
        raise ValueError(
            f"--distributed-world-size {parallel.distributed_world_size} starts one process for each "
            "GPU, and there is none: start the processes with torchrun --nproc_per_node "
            f"{parallel.distributed_world_size}, and add --cpu --distributed-backend gloo."
        )
    return original(cfg, main, **kwargs)


@patches.replaces(distributed_fairseq_model, "DistributedDataParallel")
def allow_ddp_without_gpu(
    original: _Original, module: nn.Module, device_ids: Any = None, output_device: Any = None, **kwargs: Any
) -> nn.Module:
    """``models/distributed_fairseq_model.py:62`` passes ``device_ids`` for modules on the CPU.

    torch's DistributedDataParallel refuses that combination (0.12.2 and 0.12.3).
    """
    if all(p.device.type == "cpu" for p in module.parameters()):
        device_ids = output_device = None
    return original(module, device_ids=device_ids, output_device=output_device, **kwargs)


@patches.replaces(Trainer, "train_step")
def allow_overflow_without_gpu(original: _Original, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """``trainer.py:1023`` makes the norm of gradients that have overflown a number on a GPU.

    Without one, the first overflow ended the run (0.12.2 and 0.12.3).  What follows that line is done here.
    """
    try:
        return original(trainer, *args, **kwargs)
    except (AssertionError, RuntimeError) as error:
        if trainer.cuda or not isinstance(error.__context__, OverflowError):
            raise
    trainer.zero_grad()
    with metrics.aggregate("train"):
        metrics.log_scalar("loss_scale", trainer.optimizer.scaler.loss_scale, priority=700, round=4, weight=0)
        metrics.log_stop_time("train_wall")
    return None


class _NumpyWithAliases:
    """numpy, and what numpy 1.24, 2.0 and 2.4 have removed; see ``restore_numpy_aliases``."""

    class compat:
        long = int

    int = int

    @staticmethod
    def percentile(*args: Any, interpolation: Any = "linear", **kwargs: Any) -> Any:
        return np.percentile(*args, method=interpolation, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def restore_numpy_aliases() -> None:
    """fairseq 0.12.2 and 0.12.3 use ``np.int``, ``np.compat.long`` and ``np.percentile(interpolation=)``.

    They are gone in numpy 1.24, 2.0 and 2.4.  ``data/token_block_dataset.py:125``,
    ``data/language_pair_dataset.py:292``, ``data/data_utils.py:524,879,1107``.  Only the name ``np`` of
    these modules changes, not numpy.
    """
    if not hasattr(np, "compat") or "int" not in vars(np):
        for module in (data_utils, language_pair_dataset, token_block_dataset):
            patching.put(module, "np", _NumpyWithAliases)


def _batches_by_epoch(original: _Original) -> bool:
    return "numpy_seed(seed + epoch)" in inspect.getsource(original)


@patches.replaces(FairseqTask, "get_batch_iterator", when=_batches_by_epoch)
def keep_batches_when_resumed(original: _Original, self: FairseqTask, *args: Any, **kwargs: Any) -> Any:
    """``tasks/fairseq_task.py:286`` (0.12.3) batches sentences by seed and the epoch a run starts in.

    The batches are kept for all later epochs, so a run that is resumed after its first epoch has
    others than the run that is not.  Here they are those of a run that starts in epoch 1, as in 0.12.2.
    """
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    rebuilt = given["disable_iterator_cache"] or given["update_epoch_batch_itr"]
    rebuilt = rebuilt or getattr(self.cfg, "rebuild_batches", False)
    if rebuilt or not self.can_reuse_epoch_itr(given["dataset"]):
        return original(self, *args, **kwargs)
    seed = given["seed"]
    given["seed"] = seed + 1 - given["epoch"]
    iterator = original(*bound.args, **bound.kwargs)
    iterator.seed = seed  # of the order of the batches, which is another in each epoch
    return iterator


@patches.replaces(dataclass_utils, "merge_with_parent")
def apply_architectures_in_yaml(original: _Original, dc: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """``dataclass/initialize.py:52`` makes nothing of an architecture that YAML names as a model.

    Under Hydra ``model: {_name: evomoe_lm_tiny}`` gets the defaults of ``evomoe_lm`` before the
    architecture's function can set its own (0.12.2 and 0.12.3; ``add_defaults`` looks up
    ``merge_with_parent`` when it is called).  Here the function goes first, for the models of this plugin.
    """
    config = dc if isinstance(dc, type) else type(dc)
    architecture = ARCH_CONFIG_REGISTRY.get(cfg.get("_name"))
    if architecture is not None and config.__module__.startswith(__package__ + "."):
        values: Any = OmegaConf.to_container(cfg)
        given = argparse.Namespace(**values)
        architecture(given)
        with open_dict(cfg):
            for field in dataclasses.fields(config):
                value = getattr(given, field.name, None)
                if cfg.get(field.name) is None and value is not None:
                    # base_lm_architecture gives False for the integer base_shuffle
                    cfg[field.name] = int(value) if type(field.default) is int else value
    return original(dc, cfg, *args, **kwargs)


def silence_harmless_overflow() -> None:
    """numpy 2 warns about ``data/token_block_dataset.py:178``, 0.12.2 and 0.12.3, for blocks of one token.

    There 1 - 2 is computed in uint16, for a ``past_target`` that only ``--past-target`` uses.  Sources and
    targets are not concerned.
    """
    warnings.filterwarnings(
        "ignore",
        "overflow encountered in scalar subtract",
        RuntimeWarning,
        "fairseq.data.token_block_dataset",
    )


def drop_absent(cfg: Any, config: type) -> None:
    """Take out of a configuration what is ``None`` and no option of ``config``.

    omegaconf 2.0 (which fairseq 0.12.2 needs) reads an absent key as ``None`` instead of taking the
    default of ``getattr``, and fairseq's architecture functions write what they have read.  Later
    code then finds, for example, a ``decoder_input_dim`` of ``None``.
    """
    if OmegaConf.is_config(cfg):
        options = {field.name for field in dataclasses.fields(config)}
        for name in [name for name in cfg if name not in options and cfg[name] is None]:
            del cfg[name]


# The copies of an encoder layer's weights that the fast path of fairseq 0.12.2 keeps.
_FAST_PATH_COPY = re.compile(r"layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")


class EncoderLayer(TransformerEncoderLayerBase):
    """fairseq's encoder layer without the fast path of 0.12.2; see ``remove_encoder_fast_path``."""

    # that of 0.12.2 (modules/transformer_layer.py:136) fills the copies
    _load_from_state_dict = nn.Module._load_from_state_dict


def remove_encoder_fast_path(layers: Sequence[nn.Module]) -> None:
    """Take the "BetterTransformer" path of fairseq 0.12.2 out of an encoder some of whose layers have an MoE.

    ``modules/transformer_layer.py:71-184`` of 0.12.2 keeps second copies of a layer's weights, filled from
    ``fc1`` and ``fc2`` when a checkpoint is loaded, and ``models/transformer/transformer_encoder.py:222``
    asks only the first layer whether all of them can go that way.  Nothing else uses the copies: they have
    no gradient, which ``pytorch_ddp`` refuses.
    """
    for layer in layers:
        if not hasattr(layer, "can_use_fastpath"):
            continue
        setattr(layer, "can_use_fastpath", False)  # noqa: B010  (a module's are typed)
        for name in ("in_proj", "out_proj", "fc1", "fc2"):
            for kind in ("weight", "bias"):
                layer._parameters.pop(f"{name}_{kind}", None)
        if type(layer) is TransformerEncoderLayerBase:
            layer.__class__ = EncoderLayer


def drop_fast_path_copies(state_dict: Dict[str, torch.Tensor]) -> None:
    """Let checkpoints of fairseq 0.12.2's own models load; see ``remove_encoder_fast_path``."""
    for key in [key for key in state_dict if _FAST_PATH_COPY.search(key)]:
        del state_dict[key]
