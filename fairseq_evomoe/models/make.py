"""The parts of an MoE layer that the options describe."""

import inspect
import math
from typing import Any, Dict, List, Optional, Tuple, Type

import torch
from torch.nn import functional as F

from ..evolution.plateau import Plateau
from ..evolution.schedule import Schedule, TemperatureSchedule
from ..evolution.sizes import expert_widths, size_ratios
from ..evolution.spawn import Spawn, SpawnMethod
from ..moe import ROUTERS, Router, Vocabulary
from ..moe.dispatch.compression import LSH
from ..moe.dispatch.exchange import Transport
from ..moe.plan import Inherit

_GATED = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
_PLAIN = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}

# losses of the layer, whatever its router
LAYER_LOSSES = ("penalty", "mutual_distillation")

_FROM_MODEL = ("self", "dim", "experts", "vocabulary", "shared")

# What ``auto`` is where it is not what was published; measured in examples/benchmark/quality.
_PREFERRED = {"dts": {"gate_input": "table", "renormalize": "straight-through"}}

# The same for a masked LM, where a table would send all masked tokens, one entry of it, to the same expert.
# HMoE's losses (arXiv 2408.10681) make a gate on the layer's input confident early, and the model leaves the
# plateau on which it does not use the context.
_PREFERRED_MASKED = {"entropy_weight": 0.03, "balance_weight": 0.1, "balance_form": "normalized"}


def router_class(cfg: Any) -> Type[Router]:
    """The class of the router that ``--moe-router`` names."""
    return ROUTERS[str(cfg.moe_router)]


def router_options(router: Type[Router]) -> List[str]:
    """Names of the arguments of a router's constructor that are options."""
    return [name for name in _arguments(router) if name not in _FROM_MODEL]


def _arguments(router: Type[Router]) -> List[str]:
    names: List[str] = []
    for cls in router.__mro__:
        if "__init__" in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters.values()
            names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break  # what a subclass passes on by **options belongs to its parents
    return names


def spawns_by_itself(cfg: Any) -> bool:
    """Whether the training loss decides when the experts spawn."""
    return cfg.moe_spawn_update == "auto"


