"""Whether growth pays, as experiments: many experts from the start against one spawn and several.

All rows of an experiment have the same structure at the end, as many updates, and the same data in the same
order. What differs is when the experts come. `run.py` trains them, as it does all experiments.
"""

from __future__ import annotations

from typing import Any

from protocol import BOTH, Experiment, Variant

START = {"moe_spawn_update": 0}
ONCE = {f"one spawn at {when}": {"moe_spawn_update": when} for when in ("5%", "10%", "20%", "40%")}
"""One spawn, to all experts; the warm-up of the learning rate is over at 5%."""


def stages(last: int) -> dict[str, dict[str, Any]]:
    """Three ways to grow to so many experts in stages."""
    first, second = (last // 16, last // 4) if last > 16 else (last // 4, last // 2)
    return {
        f"{name}: {first}, {second}, {last}": {
            "moe_spawn_update": ",".join(f"{w}:{n}" for w, n in zip(when, (first, second, last)))
        }
        for name, when in (
            ("early stages (2, 5, 10%)", ("2%", "5%", "10%")),
            ("stages (5, 10, 20%)", ("5%", "10%", "20%")),
            ("late stages (5, 15, 40%)", ("5%", "15%", "40%")),
        )
    }


def _rows(system: str, options: dict[str, Any], last: int) -> tuple[Variant, ...]:
    """From the start, with one spawn, and in stages."""
    ways = {"from the start": START, **ONCE, **stages(last)}
    return tuple(Variant(label, system, {**options, **way}) for label, way in ways.items())


NARROW = {
    "moe_experts": 128,
    "moe_total_ffn_dim": 4096,  # each a quarter of the dense layer's width
    "moe_expert_activation": "model",
    "moe_top_k": 4,
    "moe_scaling_factor": 4,
    "moe_balance_weight": 0.01,
}
_CONFIRMED = ("from the start", "one spawn at 10%", "stages (5, 10, 20%): 4, 16, 64")
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


GROWTH = {
    experiment.id: experiment
    for experiment in (
        Experiment(
            "growth_dense",
            "Whether experts are what is missing",
            "Dense models with the active parameters of 64 experts, and with all of their parameters.",
            (
                Variant("dense, active parameters", "dense"),
                Variant("dense, all parameters", "dense", flags=("--decoder-ffn-embed-dim", "4160")),
                Variant("Switch, 64 experts", "switch", {"moe_experts": 64, **START}),
            ),
            tasks=("domains",),
        ),
        Experiment(
            "growth_switch",
            "64 experts of Switch",
            "Each token has one expert, as wide as the dense layer.",
            _rows("switch", {"moe_experts": 64}, 64),
            tasks=("domains",),
            confirmed=_CONFIRMED,
        ),
        Experiment(
            "growth_context",
            "64 experts with a confident gate that sees context",
            "The preset evomoe_context.",
            _rows("evomoe_confident", {"moe_experts": 64, **BOTH}, 64),
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
    )
}
