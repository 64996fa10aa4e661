"""What ``--moe-trace`` saw while the run was trained."""

from typing import Any, Dict, List

import numpy as np

from .. import html
from ..figures import Pictures
from .common import drawn, left_out

WHY = (
    "From moe_trace.jsonl beside the checkpoints. Loads are of a training batch every few updates. Drift: of "
    "a fixed batch, how many tokens have another first choice than at the record before. Family: which "
    "expert each came from, as the run itself wrote it down."
)


def make(run: Dict[str, Any], anchor: str, pictures: Pictures, of: str) -> str:
    """Loads and growth of each layer over the training, drift of all."""
    trace = run.get("trace")
    if not trace:
        return ""
    layers: List[Dict[str, Any]] = [{"name": name, **layer} for name, layer in trace["layers"].items()]
    pictured = []
    drift = {layer["name"]: layer["drift"] for layer in drawn(layers)}
    if any(value is not None for values in drift.values() for value in values):
        alt = "Share of a fixed batch's tokens that changed their first choice since the record before."
        picture = pictures.lines(trace["update"], drift, alt, "% of the tokens")
        pictured.append(html.figure(picture, "Drift while training", "of a fixed batch"))
    for layer in drawn(layers):
        name, loads = layer["name"], layer["load"]
        most = max(map(len, loads))
        matrix = np.array([[*load, *[np.nan] * (most - len(load))] for load in loads]).T
        even = matrix / (np.nansum(matrix, 0) / (~np.isnan(matrix)).sum(0))
        alt = (
            f"Load of each expert of {name} while training, in units of an even one, from update "
            f"{trace['update'][0]} on."
        )
        picture = pictures.heat(
            even,
            [str(e) for e in range(most)],
            [str(u) for u in trace["update"]],
            alt,
            ("expert", "update"),
            lift=True,
        )
        pictured.append(html.figure(picture, f"Loads while training, {name}", "1 is even"))
        if layer["family"]:
            first, now = layer["family"][0]["experts"], layer["family"][-1]["experts"]
            alt = f"Growth of {name} from {first} experts to {now}."
            pictured.append(html.figure(pictures.tree(layer["family"], alt), f"Growth, {name}"))
    return html.section(
        anchor, "While training", WHY, [*map(html.note, left_out(layers)), html.grid(pictured)], of
    )
