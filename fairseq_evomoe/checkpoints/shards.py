"""A checkpoint in several files, one for each of the ranks that the experts are sharded among.

``checkpoint_last.pt`` is a checkpoint of fairseq's without experts, with an index of the set and the experts
of the first rank; ``checkpoint_last-experts1.pt`` has those of the second rank, and so on.  The index names
the set, so that files of different sets are told apart.  Nothing is loaded before all files are checked.
"""

import contextlib
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from fairseq.file_io import PathManager
from torch import Tensor

from ..moe.loading import WIDTHS_OF_SHARD
from ..moe.ranks import ALONE, Ranks
from ..moe.sharding import concat_experts, deal_experts, take_experts
from . import recovery
from .index import EXPERTS, INDEX, NUMBER, DamagedCheckpoint, Index, is_expert, layer_of, name_of, path_of
from .saved_optimizer import LAYOUT, Layout, need_layout, replace


@dataclass
class Shard:
    """The experts of one file.

    Attributes:
        model: weights by their key in the model.
        optimizer: an optimizer's statistics by key and name.
        ema: weights of fairseq's EMA, if there is one.
        ema_fp32: its float32 weights, if it has any.
    """

    model: Dict[str, Tensor] = field(default_factory=dict)
    optimizer: Dict[str, Dict[str, Tensor]] = field(default_factory=dict)
    ema: Dict[str, Tensor] = field(default_factory=dict)
    ema_fp32: Dict[str, Tensor] = field(default_factory=dict)


def file_of(state: Dict[str, Any], index: Index, number: int, shard: Shard) -> Dict[str, Any]:
    """What a file of a set holds.

    Args:
        state: what ``Trainer.state_dict()`` returns; of its experts nothing is used.
        index: of the set.
        number: of the file.
        shard: its experts.
    """
    of_file = {INDEX: index.as_dict(), NUMBER: number, EXPERTS: dict(vars(shard))}
    if number > 0:
        return dict(of_file, extra_state={})  # fairseq writes something there
    state = _without_experts(state, index)
    state.pop(LAYOUT, None)  # the index has it
    return dict(state, **of_file)


