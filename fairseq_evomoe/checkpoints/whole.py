"""Checkpoints of a fairseq ``Trainer`` whose experts are sharded: each rank has some of them.

A checkpoint has all experts, in one file or in several, so that any number of ranks can load it.
"""

import contextlib
import logging
import math
import os
import uuid
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, TypeVar

import torch
import torch.distributed as dist
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from torch import Tensor, nn

from ..models.layers import moe_layers, ranks_of, sharded_parameters
from ..moe import MoELayer
from ..moe.ranks import ALONE
from ..moe.sharding import deal_experts, rows_per_expert
from . import optimizer_state, recovery, shards
from .index import INDEX, DamagedCheckpoint, Index, UnreadableCheckpoint, is_expert, path_of
from .saved_optimizer import LAYOUT, Layout, replace

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Result = TypeVar("_Result")


class WholeExperts(shards.Shard):
    """All experts, gathered on the rank that writes checkpoints, on the CPU."""

    def fill(self, state: Dict[str, Any], layout: Layout) -> None:
        """Replace this rank's experts in a state of fairseq's Trainer by all experts.

        Args:
            state: what ``Trainer.state_dict()`` returns.
            layout: of its optimizer's state.
        """
        state["model"].update(self.model)
        extra = state["extra_state"]
        if "ema" in extra:
            extra["ema"].update(self.ema)
        if "ema_fp32_params" in extra:
            extra["ema_fp32_params"] = {**extra["ema_fp32_params"], **self.ema_fp32}
        if state.get("last_optimizer_state") is not None:
            state["last_optimizer_state"] = replace(
                state["last_optimizer_state"],
                layout,
                lambda key, name, local: self.optimizer.get(key, {}).get(name, local),
            )


def local_statistics(trainer: Trainer) -> Dict[str, Dict[str, Tensor]]:
    """The optimizer's statistics of the sharded parameters, by key and name, of this rank's rows."""
    if trainer.cfg.checkpoint.no_save_optimizer_state:
        return {}
    states = optimizer_state.read(trainer.optimizer)
    return {
        key: {
            name: value
            for name, value in states[parameter].statistics.items()
            if torch.is_tensor(value) and value.dim() > 0
        }
        for key, _, _, parameter in sharded_parameters(trainer.get_model())
        if parameter in states
    }


def gather_whole(trainer: Trainer) -> WholeExperts:
    """Gather all experts on the first rank, and nothing on the others; all ranks must call this."""
    whole = WholeExperts()
    model = trainer.get_model()
    ranks = ranks_of(model)
    if ranks.rank >= ranks.parallel:  # these have copies
        return whole
    statistics = local_statistics(trainer)
    ema = trainer.ema if trainer.cfg.ema.store_ema else None
    ema_tensors = {} if ema is None else ema.get_model().state_dict()
    for key, moe, name, parameter in sharded_parameters(model):
        _gather_into(whole.model, key, moe, name, parameter.detach())
        for statistic, local in statistics.get(key, {}).items():
            _gather_into(whole.optimizer.setdefault(key, {}), statistic, moe, name, local)
        if ema is not None:
            _gather_into(whole.ema, key, moe, name, ema_tensors[key])
            if key in ema.fp32_params:
                _gather_into(whole.ema_fp32, key, moe, name, ema.fp32_params[key])
    return whole


def _gather_into(result: Dict[str, Tensor], key: str, moe: MoELayer, name: str, local: Tensor) -> None:
    tensor = moe.gather_rows(name, local, to=0)
    if tensor is not None:
        result[key] = tensor.cpu()


def name_set(trainer: Trainer) -> str:
    """A name for the set of files that a checkpoint will be; all ranks must call this and get the same."""
    update = trainer.get_num_updates()
    return _of_first_rank(trainer, lambda update: f"{update}-{uuid.uuid4().hex}", update)