def latest_spawn(cfg: Any) -> float:
    """The update before which the experts spawn, at the latest if they do it by themselves."""
    if not spawns_by_itself(cfg):
        return cfg.moe_spawn_update
    return max(cfg.max_update // 2, 1) if cfg.max_update > 0 else math.inf


def make_plateau(cfg: Any) -> Optional[Plateau]:
    """What finds out when the experts spawn; ``None`` if the options say it."""
    if not spawns_by_itself(cfg) or cfg.moe_experts == 1:
        return None
    window = cfg.moe_spawn_window
    if window is None:
        window = max(cfg.max_update // 40, 10) if cfg.max_update > 0 else 500
    return Plateau(window, cfg.moe_spawn_plateau)


def make_schedule(cfg: Any, spawn_update: Optional[int] = None) -> Schedule:
    """When the experts spawn, and when the router is in which stage from then on.

    Args:
        cfg: the options.
        spawn_update: when experts that spawn by themselves did; ``None``: the latest that the options say.
    """
    spawn: float = latest_spawn(cfg) if spawn_update is None else spawn_update
    router = router_class(cfg)
    if not router.anneals:
        last_stage = max(stable_update(cfg, spawn) - spawn, 0) if router.stages else 0
        return Schedule(spawn, 1.0, 1.0, TemperatureSchedule.constant, 0, last_stage)
    return Schedule(
        spawn_update=spawn,
        temperature_start=cfg.moe_temperature_start,
        temperature_end=cfg.moe_temperature_end,
        kind=TemperatureSchedule(str(cfg.moe_temperature_schedule)),
        anneal_updates=cfg.moe_anneal_updates,
        hard_update=cfg.moe_hard_update,
    )


def stable_update(cfg: Any, spawn_update: float) -> float:
    """The update from which StableMoE's assignment is frozen: by default after a tenth of the run."""
    if cfg.moe_stable_update is not None:
        return cfg.moe_stable_update
    return spawn_update + max((cfg.max_update - spawn_update) // 10, 1)


def widths(cfg: Any, ffn_dim: int) -> List[int]:
    """Hidden units of each expert.

    Raises:
        ValueError: sizes or totals that make no such experts.
    """
    split = str(cfg.moe_spawn_method) == "split"
    total = cfg.moe_total_ffn_dim or (ffn_dim if split else cfg.moe_experts * ffn_dim)
    return expert_widths(size_ratios(str(cfg.moe_expert_sizes), cfg.moe_experts), total)


def activation(cfg: Any, of_model: Any) -> Tuple[Any, bool]:
    """The experts' activation function, and whether it is a gated one."""
    name = str(cfg.moe_expert_activation)
    if name == "model":
        return of_model, False
    return (_GATED[name], True) if name in _GATED else (_PLAIN[name], False)


def make_spawn(cfg: Any, layer: int, expert_widths: List[int]) -> Spawn:
    """The spawn of one layer."""
    return Spawn(
        experts=cfg.moe_experts,
        layer=layer,
        method=SpawnMethod(str(cfg.moe_spawn_method)),
        strength=cfg.moe_spawn_strength,
        seed=cfg.seed,
        widths=expert_widths,
        inherit=Inherit(str(cfg.moe_spawn_statistics)),
    )


def router_arguments(cfg: Any) -> Dict[str, Any]:
    """The options that the router of a layer is made with."""
    arguments = {name: router_option(cfg, name) for name in router_options(router_class(cfg))}
    return {name: value for name, value in arguments.items() if value is not None}


def router_option(cfg: Any, name: str) -> Any:
    """The value of a router's option; ``None`` for what the router itself takes by default."""
    value = getattr(cfg, "moe_" + name)
    if str(value) != "auto":
        return value
    if name == "gate_input" and str(cfg.moe_spawn_method) == "split":
        return None  # a split makes the rows of a gate that sees the layer's input
    return _PREFERRED.get(str(cfg.moe_router), {}).get(name)


def prefer_confident_gate(cfg: Any) -> None:
    """In a masked LM, make EvoMoE's gate what measured best there, unless the options say what it sees."""
    if (str(cfg.moe_router), str(cfg.moe_gate_input)) != ("dts", "auto"):
        return
    cfg.moe_gate_input = "hidden"
    for name, value in _PREFERRED_MASKED.items():
        if str(getattr(cfg, "moe_" + name)) in ("None", "auto"):
            setattr(cfg, "moe_" + name, value)


def make_transport(cfg: Any, spawn: Spawn) -> Transport:
    """How tokens travel to experts on other ranks."""
    dtypes = {"model": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    lsh = None
    if str(cfg.moe_a2a_compress) == "lsh":
        lsh = LSH(cfg.moe_lsh_hashes, cfg.moe_lsh_dim, (spawn.seed, spawn.layer))
    return Transport(dtypes[str(cfg.moe_a2a_dtype)], lsh)


def loss_weights(cfg: Any) -> Dict[str, float]:
    """Weight of each auxiliary loss of a layer."""
    weights = {}
    for name, published in router_class(cfg).loss_weights.items():
        given = getattr(cfg, f"moe_{name}_weight")
        weights[name] = published if given is None else given
    for name in LAYER_LOSSES:
        weights[name] = getattr(cfg, f"moe_{name}_weight")
    return weights


def make_vocabulary(dictionary: Any, embeddings: Any) -> Vocabulary:
    """How often fairseq's dictionary says that each token occurs.

    Args:
        dictionary: fairseq's dictionary.
        embeddings: the embeddings that are looked up, which may have more rows.
    """
    counts = list(dictionary.count)
    size = max(len(counts), getattr(embeddings, "num_embeddings", 0))
    count_V = torch.tensor(counts + [0] * (size - len(counts)), dtype=torch.float32)
    return Vocabulary(size, count_V, _width(embeddings))


@torch.no_grad()
def _width(embeddings: Any) -> int:
    """Width of what is looked up."""
    width = getattr(embeddings, "embedding_dim", None)
    if width is None:  # adaptive input, or characters
        width = embeddings(torch.full((1, 1), embeddings.padding_idx, dtype=torch.long)).shape[-1]
    return width
