"""A checkpoint in several files, one for each of the ranks that the experts are sharded among.

``checkpoint_last.pt`` is a checkpoint of fairseq's without experts, with an index of the set and the experts
of the first rank; ``checkpoint_last-experts1.pt`` has those of the second rank, and so on.  The index names
the set, so that files of different sets are told apart.  Nothing is loaded before all files are checked.
"""

import contextlib
import inspect
import os
import uuid
import zipfile
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from fairseq.file_io import PathManager
from torch import Tensor

from ..models.feed_forward import CheckpointMismatch
from ..moe.loading import WIDTHS_OF_SHARD
from ..moe.ranks import ALONE, Ranks
from ..moe.sharding import concat_experts, deal_experts, rows_per_expert, take_experts
from .saved_optimizer import LAYOUT, Layout, need_layout, replace

INDEX, EXPERTS = "moe_shards", "moe_experts"
"""Keys of a file's index and of its experts."""

_EXPERTS_OF = ".moe.experts."


class DamagedCheckpoint(CheckpointMismatch):
    """A file of a checkpoint is missing, damaged or from another one."""


@dataclass
class Index:
    """What all files of a set say of it.

    Attributes:
        name: of the set, unlike that of any other.
        update: number of updates that the model has made.
        widths: hidden units of each expert, by layer.
        experts_of: numbers of the experts in each file, by layer.
        layout: of the optimizer's state in the first file, before the experts' was cut out of it; ``None`` if
            it is not known, and then there is no such state.
    """

    name: str
    update: int
    widths: Dict[str, List[int]]
    experts_of: Dict[str, List[List[int]]]
    layout: Optional[Layout] = None

    @property
    def files(self) -> int:
        """Number of files."""
        return len(next(iter(self.experts_of.values())))

    def as_dict(self) -> Dict[str, Any]:
        """Plain values, which torch loads without trusting the file."""
        layout = None if self.layout is None else self.layout.as_dict()
        return dict(vars(self), layout=layout)

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> "Index":
        """The inverse of ``as_dict``."""
        layout = values["layout"]
        return cls(**dict(values, layout=None if layout is None else Layout.from_dict(layout)))


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


def is_expert(key: str) -> bool:
    """Whether a key of a model is that of a tensor that has rows for each expert."""
    return _EXPERTS_OF in key and "." not in key.split(_EXPERTS_OF)[1]


def layer_of(key: str) -> str:
    """The layer that a tensor of experts belongs to."""
    return key.split(_EXPERTS_OF)[0]


def name_of(key: str) -> str:
    """The name of a tensor of experts in its layer: ``w1``, ``b1``, ..."""
    return key.split(_EXPERTS_OF)[1]


def path_of(path: str, number: int) -> str:
    """The path of a file of a set whose first file is at ``path``."""
    return path if number == 0 else "{}{}.pt".format(path[: -len(".pt")], suffix_of(number))


def suffix_of(number: int) -> str:
    """What the name of a file of a set has before its ending."""
    return f"-experts{number}" if number > 0 else ""


def file_of(state: Dict[str, Any], index: Index, number: int, shard: Shard) -> Dict[str, Any]:
    """What a file of a set holds.

    Args:
        state: what ``Trainer.state_dict()`` returns; of its experts nothing is used.
        index: of the set.
        number: of the file.
        shard: its experts.
    """
    of_file = {INDEX: index.as_dict(), "moe_shard": number, EXPERTS: dict(vars(shard))}
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


@contextlib.contextmanager
def received_by(ranks: Ranks) -> Iterator[None]:
    """Let sets that are loaded within give this rank's experts only."""
    token = _receiver.set(ranks)
    try:
        yield
    finally:
        _receiver.reset(token)


