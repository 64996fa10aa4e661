"""Options as versions before 0.2 wrote them into checkpoints, and what ``auto`` meant there."""

from typing import Any, Dict

from ..moe.routers import ROUTERS
from .config import owner, routers_with

# options of different routers, all of which old configurations have, whatever the router is
_ALL_GIVEN = ("temperature_start", "top_k", "jitter", "hash", "light_dim", "slots", "gamma", "lsh_hashes")


def understood(options: Dict[str, Any], masked: bool) -> Dict[str, Any]:
    """Options of any version in the terms of this one.

    Old configurations have a value for every option; those of other routers are left out.  ``auto`` is what
    the default was then: for EvoMoE's gate a table of the vocabulary, or in a masked LM two losses that make
    a gate on the layer's input confident, and weights that are divided by their sum.

    Args:
        options: by name, without ``moe_``; those that are not given are missing.
        masked: whether the model is a masked LM.
    """
    options = dict(options)
    router = str(options.get("router", "dts"))
    if all(name in options for name in _ALL_GIVEN) and router in ROUTERS:
        for name in list(options):
            if name not in ("router", "preset") and owner(name) is None and router not in routers_with(name):
                del options[name]
        options.setdefault("spawn_method", "mask")
    autos = [name for name in ("gate_input", "renormalize", "balance_form") if options.get(name) == "auto"]
    for name in autos:
        del options[name]
    if router != "dts" or options.get("preset") is not None:
        return options
    if "gate_input" in autos and masked:
        options["gate_input"] = "hidden"
        for name, value in (
            ("entropy_weight", 0.03),
            ("balance_weight", 0.1),
            ("balance_form", "normalized"),
        ):
            options.setdefault(name, value)
    elif "gate_input" in autos:
        options["gate_input"] = "hidden" if options.get("spawn_method") == "split" else "table"
    if "renormalize" in autos:
        options["renormalize"] = "straight-through"
    return options
