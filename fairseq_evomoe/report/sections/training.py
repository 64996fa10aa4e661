"""Curves of the training, from its log."""

from html import escape
from typing import Any, Dict, List

from .. import html
from ..curves import SERIES
from ..figures import Pictures

WHY = "From the log. Shaded: the stages of the gate. A jump is a loss far above the median of those before."
SHOWN = (
    "loss",
    "moe_experts",
    "moe_temperature",
    "moe_load_entropy",
    "moe_load_max",
    "moe_gate_entropy",
    "gnorm",
    "moe_dropped",
)


def make(run: Dict[str, Any], anchor: str, pictures: Pictures, of: str) -> str:
    """A picture for each curve, and what the log says of the spawn."""
    curves = run.get("curves")
    if not curves:
        return ""
    phases, updates = curves.get("moe_phase"), curves["update"]
    pictured: List[str] = []
    for key in SHOWN:
        values = curves.get(key)
        if values is None or (key == "moe_dropped" and not any(values)):
            continue
        known = [value for value in values if value is not None]
        alt = (
            f"{SERIES[key].capitalize()} from {known[0]:.3g} at the beginning to {known[-1]:.3g} at the end."
        )
        is_loss = key == "loss"
        picture = pictures.curve(
            updates,
            values,
            SERIES[key],
            alt,
            phases,
            curves["valid"] if is_loss else None,
            curves["spikes"] if is_loss else (),
            is_share=key in ("moe_load_entropy", "moe_load_max"),
        )
        pictured.append(html.figure(picture, SERIES[key].capitalize()))
    spawns = [f"<p>{escape(line)}</p>" for line in curves["spawns"]]
    return html.section(anchor, "Training", WHY, [*spawns, html.grid(pictured)], of)
