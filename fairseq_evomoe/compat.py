"""Every difference between versions of fairseq, torch and numpy that concerns this plugin.

Each function mends one fault, names the line that it mends and the versions that have it, and does
nothing where the fault is absent.  ``apply`` runs them all; running it twice is harmless.
"""

import argparse
import functools
import os

import numpy as np
import torch
from torch import nn


def apply() -> None:
    """Mend the known faults of the fairseq, torch and numpy that are installed."""
    allow_fairseq_checkpoints()
    allow_torchrun_without_gpu()
    allow_ddp_without_gpu()
    restore_numpy_aliases()


def allow_fairseq_checkpoints() -> None:
    """torch >= 2.6 refuses the classes that fairseq pickles into checkpoints.

    ``checkpoint_utils.py`` (340 and 909 in ve-fairseq 0.12.3) calls ``torch.load`` without
    ``weights_only=False``.  Checkpoints of argparse-configured models hold ``argparse.Namespace``, and
    metrics may hold numpy scalars; both are harmless to unpickle.
    """
    add_safe_globals = getattr(torch.serialization, "add_safe_globals", None)
    if add_safe_globals is None:  # torch < 2.4 loads everything
        return
    multiarray = getattr(np, "_core", None) or np.core
    scalar = multiarray.multiarray.scalar
    dtypes = {type(np.dtype(t)) for t in (np.bool_, np.int32, np.int64, np.float32, np.float64)}
    add_safe_globals([argparse.Namespace, np.dtype, scalar, *dtypes])


def allow_torchrun_without_gpu() -> None:
    """``distributed/utils.py:91`` (0.12.2 and 0.12.3) divides by the number of GPUs, which may be 0."""
    from fairseq.distributed import utils

    original = utils._infer_torch_distributed_launch_init
    if getattr(original, "_evomoe", False):
        return

    @functools.wraps(original)
    def infer(cfg):
        if torch.cuda.device_count() > 0:
            return original(cfg)
        cfg.distributed_init_method = "env://"
        cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
        cfg.distributed_rank = int(os.environ["RANK"])
        cfg.device_id = 0
        cfg.distributed_no_spawn = True  # torchrun has made the processes

    infer._evomoe = True
    utils._infer_torch_distributed_launch_init = infer


def allow_ddp_without_gpu() -> None:
    """``models/distributed_fairseq_model.py:62`` passes ``device_ids`` for modules on the CPU.

    torch's DistributedDataParallel refuses that combination (0.12.2 and 0.12.3).
    """
    from fairseq.models import distributed_fairseq_model as module

    original = module.DistributedDataParallel
    if not isinstance(original, type):  # already replaced by the function below
        return

    def distributed_data_parallel(module: nn.Module, device_ids=None, output_device=None, **kwargs):
        if all(p.device.type == "cpu" for p in module.parameters()):
            device_ids = output_device = None
        return original(module, device_ids=device_ids, output_device=output_device, **kwargs)

    module.DistributedDataParallel = distributed_data_parallel


class _NumpyWithAliases:
    """numpy, and the aliases that numpy 1.24 and 2.0 have removed."""

    class compat:
        long = int

    int = int

    def __getattr__(self, name: str):
        return getattr(np, name)


def restore_numpy_aliases() -> None:
    """fairseq 0.12.2 and 0.12.3 use ``np.compat.long`` and ``np.int``, gone in numpy 2.0 and 1.24.

    ``data/token_block_dataset.py:125``, ``data/language_pair_dataset.py:292`` and
    ``data/data_utils.py:524,1107``.  Only the name ``np`` of these modules changes, not numpy.
    """
    from fairseq.data import data_utils, language_pair_dataset, token_block_dataset

    for module in (data_utils, language_pair_dataset, token_block_dataset):
        if isinstance(module.np, _NumpyWithAliases):
            continue
        if not hasattr(np, "compat") or "int" not in vars(np):
            module.np = _NumpyWithAliases()


def strip_encoder_fast_path(layer: nn.Module) -> None:
    """Take fairseq 0.12.2's "BetterTransformer" path out of one encoder layer.

    ``modules/transformer_layer.py:71-184`` of 0.12.2 keeps second copies of the layer's weights and
    fills them from ``fc1`` and ``fc2`` when a checkpoint is loaded; a layer with an MoE has neither.
    """
    if not hasattr(layer, "can_use_fastpath"):
        return
    layer.can_use_fastpath = False
    for name in ("in_proj", "out_proj", "fc1", "fc2"):
        for kind in ("weight", "bias"):
            layer._parameters.pop("{}_{}".format(name, kind), None)


def disable_encoder_fast_path(layers: nn.ModuleList) -> None:
    """Keep fairseq 0.12.2 from running a whole encoder batch-first because its first layer could.

    ``models/transformer/transformer_encoder.py`` of 0.12.2 asks only the first layer whether the
    fast path is possible and then transposes the input of all of them, the MoE layers included.
    """
    for layer in layers:
        if hasattr(layer, "can_use_fastpath"):
            layer.can_use_fastpath = False
