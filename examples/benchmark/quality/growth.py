"""Whether growth pays, as experiments: many experts from the start against one spawn and several.

All rows of an experiment have the same structure at the end, as many updates, and the same data in the same
order. What differs is when the experts come. `run.py` trains them, as it does all experiments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from protocol import BOTH, Experiment, Variant

START = {"moe_spawn_update": 0}
ONCE = {f"one spawn at {when}": {"moe_spawn_update": when} for when in ("5%", "10%", "20%", "40%")}
"""One spawn, to all experts; the warm-up of the learning rate is over at 5%."""
SHORTER, SHORT = "from the start, 75% of the updates", 0.75
"""A shorter run, with a schedule of its own: what experts from the start reach in fewer seconds."""


def stages(last: int) -> dict[str, dict[str, Any]]:
    """Ways to grow to so many experts in stages."""
    first, second = (last // 16, last // 4) if last > 16 else (last // 4, last // 2)
    return {
        f"{name}: {first}, {second}, {last}": {
            "moe_spawn_update": ",".join(f"{w}:{n}" for w, n in zip(when, (first, second, last)))
        }
        for name, when in (
            ("early stages (2, 5, 10%)", ("2%", "5%", "10%")),
            ("stages (5, 10, 20%)", ("5%", "10%", "20%")),
            ("late stages (5, 15, 40%)", ("5%", "15%", "40%")),
            ("latest stages (10, 30, 60%)", ("10%", "30%", "60%")),
        )
    }


def _rows(system: str, options: dict[str, Any], last: int) -> tuple[Variant, ...]:
    """From the start, in whole and shorter; with one spawn; in stages."""
    ways = {"from the start": START, SHORTER: START, **ONCE, **stages(last)}
    return tuple(
        Variant(label, system, {**options, **way}, share=SHORT if label == SHORTER else 1.0)
        for label, way in ways.items()
    )


def _also(what: str, system: str, options: dict[str, Any]) -> tuple[Variant, ...]:
    """Two of the ways to grow to 64 experts, with something more."""
    ways = {"one spawn at 10%": ONCE["one spawn at 10%"], _STAGES: stages(64)[_STAGES]}
    return tuple(
        Variant(f"{label}, {what}", system, {"moe_experts": 64, **options, **way})
        for label, way in ways.items()
    )


_STAGES = "stages (5, 10, 20%): 4, 16, 64"
NARROW = {
    "moe_experts": 128,
    "moe_total_ffn_dim": 4096,  # each a quarter of the dense layer's width
    "moe_expert_activation": "model",
    "moe_top_k": 4,
    "moe_scaling_factor": 4,
    "moe_balance_weight": 0.01,
}
_CONFIRMED = ("from the start", "one spawn at 10%", _STAGES)
_LENGTHS = {0.5: 2000, 1.0: 4000, 2.0: 8000, 4.0: 16000}


def _when() -> tuple[Variant, ...]:
    """How late a spawn may be, by length, number of experts and learning rate."""
    return tuple(
        Variant(
            f"{experts} experts, lr {rate}, {updates} updates, "
            + (f"spawn at {when}" if when else "from the start"),
            "switch",
            {"moe_experts": experts, "moe_spawn_update": when},
            flags=("--lr", rate),
            share=length,
        )
        for length, updates in _LENGTHS.items()
        for experts in (16, 64)
        for rate in ("0.002", "0.004")
        for when in (0, "5%", "10%", "20%")
        if updates < 8000 or rate == "0.002"
    )


_CONTEXT = {"moe_experts": 16, **BOTH, "moe_spawn_update": "10%"}


def _soft(length: str) -> dict[str, Any]:
    """A soft stage of so many updates, at whose end the temperature is the lowest."""
    return {"moe_anneal_updates": length, "moe_hard_update": length}


_PIECES = {
    "top-1 at once": {},
    "a soft stage of 2%": _soft("2%"),
    "a soft stage of 10%": _soft("10%"),
    "a soft stage of 40%": _soft("40%"),
    "noise once routing is top-1": {"moe_gate_noise": "always"},
    "weights are probabilities": {"moe_renormalize": "never"},
    "no entropy loss": {"moe_entropy_weight": 0},
    "no balance loss": {"moe_balance_weight": 0},
    "gate on the state alone": {"moe_gate_input": "hidden"},
    "tanh of the gate's logits": {"moe_gate_activation": "tanh"},
}
"""What EvoMoE's gate is made of, one piece changed in each row."""
_ALL = {"moe_experts": 64}


