"""A run over its checkpoints: drift, saturation, family."""

from typing import Any, Dict, List

from .. import html
from ..figures import Pictures
from ..findings import percent
from .common import drawn, left_out

WHY = (
    "Drift: from one checkpoint to the next, how much of the routing of the same tokens became another. "
    "Saturation: how much of it is as in the last checkpoint. Family: each expert is joined to the one of "
    "the checkpoint before whose hidden units its own are most like, the more alike the darker; a circle is "
    "the larger the more tokens the expert gets."
)


def make(run: Dict[str, Any], anchor: str, pictures: Pictures, of: str) -> str:
    """Curves of all layers together, a tree of each, and all as a table."""
    if "history" not in run:
        return ""
    updates = [checkpoint["update"] for checkpoint in run["checkpoints"]]
    layers: List[Dict[str, Any]] = run["history"]
    drift = {layer["name"]: [None, *layer["drift"]] for layer in layers}
    kept = {layer["name"]: layer["saturation"] for layer in layers}
    pictured = []
    if any(value is not None for values in drift.values() for value in values):
        last = max(layer["drift"][-1] or 0.0 for layer in layers)
        alt = f"Drift of the routing from checkpoint to checkpoint; in the last step at most {percent(last)}."
        picture = pictures.lines(updates, drift, alt, "% of the routing")
        pictured.append(html.figure(picture, "Drift", "since the checkpoint before"))
    if any(value is not None for values in kept.values() for value in values[:-1]):
        alt = "Share of the routing at each checkpoint that is as in the last one."
        picture = pictures.lines(updates, kept, alt, "% of the routing")
        pictured.append(html.figure(picture, "Saturation", "as in the last checkpoint"))
    for layer in drawn(layers):
        first, now = layer["family"][0], layer["family"][-1]
        alt = (
            f"Family tree of the experts of {layer['name']}: {first['experts']} at update {first['update']}, "
            f"{now['experts']} at update {now['update']}."
        )
        pictured.append(html.figure(pictures.tree(layer["family"], alt), f"Family, {layer['name']}"))
    return html.section(
        anchor,
        "Over the run",
        WHY,
        [*map(html.note, left_out(layers)), html.grid(pictured), _table(layers, updates)],
        of,
    )


def _table(layers: List[Dict[str, Any]], updates: List[int]) -> str:
    rows = [
        [
            html.text(layer["name"]),
            html.number(update),
            html.number(layer["family"][i]["experts"]),
            html.share(layer["drift"][i - 1] if i else None),
            html.share(layer["saturation"][i]),
        ]
        for layer in layers
        for i, update in enumerate(updates)
    ]
    heads = ["layer", "update", "experts", "drift", "saturation"]
    return html.fold(
        "As a table", "", html.table("Experts, drift and saturation at each checkpoint", heads, rows), False
    )
