"""Checkpoints of other fairseqs with experts as ones of ours.

The branches ``moe`` and ``nllb`` of fairseq, and the fork of EvoMoE's authors, which comes from the first,
write what ranks have in common into ``*-shared.pt`` and each rank's experts into ``*-rank-N.pt``.  A layer
has ``moe_layer.gate.wg.weight`` and, numbered on each rank anew, ``moe_layer.experts.0.fc1.weight``, ...
"""

import re
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from torch import Tensor

from ..config.errors import PREFIX, ConfigError
from ..config.resolve import resolve
from ..moe.experts import from_dense
from . import recovery
from .files import CommandError

_EXPERT = re.compile(r"(.+\.layers\.(\d+))\.moe_layer\.experts\.(\d+)\.(fc[12]\.(?:weight|bias))")
_GATE = re.compile(r"(.+\.layers\.\d+)\.moe_layer\.(?:gate\.)?wg\.weight")
_ALL_WEIGHTED = re.compile(r".+\.moe_layer\.wg\.weight")  # the authors' layer that asks all experts
_RANK = re.compile(r"-rank-(\d+)")
_DROPPED = ("_float_tensor",)  # a buffer of sinusoidal embeddings that fairseq has since given up

_CRITERIONS = {
    "evomoe_lm": "evomoe_cross_entropy",
    "evomoe_roberta": "evomoe_masked_lm",
    "evomoe_transformer": "evomoe_label_smoothed_cross_entropy",
}
_TASKS = {
    "evomoe_lm": "language_modeling",
    "evomoe_roberta": "masked_lm",
    "evomoe_transformer": "translation",
}


def read_fairseq_moe(paths: Sequence[str]) -> Dict[str, Any]:
    """A checkpoint of ours, without an optimizer's state.

    In evaluation those branches leave out tokens for which an expert has no room
    (``moe_eval_capacity_token_fraction``); here none is left out.  In training the capacity is theirs.

    Args:
        paths: the file that all ranks have in common and those of the ranks, in their order; or one file
            with everything.

    Raises:
        CommandError: they are no such files, or not all of them.
    """
    _check_order(paths)
    states = [recovery.load(path) for path in paths]
    tensors, experts = _collect(paths, states)
    options = _options_of(states)
    name = _model_of(tensors)
    gates = {_match(_GATE, key)[1]: key for key in tensors if _GATE.fullmatch(key)}
    values = _router_of(options, any(_ALL_WEIGHTED.fullmatch(key) for key in tensors))
    for layer, networks in experts.items():
        gate = tensors.pop(gates.pop(layer, ""), None)
        count = len(networks)
        if gate is None or gate.shape[0] != count:
            found = "no gate" if gate is None else f"a gate for {gate.shape[0]} experts"
            raise CommandError(
                f"{layer} has {found}, and the files have {count}: give the shared file and those of all "
                "ranks that have experts, each once."
            )
        prefix = f"{layer}.moe."
        tensors[prefix + "router.weight"] = gate
        for dense in networks[0]:
            parts = [from_dense(dense, networks[number][dense]) for number in range(count)]
            tensors[f"{prefix}experts.{parts[0][0]}"] = torch.cat([part for _, part in parts])
    left = [key for key in tensors if ".moe_layer." in key]
    if left:
        raise CommandError(f"{left[0]} has no counterpart here: the checkpoint cannot be imported.")
    values.update(experts=max(map(len, experts.values())), freq=_freq(experts, tensors), spawn_update=0)
    history: List[Any] = next(
        (state["optimizer_history"] for state in states if state.get("optimizer_history")), [{}]
    )
    return {
        "args": None,
        "cfg": _configuration(name, options, values),
        "model": {key: x for key, x in tensors.items() if not key.endswith(_DROPPED)},
        "optimizer_history": [
            {"num_updates": history[-1].get("num_updates", 0), "optimizer_name": "", "lr_scheduler_state": {}}
        ],
        "task_state": {},
        "extra_state": {},
    }


def _check_order(paths: Sequence[str]) -> None:
    ranks = [int(found[1]) for found in (_RANK.search(Path(path).name) for path in paths) if found]
    if ranks != sorted(set(ranks)):
        raise CommandError(
            "The files of the ranks are not in order, or one is there twice: give each once, by rank."
        )


_Experts = Dict[str, Dict[int, Dict[str, Tensor]]]


def _collect(paths: Sequence[str], states: Sequence[Any]) -> Tuple[Dict[str, Tensor], _Experts]:
    """What is no expert, and by layer and number, counted over all ranks, what is one."""
    tensors: Dict[str, Tensor] = {}
    experts: _Experts = {}
    for path, state in zip(paths, states):
        model = state.get("model") if isinstance(state, dict) else None
        if not isinstance(model, dict):
            raise CommandError(f"{path} has no tensors of a model: give files of a checkpoint.")
        before = {layer: len(networks) for layer, networks in experts.items()}
        for key, tensor in model.items():
            found = _EXPERT.fullmatch(key)
            if found is None:
                tensors[key] = tensor
                continue
            layer, number = found[1], before.get(found[1], 0) + int(found[3])
            experts.setdefault(layer, {}).setdefault(number, {})[found[4]] = tensor
    if not experts:
        raise CommandError(
            "The files have no experts (moe_layer.experts.N.fc1): give the shared file and the ranks'."
        )
    for layer, networks in experts.items():
        whole = sorted(networks) == list(range(len(networks)))
        if not whole or any(len(network) != 4 for network in networks.values()):
            raise CommandError(f"Experts of {layer} are missing in the files: give those of all ranks.")
    if not any(_GATE.fullmatch(key) for key in tensors):
        raise CommandError("The files have no gate (moe_layer.gate.wg): give the shared file, too.")
    return tensors, experts