def load_all_files(
    original: Callable[..., Dict[str, Any]], path: str, *args: Any, **kwargs: Any
) -> Dict[str, Any]:
    """``checkpoint_utils.load_checkpoint_to_cpu`` knows one file, and a checkpoint may have several."""
    with readable(path):
        state = original(path, *args, **kwargs)
    if INDEX in state:
        assemble(state, path, _receiver.get())
    return state


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Name the file if what is done within fails because it is not whole."""
    try:
        yield
    except Exception as error:
        local = PathManager.get_local_path(path)
        if not os.path.isfile(local) or zipfile.is_zipfile(local):  # which has its directory at its end
            raise
        raise DamagedCheckpoint(f"{path} cannot be read: it is truncated, or no checkpoint.") from error


def assemble(state: Dict[str, Any], path: str, ranks: Ranks = ALONE) -> None:
    """Put the experts of a set of files into the state that was loaded from its first one, in place.

    Args:
        state: what ``path`` holds.
        path: the first file of the set.
        ranks: those that share the experts from now on; the state gets those of this rank.

    Raises:
        DamagedCheckpoint: a file is missing, damaged or from another set; it is named.
    """
    index = Index.from_dict(state.pop(INDEX))
    if state.pop("moe_shard") != 0:
        raise DamagedCheckpoint(
            "{} has a part of the experts of a checkpoint: give its first file, without {} in its "
            "name.".format(path, suffix_of(1)[:-1] + "N")
        )
    parts = [Shard(**state.pop(EXPERTS))]
    parts += [_read_shard(path, index, number) for number in range(1, index.files)]
    for number, shard in enumerate(parts):
        _check_shard(shard, parts[0], index, number, path_of(path, number))

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


def _filled_layout(layout: Layout, model: Dict[str, Tensor]) -> Layout:
    """A layout of a state with the experts that the model has."""
    pairs = zip(layout.keys, layout.sizes)
    sizes = [model[key].numel() if is_expert(key) else size for key, size in pairs]
    return Layout(layout.keys, sizes, layout.flat)


def _read_shard(path: str, index: Index, number: int) -> Shard:
    path = path_of(path, number)
    if not PathManager.exists(path):
        raise DamagedCheckpoint(
            f"{path} is missing: the checkpoint has {index.files} files, which belong together."
        )
    with readable(path):
        state = _load_lazily(path)
    if INDEX not in state or state["moe_shard"] != number or state[INDEX]["name"] != index.name:
        update = state[INDEX]["update"] if INDEX in state else "unknown"
        raise DamagedCheckpoint(
            f"{path} belongs to another checkpoint (update {update}) than {path_of(path, 0)} (update "
            f"{index.update}): put the files of one checkpoint there."
        )
    return Shard(**state[EXPERTS])


def _load_lazily(path: str) -> Dict[str, Any]:
    # torch >= 2.1 can leave tensors in the file until they are used, so that a rank reads what it keeps
    lazily = {"mmap": True} if "mmap" in inspect.signature(torch.load).parameters else {}
    return torch.load(PathManager.get_local_path(path), map_location="cpu", **lazily)


def _check_shard(shard: Shard, first: Shard, index: Index, number: int, path: str) -> None:
    for layer, widths in index.widths.items():
        experts = index.experts_of[layer][number]
        keys = {key for key in first.model if layer_of(key) == layer}
        rows = {key: sum(rows_per_expert(name_of(key), [widths[e] for e in experts])) for key in keys}
        found = {key: len(tensor) for key, tensor in shard.model.items() if layer_of(key) == layer}
        if found != rows:
            raise DamagedCheckpoint(
                f"{path} has other experts of {layer} than the checkpoint's index says: it is damaged."
            )


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


def is_whole(path: Path) -> bool:
    """Whether a local file is a checkpoint that can be read, with all files that belong to it."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with readable(str(path)):
            state = _load_lazily(str(path))
        if state.get("moe_shard", 0) != 0 or "model" not in state:
            return False
        if INDEX in state:
            index = Index.from_dict(state[INDEX])
            for number in range(1, index.files):
                _read_shard(str(path), index, number)
    except DamagedCheckpoint:
        return False
    return True


def newest_whole(path: str) -> Optional[str]:
    """The newest whole checkpoint in the folder of a local one: itself, if it is whole."""
    others = sorted(Path(path).parent.glob("checkpoint*.pt"), key=lambda file: -file.stat().st_mtime)
    found = (file for file in [Path(path)] + others if file.is_file() and is_whole(file))
    return next((str(file) for file in found), None)
