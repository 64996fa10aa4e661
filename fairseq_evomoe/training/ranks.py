"""What a fairseq ``Trainer`` must do for experts that are shared out among ranks (expert parallelism).

fairseq leaves parameters with the attribute ``expert`` alone when it adds up gradients (``legacy_ddp``), and
out of the norm of the gradients.  Here the gradients of experts are added up over the ranks that have the
same ones, and the norm is that of all experts on all ranks.
"""

import functools
from datetime import timedelta
from typing import Any, Dict, List, Optional, Set

import torch
import torch.distributed as dist
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.optim import FairseqOptimizer
from fairseq.trainer import Trainer
from torch import Tensor, nn

from ..checkpoints import optimizer_state
from ..models.feed_forward import MoEFeedForward, moe_layers
from ..models.layers import keep_from_ddp, ranks_of, sharded_parameters
from ..moe.ranks import Ranks
from ..moe.sharding import rows_per_expert
from . import waiting
from .state import RunState


def attach_ranks(cfg: FairseqConfig, model: nn.Module) -> Optional[waiting.Pulse]:
    """Let the ranks of a run train the MoE layers of a model together; all ranks must call this.

    Returns:
        the sign of life of this one; ``None`` if it is alone.
    """
    layers = [layer for _, layer in moe_layers(model)]
    if not layers or cfg.distributed_training.distributed_world_size == 1:
        return None
    timeout = waiting.seconds(cfg)
    pulse = waiting.meet(timeout)
    group = distributed_utils.get_data_parallel_group()
    parallel = getattr(cfg.model, "moe_expert_parallel", 1)
    ranks = Ranks.of_group(group, parallel, timedelta(seconds=timeout))
    for layer in layers:
        layer.moe.attach_ranks(ranks)
    keep_from_ddp(model)
    return pulse


def is_sharded(trainer: Trainer) -> bool:
    """Whether other ranks have other experts than this one."""
    return next(sharded_parameters(trainer.get_model()), None) is not None


def clip_grad_norm(trainer: Trainer, clip_norm: float) -> Tensor:
    """Add up the gradients of experts over the ranks that have the same ones, and clip all gradients.

    Returns:
        the norm of the gradients of the whole model, the same on all ranks.
    """
    model = trainer.get_model()
    ranks = ranks_of(model)
    trained = [parameter for _, _, _, parameter in sharded_parameters(model) if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # LayerDrop left the layer out
            parameter.grad = torch.zeros_like(parameter)
    for parameter in trained:
        # as the other gradients: the mean over all ranks of what each rank's loss makes of them
        grad = parameter.grad
        assert grad is not None
        grad.div_(ranks.size)
        if ranks.size > ranks.parallel:
            dist.all_reduce(grad, group=ranks.replica_group)
    aggregate = functools.partial(_whole_norm, trainer.optimizer, set(trained), ranks)
    return trainer.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=aggregate)


def _whole_norm(optimizer: FairseqOptimizer, split: Set[nn.Parameter], ranks: Ranks, norm: Tensor) -> Tensor:
    """The norm of all gradients, of all ranks' experts.

    Args:
        optimizer: fairseq's.
        split: the parameters that other ranks have other rows of.
        ranks: those that share the experts.
        norm: what fairseq makes it: that of the parameters without the attribute ``expert``.
    """
    # the one flat tensor of --fp16 has experts in it, so that fairseq's norm is of no use
    flat = optimizer_state.is_flat(optimizer)
    shared = norm.new_zeros((), dtype=torch.float64) if flat else norm.double().square()
    experts = torch.zeros_like(shared)
    for parameter, grad in optimizer_state.gradients(optimizer):
        if parameter in split:
            experts += grad.float().norm().double().square()
        elif flat:
            shared += grad.float().norm().double().square()
    dist.all_reduce(experts, group=ranks.expert_group)
    return (shared + experts).sqrt().to(norm.dtype)


def broken_parts(trainer: Trainer) -> List[str]:
    """What of the MoE layers has NaN or Inf, on any rank; all ranks must ask.

    The gates that gave any for the last batch and the experts whose weights have any; if there are none, the
    experts whose gradients have any.
    """
    model = trainer.get_model()
    gradient = dict(optimizer_state.gradients(trainer.optimizer))
    causes, gradients = [], []
    for layer_name, layer in moe_layers(model):
        moe = layer.moe
        routing = RunState.of(trainer).routings.get(moe)
        entropy = None if routing is None else routing.gate_entropy
        if entropy is not None and not torch.isfinite(entropy):
            causes.append(f"the gate of {layer_name}")
        if moe.router is None:
            continue
        broken: Dict[str, Set[int]] = {"weights": set(), "gradients": set()}
        for name, parameter in moe.experts.named_parameters(recurse=False):
            rows = rows_per_expert(name, moe.experts.local_widths)
            for kind, tensor in (("weights", parameter.detach()), ("gradients", gradient.get(parameter))):
                parts = () if tensor is None else tensor.view(parameter.shape).split(rows)
                broken[kind].update(
                    expert for expert, part in zip(moe.experts.local, parts) if not torch.isfinite(part).all()
                )
        causes += [f"expert {e} of {layer_name}" for e in sorted(broken["weights"])]
        gradients += [f"the gradients of expert {e} of {layer_name}" for e in broken["gradients"]]
    # where one expert's weights are broken, all gradients are
    ranks = ranks_of(model)
    return _of_all_ranks(ranks, causes) or _of_all_ranks(ranks, gradients)


def _of_all_ranks(ranks: Ranks, names: List[str]) -> List[str]:
    if ranks.size == 1:
        return names
    found: List[Any] = [None] * ranks.size
    dist.all_gather_object(found, (ranks.rank, names), group=ranks.group)
    if ranks.parallel == 1:
        return sorted({name for _, of_rank in found for name in of_rank})
    return [f"{name} (rank {rank})" for rank, of_rank in found for name in of_rank]


def set_dummy_batch(layers: List[MoEFeedForward], idle: bool) -> None:
    """Tell layers whether fairseq's dummy batch comes next, which is not to be routed."""
    for layer in layers:
        layer.is_dummy_batch = idle
