"""The systems of the protocol, with every option by name, as the results have them.

A run is known by its flags, so that these stay what they are when a default or a preset changes.
`tests/test_quality.py` checks that each is the preset that it names, with what it has over it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "systems"))

import systems
from systems import System


@dataclass(frozen=True)
class Recorded:
    """A system as the results have it.

    Attributes:
        preset: the preset that it is, but for `over`.
        options: all its `moe_*` options, in the order of the flags in the results.
        over: what it has over the preset, by names without `moe_`: the flags to give beside `--moe-preset`.
    """

    preset: str
    options: dict[str, Any]
    over: dict[str, Any] = field(default_factory=dict)


FORMER = {"dts": {"moe_spawn_update": 0}, "topk": {"moe_balance_choices": "first"}}
"""By router, options that the results do not name, since they were defaults then, and which are not now."""

_OURS = {"moe_gate_input": "table", "moe_renormalize": "straight-through", "moe_gate_noise": "soft"}
_AT_ONCE = {"moe_anneal_updates": 0, "moe_hard_update": 0}
_SPARSE = {"anneal_updates": 0, "hard_update": 0}
_FIRST = {"balance_choices": "first"}

SYSTEMS = {
    # the best on the causal LM: for the cost and the parameters of one in eight experts, four of 32 that are
    # a quarter as wide; the factor makes up for weights that sum to 1
    "evomoe_fine": Recorded(
        "evomoe_table",
        {
            "moe_router": "dts",
            "moe_experts": 32,
            "moe_total_ffn_dim": 1024,
            "moe_hard_experts": 4,
            "moe_scaling_factor": 4,
            "moe_gate_input": "table",
            "moe_table_std": 1,
            "moe_renormalize": "straight-through",
            "moe_gate_noise": "soft",
            "moe_spawn_method": "slice",
            "moe_spawn_strength": 0.5,
            "moe_spawn_update": "2%",
            **_AT_ONCE,
        },
        {
            "experts": 32,
            "total_ffn_dim": 1024,
            "hard_experts": 4,
            "scaling_factor": 4,
            "table_std": 1,
            "spawn_method": "slice",
            "spawn_strength": 0.5,
            "spawn_update": "2%",
            **_SPARSE,
        },
    ),
    # the best with as many experts as the rivals, each as wide
    "evomoe": Recorded(
        "evomoe_table",
        {"moe_router": "dts", **_OURS, "moe_spawn_update": "2%", **_AT_ONCE},
        {"spawn_update": "2%", **_SPARSE},
    ),
    # the best in the masked LM: sparse and without noise from the start, made confident by two losses
    "evomoe_confident": Recorded(
        "evomoe_context",
        {
            "moe_router": "dts",
            "moe_gate_input": "hidden",
            "moe_renormalize": "straight-through",
            "moe_gate_noise": "soft",
            "moe_entropy_weight": 0.03,
            "moe_balance_weight": 0.1,
            "moe_balance_form": "normalized",
            **_AT_ONCE,
        },
        {"gate_input": "hidden", "spawn_update": 0, **_SPARSE},
    ),
    "evomoe_published": Recorded(
        "evomoe",
        {
            "moe_router": "dts",
            "moe_gate_input": "hidden",
            "moe_renormalize": "never",
            "moe_gate_noise": "always",
            "moe_spawn_update": "10%",
            "moe_anneal_updates": "40%",
            "moe_hard_update": "48%",
        },
        {"anneal_updates": "40%", "hard_update": "48%"},
    ),
    "switch": Recorded(
        "switch",
        {
            "moe_router": "switch",
            "moe_balance_weight": 0.01,
            "moe_jitter": 0.01,
            "moe_capacity_factor": 1.25,
        },
    ),
    "hash_random": Recorded("hash", {"moe_router": "hash", "moe_hash": "random"}),
    "stable": Recorded(
        "stable",
        {
            "moe_router": "stable",
            "moe_stable_update": "10%",
            "moe_balance_weight": 0.3,
            "moe_distillation_weight": 0.3,
            "moe_light_dim": 50,
        },
    ),
    "base": Recorded("base", {"moe_router": "base"}),
    "gshard": Recorded(
        "gshard",
        {"moe_router": "topk", "moe_top_k": 2, "moe_random_second": True, "moe_balance_weight": 0.01},
    ),
    "mixtral": Recorded(
        "mixtral",
        {
            "moe_router": "topk",
            "moe_top_k": 2,
            "moe_expert_activation": "swiglu",
            "moe_balance_weight": 0.01,
        },
        _FIRST,
    ),
    "hmoe_topp": Recorded(
        "hmoe_topp",
        {
            "moe_router": "top-p",
            "moe_top_p": 0.6,
            "moe_renormalize": "always",
            "moe_expert_sizes": "arithmetic",
            "moe_expert_activation": "swiglu",
            "moe_penalty_weight": 0.1,
            "moe_entropy_weight": 0.03,
            "moe_balance_weight": 0,
        },
    ),
    "hmoe_topk": Recorded(
        "hmoe_topk",
        {
            "moe_router": "topk",
            "moe_top_k": 2,
            "moe_expert_sizes": "arithmetic",
            "moe_expert_activation": "swiglu",
            "moe_penalty_weight": 0.1,
            "moe_balance_weight": 0,
        },
        _FIRST,
    ),
}


def read(name: str) -> System:
    """A system of the protocol by its name in the results."""
    if name not in SYSTEMS:
        return systems.read(name)  # dense
    recorded = SYSTEMS[name]
    preset = systems.read(recorded.preset)
    return System(id=name, name=preset.name, paper=preset.paper, options=dict(recorded.options))


def as_then(options: dict[str, Any]) -> dict[str, Any]:
    """Options with those that were defaults when the results were made."""
    return {**FORMER.get(options.get("moe_router", ""), {}), **options}
