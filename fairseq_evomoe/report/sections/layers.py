"""Load, gate and cost of each layer."""

from typing import Any, Dict, List

from .. import html
from ..figures import Pictures
from ..findings import percent
from .common import drawn, left_out, routed

WHY = (
    "Evenness is the entropy of the loads, 1 where all are equal. Busiest: the greatest load in units of an "
    "even one. Confidence: the gate's probability for its best expert. Cost is that of a token in this layer "
    "without attention."
)


def make(run: Dict[str, Any], anchor: str, pictures: Pictures, of: str) -> str:
    """A table of all layers, and of each its loads, widths and confidence."""
    layers = routed(run)
    if not layers:
        return ""
    pictured: List[str] = []
    for layer in drawn(layers):
        pictured += _pictures(layer, pictures)
    return html.section(
        anchor, "Layers", WHY, [_table(layers), *map(html.note, left_out(layers)), html.grid(pictured)], of
    )


def _table(layers: List[Dict[str, Any]]) -> str:
    heads = [
        "layer",
        "experts",
        "of a token",
        "evenness",
        "busiest",
        "idle",
        "no expert",
        "dropped",
        "confidence",
    ]
    heads += ["gate entropy", "parameters used", "MFLOP a token"]
    rows = [
        [
            html.text(layer["name"]),
            html.number(len(layer["experts"])),
            html.number(layer["experts_per_token"], "{:.2f}"),
            html.number(layer["evenness"], "{:.3f}"),
            html.number(layer["busiest"], "{:.2f}×"),
            html.number(layer["idle"]),
            html.share(layer["without_expert"]),
            html.number(layer["dropped"]),
            html.number(layer["confidence"], "{:.2f}"),
            html.number(layer["gate_entropy"], "{:.2f}"),
            html.number(layer["active_parameters"]),
            html.number(None if layer["flops"] is None else layer["flops"] / 1e6, "{:.3g}"),
        ]
        for layer in layers
    ]
    return html.table("Load, gate and cost of each layer", heads, rows)


def _pictures(layer: Dict[str, Any], pictures: Pictures) -> List[str]:
    name, load = layer["name"], layer["load"]
    total, widths = sum(load), layer["widths"]
    working = sum(width > 0 for width in widths)
    even = [total / len(load)] * len(load)
    low, high = percent(min(load)), percent(max(load))
    alt = (
        f"Load of the {len(load)} experts of {name}: from {low} to {high} of the tokens; even would be "
        f"{percent(even[0])}."
    )
    made = [
        html.figure(pictures.bars(layer["experts"], load, even, alt), f"Load, {name}", "orange: an even one")
    ]
    if len({width for width in widths if width}) > 1:
        alt = (
            f"Load of each expert of {name} against its width, from {min(widths)} to {max(widths)} hidden "
            "units."
        )
        picture = pictures.points(widths[:working], load[:working], layer["experts"][:working], alt)
        made.append(html.figure(picture, f"Width and load, {name}"))
    if layer["confidence_histogram"]:
        alt = (
            f"How sure the gate of {name} is: the mean probability of the best expert is "
            f"{layer['confidence']:.2f}."
        )
        picture = pictures.histogram(layer["confidence_histogram"], alt)
        made.append(html.figure(picture, f"Confidence, {name}", f"mean {layer['confidence']:.2f}"))
    return made