def shard_of(trainer: Trainer, state: Dict[str, Any], name: str) -> Dict[str, Any]:
    """What this rank writes of a checkpoint in several files.

    Args:
        trainer: fairseq's.
        state: what its ``state_dict()`` returns without us.
        name: of the set of files.
    """
    model = trainer.get_model()
    layers = {name: layer.moe.experts.widths for name, layer in moe_layers(model) if layer.moe.sharded}
    ranks = ranks_of(model)
    index = Index(
        name,
        trainer.get_num_updates(),
        layers,
        {layer: deal_experts(widths, ranks.parallel) for layer, widths in layers.items()},
        layout_of(trainer),
    )
    extra = state["extra_state"]
    pick = lambda tensors: {k: x for k, x in tensors.items() if is_expert(k)}  # noqa: E731
    shard = shards.Shard(
        pick(state["model"]),
        local_statistics(trainer),
        pick(extra.get("ema", {})),
        pick(extra.get("ema_fp32_params", {})),
    )
    return shards.file_of(state, index, ranks.group_rank, shard)


@contextlib.contextmanager
def loading(trainer: Trainer, path: str) -> Iterator[str]:
    """Load a checkpoint within; all ranks must call this.

    It is checked to the last bit before.  Of one in several files each rank loads what it needs.  A run that
    goes on by itself, because it is started again or torchrun restarts it, takes the newest whole checkpoint
    in place of one that is not whole.

    Yields:
        the path to load.

    Raises:
        DamagedCheckpoint: the checkpoint is not whole; it tells which one is.
    """
    ranks = ranks_of(trainer.get_model())
    if any(True for _ in moe_layers(trainer.get_model())):  # others are fairseq's own business
        path = _whole_one(trainer, path)
    options = trainer.cfg.checkpoint
    on_all_ranks = options.load_checkpoint_on_all_dp_ranks
    sharded = ranks.parallel > 1 and PathManager.exists(path_of(path, 1))
    try:
        options.load_checkpoint_on_all_dp_ranks = on_all_ranks or sharded
        with shards.received_by(ranks if sharded else ALONE):
            yield path
    finally:
        options.load_checkpoint_on_all_dp_ranks = on_all_ranks


def _whole_one(trainer: Trainer, path: str) -> str:
    """The path of a whole checkpoint: the one that is to be loaded, or what takes its place.

    Raises:
        DamagedCheckpoint: it is not whole, and nothing may take its place; it tells what the user may give.
    """
    files, fault, may_replace = _of_first_rank(trainer, _settled_files, path)
    own = files[trainer.data_parallel_rank :: trainer.data_parallel_world_size]
    faults = [fault] + [recovery.fault_of_file(file) for file in own]
    fault = next((x for x in _of_all_ranks(trainer, faults) if x is not None), None)
    if fault is None:
        return path
    if not may_replace:
        raise UnreadableCheckpoint(fault)
    whole = _of_first_rank(trainer, recovery.newest_whole, path)
    if whole is None:
        way_out = "move it away to begin anew" if is_last(trainer, path) else "give another"
        raise DamagedCheckpoint(f"{fault} There is no whole one in its folder: {way_out}.")
    if _goes_on_by_itself(trainer, path):
        logger.warning(f"{path} is not whole: the run goes on from {whole} ({fault})")
        return whole
    option = "--finetune-from-model" if trainer.cfg.checkpoint.finetune_from_model else "--restore-file"
    raise DamagedCheckpoint(f"{fault} The newest whole one there is {whole}: give {option} {whole}.")


def _settled_files(path: str) -> Tuple[List[str], Optional[str], bool]:
    """The files of a checkpoint, all of which have their names then.

    Returns:
        where they are; what is wrong if they are not all there; whether another checkpoint may be taken then.
    """
    if not PathManager.isfile(path):
        return [], None, False  # fairseq begins anew, or hooks refuse to
    recovery.settle_all(path)
    try:
        return recovery.files_of_checkpoint(path), None, True
    except recovery.UNUSABLE as error:
        return [], str(error), isinstance(error, DamagedCheckpoint)


