"""``evomoe info``: what a checkpoint is, and what its model costs, without any data."""

import argparse
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from torch import Tensor

from ..config.config import MoEConfig
from ..config.errors import ConfigError
from ..config.resolve import resolve
from ..evolution.plateau import Plateau
from ..moe.routers import ROUTERS
from . import versions
from .flop import (
    Active,
    Figures,
    Flop,
    active_parameters,
    bytes_of,
    experts_of_token,
    flop,
    heads_of,
    layer_parameters,
)
from .index import is_expert, is_low_rank
from .merge import Layer, moe_layers_of
from .opening import Opened, open_checkpoint, size_of
from .saved_options import SPAWNED_BEFORE, SavedOptions


@dataclass(frozen=True)
class LayerInfo:
    """An MoE layer.

    Attributes:
        name: such as ``decoder.layers.1``.
        experts: number of them.
        widths: hidden units of each.
        dim: width of what they are given.
        parameters: of all of them.
        gated: whether they have a third matrix.
        heads: into how many parts a token is divided.
    """

    name: str
    experts: int
    widths: List[int]
    dim: int
    parameters: int
    gated: bool
    heads: int


@dataclass(frozen=True)
class Info:
    """What ``evomoe info --json`` prints, under these names.

    Attributes:
        path: of the first file.
        files: number of files.
        bytes: of all files.
        parts: bytes of ``experts``, ``routers``, ``rest of the model``, ``optimizer`` and ``ema``.
        architecture: name of the model.
        task: name of the task.
        criterion: name of the criterion.
        preset: of the options; ``None`` if there was none.
        router: its name; ``None`` for a dense model.
        options: of the MoE layers, resolved; empty for a dense model.
        not_defaults: names of those that are not what the router has by default.
        unresolved: why the options could not be resolved; ``None``: they were.
        update: number of updates.
        epoch: of the next batch; ``None`` if it is not known.
        best: the best result of a validation so far; ``None`` if there was none.
        stage: in words.
        temperature: of the gate in training; ``None`` if there is none.
        layers: those with experts.
        experts_per_token: in evaluation.
        parameters: all.
        active_parameters: that a token uses; without tables.
        table_parameters: rows of which are looked up.
        optimizer: its name; ``None`` if the checkpoint has no state of it.
        optimizer_bytes: of its statistics.
        flop_per_token: see ``flop.py``.
        saved_with: versions; empty if the checkpoint does not say it.
        here: versions.
        obstacles: why a run cannot simply go on from it here; empty if nothing is known.
    """

    path: str
    files: int
    bytes: int
    parts: Dict[str, int]
    architecture: Optional[str]
    task: Optional[str]
    criterion: Optional[str]
    preset: Optional[str]
    router: Optional[str]
    options: Dict[str, Any]
    not_defaults: List[str]
    unresolved: Optional[str]
    update: int
    epoch: Optional[int]
    best: Optional[float]
    stage: str
    temperature: Optional[float]
    layers: List[LayerInfo]
    experts_per_token: Optional[Active]
    parameters: int
    active_parameters: Figures
    table_parameters: int
    optimizer: Optional[str]
    optimizer_bytes: int
    flop_per_token: Flop
    saved_with: Dict[str, str] = field(default_factory=dict)
    here: Dict[str, str] = field(default_factory=dict)
    obstacles: List[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> None:
    """``evomoe info``."""
    info = info_of(args.checkpoint)
    if args.json:
        print(json.dumps(asdict(info), indent=2, default=str))
    else:
        from .info_text import text

        print(text(info))


def info_of(path: str) -> Info:
    """What a checkpoint is: of a dense model, of one with experts, in one file or several, of any version.

    Raises:
        CommandError: it is no checkpoint.
        DamagedCheckpoint: it cannot be read.
    """
    opened = open_checkpoint(path)
    state, options = opened.state, SavedOptions(opened.state)
    layers = moe_layers_of(state, one_expert=True) if any(map(is_expert, opened.model)) else []
    low_rank = any(map(is_low_rank, opened.model))
    config, unresolved = _resolved(options) if layers or low_rank else (None, None)
    update = _update(state)
    spawned = any(not layer.alone for layer in layers)
    most = max((len(layer.widths) for layer in layers), default=0)
    stage, temperature = "low-rank experts beside a dense model" if low_rank else "dense model", None
    if layers:
        stage, temperature = _stage(config, state, update, most * spawned)
    parameters, tables = opened.parameters(), _tables(layers, options)
    total, in_tables = _count(parameters), sum(opened.model[key].numel() for key in tables)
    active = _active(options, layers, spawned)
    names = _names(state, options)
    history = state.get("optimizer_history") or [{}]
    extra = state.get("extra_state") or {}
    has_state = state.get("last_optimizer_state") is not None
    return Info(
        path=path,
        files=len(opened.files),
        bytes=size_of(opened.files),
        parts=_parts(opened),
        architecture=names["architecture"],
        task=names["task"],
        criterion=names["criterion"],
        preset=options.given.get("preset"),
        router=options.router if layers else None,
        options=_words(config.flat() if config else options.given) if layers or low_rank else {},
        not_defaults=[] if config is None else _not_defaults(config, options),
        unresolved=unresolved,
        update=update,
        epoch=(extra.get("train_iterator") or {}).get("epoch"),
        best=_number(extra.get("best")),
        stage=stage,
        temperature=temperature,
        layers=[_layer(layer) for layer in layers],
        experts_per_token=active if layers else None,
        parameters=total,
        active_parameters=active_parameters(total, in_tables, layers, active),
        table_parameters=in_tables,
        optimizer=history[-1].get("optimizer_name") if has_state else None,
        optimizer_bytes=bytes_of(opened.optimizer_tensors()),
        flop_per_token=flop(opened.model, layers, active, tables),
        saved_with=versions.saved_in(state),
        here=versions.here(),
        obstacles=_obstacles(state, options, layers, unresolved),
    )


def _resolved(options: SavedOptions) -> Tuple[Optional[MoEConfig], Optional[str]]:
    """The options, and why they cannot be resolved; one of both is there."""
    if not options.found:
        return None, "The checkpoint does not say its options."
    try:
        return _resolve(options, options.given), None
    except (ConfigError, ValueError) as error:
        return None, " ".join(str(error).split())


def _resolve(options: SavedOptions, given: Dict[str, Any], check: bool = True) -> MoEConfig:
    """What some of our options mean in the model of a checkpoint."""
    sides = [options.of_model(side + "_ffn_embed_dim", None) for side in ("encoder", "decoder")]
    return resolve(
        given,
        ffn_dims=[int(dim) for dim in sides if dim is not None],
        seed=int(options.of_model("seed", 1)),
        max_update=int(options.of_model("max_update", 0)),
        check=check,
    )


def _not_defaults(config: MoEConfig, options: SavedOptions) -> List[str]:
    defaults = _resolve(options, {"router": config.router}, check=False).flat()
    return [name for name, value in config.flat().items() if value != defaults[name]]


def _stage(
    config: Optional[MoEConfig], state: Mapping[str, Any], update: int, experts: int
) -> Tuple[str, Optional[float]]:
    """The stage in words, and the gate's temperature in training; of a layer with so many experts, 0: one."""
    if experts == 0:
        return "one expert", None
    if config is None:
        return "experts have spawned", None
    spawned = _spawned_by_itself(config, state["model"])
    schedule, router = config.make_schedule(spawned), config.router_class
    stage = max(sum(each.experts <= experts for each in config.stages), 1)
    before = (state.get("extra_state") or {}).get(SPAWNED_BEFORE, 0)
    if before is True:  # options of later versions say it
        schedule = schedule.long_after(stage)
    since = f", spawned at a plateau before update {', '.join(map(str, spawned))}" if spawned else ""
    if len(config.stages) > 1:
        since += f", stage {stage} of {len(config.stages)}"
    words = config.in_words(schedule.phase(update, stage)) + since
    return words, schedule.temperature(update, stage) if router.stages and router.anneals else None


def _spawned_by_itself(config: MoEConfig, model: Mapping[str, Tensor]) -> List[int]:
    """The updates before which experts have spawned at a plateau."""
    plateau = config.make_plateau()
    saved = {name: x for name in Plateau.KEYS for key, x in model.items() if key.endswith(name)}
    if plateau is None or len(saved) < len(Plateau.KEYS):
        return []
    plateau.load(saved)
    return plateau.spawned


def _active(options: SavedOptions, layers: List[Layer], spawned: bool) -> Active:
    if not layers or not spawned:
        return Active(1, 1, 1)
    experts = max(len(layer.widths) for layer in layers)
    if options.router not in ROUTERS:
        return Active(0, experts, None)
    return experts_of_token(ROUTERS[options.router], options, experts)


def _tables(layers: List[Layer], options: SavedOptions) -> List[str]:
    """Names of the tables of routers: what has a row for each entry of the vocabulary."""
    table = options.router in ROUTERS and "gate_input" in ROUTERS[options.router].Options.declared()
    names = ["embedding_VL"] + (["token_weight"] if table and options["gate_input"].value == "table" else [])
    return [
        f"{layer.name}.moe.{key}"
        for layer in layers
        for key in layer.tensors
        if key.startswith("router.") and key.rpartition(".")[2] in names
    ]


def _layer(layer: Layer) -> LayerInfo:
    tensors = layer.expert_tensors
    return LayerInfo(
        name=layer.name,
        experts=len(layer.widths),
        widths=list(layer.widths),
        dim=tensors["w1"].shape[1],
        parameters=layer_parameters(layer),
        gated="w3" in tensors,
        heads=heads_of(layer),
    )


def _parts(opened: Opened) -> Dict[str, int]:
    """Bytes of the parts of a checkpoint's files."""
    extra = opened.state.get("extra_state") or {}
    ema = [*(extra.get("ema") or {}).values(), *(extra.get("ema_fp32_params") or {}).values()]
    model = opened.model
    experts = {key for key in model if is_expert(key) or is_low_rank(key)}
    routers = {key for key in model if ".moe.router." in key}
    shared = {key: x for key, x in model.items() if key not in experts | routers}
    return {
        "experts": bytes_of(model[key] for key in experts),
        "routers": bytes_of(model[key] for key in routers),
        "rest of the model": bytes_of(shared.values()),
        "optimizer": bytes_of(opened.optimizer_tensors()),
        "ema": bytes_of(x for x in ema if torch.is_tensor(x)),
    }


def _obstacles(
    state: Mapping[str, Any], options: SavedOptions, layers: List[Layer], unresolved: Optional[str]
) -> List[str]:
    """What keeps a run from simply going on from a checkpoint, here."""
    found = []
    registries = {"architecture": ARCH_MODEL_REGISTRY, "task": TASK_REGISTRY, "criterion": CRITERION_REGISTRY}
    for kind, name in _names(state, options).items():
        if name is not None and name not in registries[kind]:
            found.append(f"there is no {kind} {name} here: give the --user-dir that registers it")
    if not options.found:
        found.append("it does not say its options: give all of them")
    if layers and options.router not in ROUTERS:
        found.append(f"there is no router {options.router} here: give the --user-dir that registers it")
    elif unresolved is not None and options.found:
        found.append(f"its options are refused: {unresolved}")
    if state.get("last_optimizer_state") is None:
        found.append("it has no state of the optimizer: give --reset-optimizer or --finetune-from-model")
    return found


def _update(state: Mapping[str, Any]) -> int:
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0) or 0)


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _names(state: Mapping[str, Any], options: SavedOptions) -> Dict[str, Optional[str]]:
    """What fairseq calls the parts of the run; its oldest checkpoints have them all in one namespace."""
    found = {"architecture": options.of_model("_name", options.of_model("arch", None))}
    for kind in ("task", "criterion"):
        part = (state.get("cfg") or {}).get(kind)
        name = part.get("_name") if isinstance(part, dict) else None
        found[kind] = name or options.of_model(kind, None)
    return {kind: None if name is None else str(name) for kind, name in found.items()}


def _number(value: Any) -> Optional[float]:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _words(options: Mapping[str, Any]) -> Dict[str, Any]:
    return {name: getattr(value, "value", value) for name, value in options.items()}