def as_the_preset(experts: int) -> dict[str, Any]:
    """What the preset ``evomoe_stages`` has over the confident gate, by name, for so many experts."""
    return {**BOTH, "moe_spawn_update": f"10%:{experts // 4},25%:{experts}", "moe_gate_warmup": "5%"}


_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, active parameters": ("dense", {}),
    "dense, all parameters": ("dense", {}),
    "Switch": ("switch", {**_ALL, **START}),
    "BASE": ("base", {**_ALL, **START}),
    "Hash": ("hash_random", {**_ALL, **START}),
    "StableMoE": ("stable", {**_ALL, **START}),
    "EvoMoE, published": ("evomoe_published", _ALL),
    "EvoMoE in stages": ("evomoe_confident", {**_ALL, **as_the_preset(64)}),
}
"""The systems of the paper's table, and our best one."""
RATES = ("0.002", "0.004", "0.008")


def _rates() -> tuple[Variant, ...]:
    """Each system with each learning rate, the best of which counts."""
    return tuple(
        Variant(
            f"{name}, lr {rate}",
            system,
            options,
            ("--lr", rate),
            whole=name == "dense, all parameters",
            group=name,
        )
        for name, (system, options) in _TABLE.items()
        for rate in RATES
    )


def _steadiness() -> tuple[Variant, ...]:
    """Systems whose routing may wander, with a log that is fine enough to see the loss rise."""
    return tuple(
        Variant(f"{name}, lr {rate}", system, options, ("--lr", rate, "--log-interval", "10"))
        for name in ("Switch", "EvoMoE, published", "StableMoE")
        for system, options in (_TABLE[name],)
        for rate in ("0.004", "0.008")
    )


GROWTH = {
    experiment.id: dataclasses.replace(experiment, protocol=2)
    for experiment in (
        Experiment(
            "growth_dense",
            "Whether experts are what is missing",
            "Dense models with the active parameters of 64 experts, for as many updates and for about as "
            "many seconds (one of 64 experts takes 1.4 to 1.5 times as long), and with all parameters.",
            (
                Variant("dense, active parameters", "dense"),
                Variant("dense, active parameters, 150% of the updates", "dense", share=1.5),
                Variant("dense, all parameters", "dense", whole=True),
                Variant("Switch, 64 experts", "switch", {"moe_experts": 64, **START}),
            ),
            tasks=("domains",),
        ),
        Experiment(
            "growth_switch",
            "64 experts of Switch",
            "Each token has one expert, as wide as the dense layer.",
            (
                *_rows("switch", {"moe_experts": 64}, 64),
                *_also("rescaled", "switch", {"moe_spawn_rescale": True}),
            ),
            tasks=("domains",),
            confirmed=_CONFIRMED,
        ),
        Experiment(
            "growth_context",
            "64 experts with a confident gate that sees context",
            "The preset evomoe_context. *The gate learns before*: in the 200 updates before the first spawn.",
            (
                *_rows("evomoe_confident", {"moe_experts": 64, **BOTH}, 64),
                *_also("the gate learns before", "evomoe_confident", {**BOTH, "moe_gate_warmup": "5%"}),
            ),
            tasks=("domains",),
            confirmed=_CONFIRMED,
        ),
        Experiment(
            "growth_many",
            "256 experts of Switch",
            "As many more, of the same width.",
            _rows("switch", {"moe_experts": 256}, 256),
            tasks=("domains",),
        ),
        Experiment(
            "growth_narrow",
            "4 of 128 narrow experts",
            "Each a quarter as wide as the dense layer, so that a token costs the same.",
            _rows("mixtral", NARROW, 128),
            tasks=("domains",),
        ),
        Experiment(
            "growth_when",
            "How late a spawn may be",
            "The share of updates with one expert that loses nothing, by length, experts and learning rate.",
            _when(),
            tasks=("domains",),
        ),
        Experiment(
            "growth_soft",
            "What the Dense-To-Sparse gate is made of",
            "16 experts, one spawn at 10%, the preset evomoe_context at top-1 at once, one piece changed in "
            "each row.",
            tuple(Variant(label, "evomoe_confident", {**_CONTEXT, **o}) for label, o in _PIECES.items()),
            tasks=("domains",),
        ),
        Experiment(
            "growth_steadiness",
            "How steady routing and loss are",
            "64 experts, at two learning rates.",
            _steadiness(),
            tasks=("domains",),
        ),
        Experiment(
            "growth_table",
            "The paper's table",
            "64 experts, each system at its own best learning rate, which one seed of the causal LM chooses.",
            _rates(),
            tasks=("domains", "masked_lm", "help_de"),
        ),
    )
}