def _goes_on_by_itself(trainer: Trainer, path: str) -> bool:
    """Whether nobody has asked for that checkpoint and no other."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return restarted or is_last(trainer, path)


def is_last(trainer: Trainer, path: str) -> bool:
    """Whether a path is that of the checkpoint that fairseq looks for if it is not told any."""
    options = trainer.cfg.checkpoint
    name = f"checkpoint_last{trainer.checkpoint_suffix}.pt"
    return options.restore_file == "checkpoint_last.pt" and path == os.path.join(options.save_dir, name)


def note_ranks(trainer: Trainer, extra_state: Dict[str, Any]) -> None:
    """Note in what fairseq saves beside the model how many ranks the position in the data is one of."""
    if "train_iterator" in extra_state:
        extra_state["train_iterator"]["num_shards"] = trainer.data_parallel_world_size


def move_to_position(trainer: Trainer, extra_state: Optional[Dict[str, Any]]) -> None:
    """Let a run on another number of ranks than before go on at the same place in the data.

    fairseq's position (``data/iterators.py``) counts the batches of each rank.
    """
    position = (extra_state or {}).get("train_iterator", {})
    before, now = position.get("num_shards"), trainer.data_parallel_world_size
    if before in (None, now):
        return
    consumed = position["iterations_in_epoch"] * before
    position["iterations_in_epoch"] = consumed // now
    if consumed % now:
        logger.warning(
            f"{consumed} batches of the epoch were used by {before} ranks, which {now} ranks cannot have "
            f"used evenly: the last {consumed % now} are used once more"
        )


def _of_first_rank(trainer: Trainer, function: Callable[[_T], _Result], argument: _T) -> _Result:
    """What a function returns on the first rank, on all ranks, which must all call this."""
    if trainer.data_parallel_world_size == 1:
        return function(argument)
    result: List[Any] = [function(argument) if trainer.data_parallel_rank == 0 else None]
    dist.broadcast_object_list(result, src=0, group=trainer.data_parallel_process_group)
    return result[0]


def _of_all_ranks(trainer: Trainer, values: List[_T]) -> List[_T]:
    """The values of all ranks, which must all call this."""
    if trainer.data_parallel_world_size == 1:
        return values
    told: List[Any] = [None] * trainer.data_parallel_world_size
    dist.all_gather_object(told, values, group=trainer.data_parallel_process_group)
    return [value for of_rank in told for value in of_rank]


def layout_of(trainer: Trainer, all_experts: bool = False) -> Layout:
    """The layout of the state of a Trainer's optimizer.

    Args:
        trainer: fairseq's.
        all_experts: whether the state is of all experts instead of this rank's.
    """
    key_of = {parameter: key for key, parameter in trainer.get_model().named_parameters()}
    for key, parameter in trainer.get_criterion().named_parameters():
        key_of.setdefault(parameter, "criterion." + key)
    sharded = {key: (moe, name) for key, moe, name, _ in sharded_parameters(trainer.get_model())}
    parameters = optimizer_state.in_order(trainer.optimizer)
    keys, sizes = [key_of[p] for p in parameters], [p.numel() for p in parameters]
    if all_experts:
        sizes = [
            _size_of_all_experts(*sharded[key], parameter) if key in sharded else size
            for key, parameter, size in zip(keys, parameters, sizes)
        ]
    return Layout(keys, sizes, optimizer_state.is_flat(trainer.optimizer))


def _size_of_all_experts(moe: MoELayer, name: str, parameter: Tensor) -> int:
    return sum(rows_per_expert(name, moe.experts.widths)) * math.prod(parameter.shape[1:])


def note_layout(trainer: Trainer, state: Dict[str, Any]) -> None:
    """Say in a checkpoint of a model with MoE layers which part of the optimizer's state is whose.

    Args:
        trainer: fairseq's.
        state: what is saved in one file, of all experts; of several files the index says it.
    """
    if any(True for _ in moe_layers(trainer.get_model())) and INDEX not in state:
        state[LAYOUT] = layout_of(trainer, all_experts=True).as_dict()


def local_optimizer_state(trainer: Trainer, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """What a rank needs of the state of an optimizer of all experts, such as one of a checkpoint.

    A state that has this rank's part already stays as it is.
    """
    sharded = {key: (moe, name, p) for key, moe, name, p in sharded_parameters(trainer.get_model())}

    def local(key: str, _: str, statistic: Tensor) -> Tensor:
        if key not in sharded:
            return statistic
        moe, name, parameter = sharded[key]
        if statistic.numel() == parameter.numel():
            return statistic
        return moe.local_rows(name, statistic.view((-1,) + parameter.shape[1:]))

    return replace(state_dict, layout_of(trainer, all_experts=True), local)


def local_tensors(model: nn.Module, tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A state of a model of which this rank's experts are taken, such as the float32 weights of an EMA."""
    result = dict(tensors)
    for key, moe, name, parameter in sharded_parameters(model):
        if key in result and result[key].shape != parameter.shape:
            result[key] = moe.local_rows(name, result[key])
    return result