def _match(pattern: "re.Pattern[str]", text: str) -> "re.Match[str]":
    found = pattern.fullmatch(text)
    assert found is not None
    return found


def _options_of(states: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """All options of the model, the task and the criterion, by their flat names."""
    for state in states:
        args, cfg = state.get("args"), state.get("cfg")
        if args is not None:
            flat = dict(vars(args) if isinstance(args, Namespace) else args)
            return {**flat, "task": {"_name": flat.get("task"), **flat}}
        if cfg:
            model = cfg["model"]
            flat = dict(vars(model) if isinstance(model, Namespace) else model)
            for side in ("encoder", "decoder"):  # newer configurations have a part for each
                if isinstance(flat.get(side), Mapping):
                    flat.update({f"{side}_{name}": value for name, value in flat.pop(side).items()})
            task = cfg.get("task") or {}
            return {
                **(cfg.get("criterion") or {}),
                **flat,
                "task": dict(vars(task) if isinstance(task, Namespace) else task),
            }
    raise CommandError("The files do not say which options the model was trained with: give other ones.")


def _model_of(tensors: Mapping[str, Tensor]) -> str:
    if any(key.startswith("encoder.sentence_encoder.") for key in tensors):
        return "evomoe_roberta"
    encoder = any(key.startswith("encoder.") for key in tensors)
    return "evomoe_transformer" if encoder else "evomoe_lm"


def _router_of(options: Mapping[str, Any], all_weighted: bool) -> Dict[str, Any]:
    """Our router that gives what theirs gives in evaluation, and trains as theirs."""
    balance = options.get("moe_gate_loss_wt")
    weight = {} if balance is None else {"balance_weight": float(balance)}
    if all_weighted:
        return {
            "router": "dts",
            "eval_routing": "adaptive",
            "threshold": 0.0,
            "hard_update": -1,
            "gate_noise": "soft",
            **weight,
        }
    if options.get("moe_top1_expert"):
        return {"router": "switch", "jitter": 0.0, "capacity_factor": 1.0, **weight}
    if options.get("moe_topk_expert"):
        return {"router": "dts", "gate_weight": "gumbel", **weight}
    policy = options.get("moe_second_expert_policy", "sampling")
    return {
        "router": "topk",
        "top_k": 2,
        "random_second": policy == "random",
        "capacity_factor": 1.0,
        "balance_choices": "first",
        **weight,
    }


def _freq(experts: _Experts, tensors: Mapping[str, Tensor]) -> int:
    """``freq``, by which the layers that have experts are the ones that do."""
    sides: Dict[str, List[int]] = {}
    for layer in experts:
        side, number = layer.rsplit(".", 1)
        sides.setdefault(side, []).append(int(number))
    freq = 1 + min(number for numbers in sides.values() for number in numbers)
    for side, numbers in _layers(tensors, sides):
        if sorted(sides.get(side, [])) != [number for number in numbers if (number + 1) % freq == 0]:
            raise CommandError(
                f"The layers with experts in {side} are {sorted(sides.get(side, []))}, and no `freq` makes "
                "just these on both sides: the checkpoint cannot be imported."
            )
    return freq


def _layers(tensors: Mapping[str, Tensor], sides: Mapping[str, List[int]]) -> Iterator[Tuple[str, List[int]]]:
    """The numbers of all layers of each side."""
    found: Dict[str, set] = {side: set() for side in sides}
    for key in tensors:
        match = re.match(r"(.+?\.layers)\.(\d+)\.", key)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    yield from ((side, sorted(numbers)) for side, numbers in found.items())


def _configuration(name: str, options: Mapping[str, Any], values: Dict[str, Any]) -> Dict[str, Any]:
    """The configuration of our model: fairseq's options that it has, and ours."""
    known = {field.name for field in fields(MODEL_DATACLASS_REGISTRY[name])}
    model = {
        key: value
        for key, value in options.items()
        if key in known and not key.startswith(PREFIX) and key != "task"
    }
    try:
        config = resolve(
            values, masked=name == "evomoe_roberta", max_update=int(model.get("max_update") or 0)
        )
    except ConfigError as error:
        raise CommandError(str(error)) from error
    model.update({PREFIX + key: value for key, value in config.flat().items()})
    task = options["task"]
    task_name = _first(task.get("_name"), _TASKS[name])
    of_task = TASK_DATACLASS_REGISTRY.get(task_name)
    if of_task is not None:
        wanted = {field.name for field in fields(of_task)}
        task = {key: value for key, value in task.items() if key in wanted}
    criterion = {"_name": _CRITERIONS[name]}
    if name == "evomoe_transformer" and "label_smoothing" in options:
        criterion["label_smoothing"] = options["label_smoothing"]
    return {
        "model": {**model, "_name": name},
        "task": {**task, "_name": task_name, "data": ""},
        "criterion": criterion,
    }


def _first(value: Optional[str], default: str) -> str:
    return value or default