def _without_experts(state: Dict[str, Any], index: Index) -> Dict[str, Any]:
    """The state with nothing in place of experts, so that the order of the keys is kept."""

    def drop(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
        return type(tensors)((key, _nothing(key, "", tensor)) for key, tensor in tensors.items())

    state = dict(state, model=drop(state["model"]), extra_state=dict(state["extra_state"]))
    for name in ("ema", "ema_fp32_params"):
        if name in state["extra_state"]:
            state["extra_state"][name] = drop(state["extra_state"][name])
    if state.get("last_optimizer_state") is not None and index.layout is not None:
        state["last_optimizer_state"] = replace(state["last_optimizer_state"], index.layout, _nothing)
    return state


def _nothing(key: str, _: str, tensor: Tensor) -> Tensor:
    return tensor.new_empty(0) if is_expert(key) else tensor


def cut_layout(layout: Layout) -> Layout:
    """A layout from which experts are cut out."""
    sizes = [0 if is_expert(key) else size for key, size in zip(layout.keys, layout.sizes)]
    return Layout(layout.keys, sizes, layout.flat)


_receiver: ContextVar[Ranks] = ContextVar("receiver", default=ALONE)
_checked: ContextVar[bool] = ContextVar("checked", default=False)


@contextlib.contextmanager
def received_by(ranks: Ranks) -> Iterator[None]:
    """Let sets that are loaded within give this rank's experts only; their sums have been checked."""
    tokens = _receiver.set(ranks), _checked.set(True)
    try:
        yield
    finally:
        _receiver.reset(tokens[0])
        _checked.reset(tokens[1])


def load_all_files(
    original: Callable[..., Dict[str, Any]], path: str, *args: Any, **kwargs: Any
) -> Dict[str, Any]:
    """``checkpoint_utils.load_checkpoint_to_cpu`` knows one file, and a checkpoint may have several."""
    with readable(path):
        state = original(path, *args, **kwargs)
    if INDEX in state and not _checked.get():
        recovery.check(path)
    recovery.check_first(state, path)
    if INDEX in state:
        assemble(state, path, _receiver.get())
    return state


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Name the file if what is done within fails because it is not whole, or not the first of its set."""
    try:
        yield
    except Exception as error:
        if not PathManager.exists(path):
            raise
        try:
            recovery.check(path)
        except recovery.UNUSABLE as reason:
            raise reason from error
        raise


def assemble(state: Dict[str, Any], path: str, ranks: Ranks = ALONE) -> None:
    """Put the experts of a set of files into the state that was loaded from its first one, in place.

    Args:
        state: what ``path`` holds.
        path: the first file of the set.
        ranks: those that share the experts from now on; the state gets those of this rank.

    Raises:
        DamagedCheckpoint: a file is missing, damaged or from another set; it is named.
    """
    index = Index.from_dict(state.pop(INDEX), path)
    del state[NUMBER]
    try:
        parts = [Shard(**state.pop(EXPERTS))]
        parts += [_read_shard(path, index, number) for number in range(1, index.files)]
        recovery.check_rows(parts[0].model, index, 0, path)
        _join(state, parts, index, ranks)
        fits = _optimizer_fits(state, index)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, recovery.UNUSABLE):
            raise
        raise DamagedCheckpoint(f"{path} is damaged: its index does not fit what its files hold.") from error
    if not fits:
        raise DamagedCheckpoint(f"{path} is damaged: its index does not fit the optimizer's state.")


def _join(state: Dict[str, Any], parts: List[Shard], index: Index, ranks: Ranks) -> None:
    """Put the experts of all files into the state of the first."""

    def concat(key: str, tensors: Sequence[Tensor]) -> Tensor:
        layer = layer_of(key)
        widths = index.widths[layer]
        wanted = deal_experts(widths, ranks.parallel)[ranks.group_rank] if ranks.parallel > 1 else None
        return concat_experts(name_of(key), tensors, widths, index.experts_of[layer], wanted)

    def fill(tensors: Dict[str, Tensor], kind: str) -> None:
        of_files = [getattr(shard, kind) for shard in parts]
        tensors.update({key: concat(key, [each[key] for each in of_files]) for key in of_files[0]})

    extra = state.get("extra_state") or {}
    for tensors, kind in ((state["model"], "model"), (extra.get("ema"), "ema")):
        if tensors is not None:
            fill(tensors, kind)
            if ranks.parallel > 1:
                for layer, widths in index.widths.items():
                    tensors[f"{layer}.moe.{WIDTHS_OF_SHARD}"] = torch.tensor(widths)
    if extra.get("ema_fp32_params") is not None:
        fill(extra["ema_fp32_params"], "ema_fp32")
    if index.layout is None:
        return
    if state.get("last_optimizer_state") is not None:

        def statistic(key: str, name: str, value: Tensor) -> Tensor:
            return concat(key, [shard.optimizer[key][name] for shard in parts]) if is_expert(key) else value

        state["last_optimizer_state"] = replace(
            state["last_optimizer_state"], cut_layout(index.layout), statistic
        )
    state[LAYOUT] = _filled_layout(index.layout, state["model"]).as_dict()


def _optimizer_fits(state: Dict[str, Any], index: Index) -> bool:
    """Whether the layout is that of the optimizer's state, in a set that says nothing to check it by."""
    optimizer = state.get("last_optimizer_state")
    if index.sealed or index.layout is None or optimizer is None:
        return True
    return Layout.from_dict(state[LAYOUT]).fits(optimizer, state["model"])


def _filled_layout(layout: Layout, model: Dict[str, Tensor]) -> Layout:
    """A layout of a state with the experts that the model has."""
    pairs = zip(layout.keys, layout.sizes)
    sizes = [model[key].numel() if is_expert(key) else size for key, size in pairs]
    return Layout(layout.keys, sizes, layout.flat)


def _read_shard(path: str, index: Index, number: int) -> Shard:
    return Shard(**recovery.load(recovery.find_file(path, index, number))[EXPERTS])


def shard_of_state(state: Dict[str, Any], index: Index, number: int) -> Shard:
    """The experts of one file, out of the state of a checkpoint that has all.

    Args:
        state: of a whole checkpoint.
        index: of the set to make; its ``layout`` is that of ``state``'s optimizer.
        number: of the file.
    """

    def cut(tensors: Optional[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        return {key: take(key, x) for key, x in (tensors or {}).items() if is_expert(key)}

    def take(key: str, whole: Tensor) -> Tensor:
        layer = layer_of(key)
        return take_experts(name_of(key), whole, index.widths[layer], index.experts_of[layer][number])

    extra = state.get("extra_state") or {}
    shard = Shard(cut(state["model"]), {}, cut(extra.get("ema")), cut(extra.get("ema_fp32_params")))
    if state.get("last_optimizer_state") is not None and index.layout is not None:

        def collect(key: str, name: str, value: Tensor) -> Tensor:
            if is_expert(key):
                shape = state["model"][key].shape
                shard.optimizer.setdefault(key, {})[name] = take(key, value.view(shape))
            return value

        replace(state["last_optimizer_state"], index.layout, collect)
    return shard


def files_of(
    state: Dict[str, Any], widths: Dict[str, List[int]], files: int, path: str
) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """A checkpoint that has all experts, as several files.

    Args:
        state: the checkpoint.
        widths: hidden units of each expert, by layer.
        files: how many.
        path: of the first; see ``path_of``.

    Yields:
        path and content of each file in the order to write them in: the first comes last, so that it is there
        when the others are.

    Raises:
        UnknownLayout: the optimizer's state does not tell which of its parts belongs to which parameter.
    """
    history = state.get("optimizer_history") or [{}]
    update = history[-1].get("num_updates", 0)
    index = Index(
        f"{update}-{uuid.uuid4().hex}",
        update,
        widths,
        {layer: deal_experts(layer_widths, files) for layer, layer_widths in widths.items()},
        need_layout(state),
    )
    for number in reversed(range(files)):
        yield path_of(path, number), file_of(state, index, number, shard_of_state(state, index, number))
