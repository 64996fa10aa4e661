"""What stands out in a run, a sentence each: what to look at first."""

from typing import Any, Dict, Iterator, List, Optional

import numpy as np

SETTLED = 0.02
"""Share of the tokens that may change their expert between two checkpoints of a routing that has settled."""


def findings(run: Dict[str, Any]) -> List[str]:
    """The sentences.

    Args:
        run: what ``measure.run`` returns, and perhaps its ``curves``.
    """
    layers = [layer for layer in run["layers"] if "load" in layer]
    return [
        *_loads(layers),
        *_reasons(layers),
        *_domains(layers),
        *_likeness(layers),
        *_history(run.get("history", [])),
        *_curves(run.get("curves")),
    ]


def percent(share: float) -> str:
    """A share to read: 0.4%, 12%, 100%."""
    value = 100 * share
    return f"{value:.0f}%" if value >= 9.95 or value < 0.05 else f"{value:.1f}%"


def _loads(layers: List[Dict[str, Any]]) -> Iterator[str]:
    if not layers:
        return
    worst = max(layers, key=lambda layer: layer["busiest"])
    text = f"the busiest expert gets {worst['busiest']:.1f} times an even share ({worst['name']})"
    if worst["busiest"] < 1.5:
        yield f"The loads are even: {text}."
    elif worst["busiest"] < 3:
        yield f"The loads are uneven: {text}."
    else:
        yield (
            f"Few experts do most of the work: {text}. A balance loss (--moe-balance-weight) would spread it."
        )
    for layer in layers:
        if layer["idle"]:
            verb = "gets" if layer["idle"] == 1 else "get"
            yield f"{layer['idle']} of {len(layer['experts'])} experts of {layer['name']} {verb} no token."
    left = max(layers, key=lambda layer: layer["without_expert"])
    if left["without_expert"] > 0.005:
        yield f"{percent(left['without_expert'])} of the tokens have no expert in {left['name']}."


def _reasons(layers: List[Dict[str, Any]]) -> Iterator[str]:
    known = [layer["explained"] for layer in layers if layer["explained"] is not None]
    if not known:
        return
    by_id, context = ([one[name] for one in known] for name in ("id", "context"))
    if min(by_id) > 0.995:
        yield (
            "The token alone decides where it goes, whatever stands around it: 100% of the routing is "
            "explained."
        )
    else:
        yield (
            f"The token explains {_span(by_id)} of the routing, its place beyond that "
            f"{_span([one['position'] for one in known])}, what stands around it {_span(context)}."
        )


def _span(shares: List[float]) -> str:
    low, high = percent(min(shares)), percent(max(shares))
    return low if low == high else f"{low} to {high}"


def _domains(layers: List[Dict[str, Any]]) -> Iterator[str]:
    known = [layer for layer in layers if layer["domains"]]
    if not known:
        return
    most = max(known, key=lambda layer: layer["domains"]["information"])
    yield (
        f"The domain tells {percent(most['domains']['information'])} of the choice of an expert in "
        f"{most['name']}, where it tells most."
    )


def _likeness(layers: List[Dict[str, Any]]) -> Iterator[str]:
    for layer in layers:
        alike = mean_beside_diagonal(layer["similarity_of_outputs"])
        if alike is not None and alike > 0.95:
            yield f"The experts of {layer['name']} give almost the same outputs (mean cosine {alike:.2f})."


def mean_beside_diagonal(matrix: Optional[List[List[float]]]) -> Optional[float]:
    """Mean of what is not on the diagonal; ``None`` if there is nothing."""
    if matrix is None or len(matrix) < 2:
        return None
    square = np.asarray(matrix, dtype=float)
    return float((square.sum() - np.trace(square)) / (square.size - len(square)))


def _history(layers: List[Dict[str, Any]]) -> Iterator[str]:
    last = [layer["drift"][-1] for layer in layers if layer["drift"][-1] is not None]
    if not last:
        return
    moved = percent(max(last))
    if max(last) < SETTLED:
        yield f"The routing has settled: at most {moved} of it changed between the last two checkpoints."
    else:
        yield f"The routing still moves: {moved} of it changed between the last two checkpoints in a layer."


def _curves(curves: Optional[Dict[str, Any]]) -> Iterator[str]:
    if curves and curves["spikes"]:
        at = ", ".join(map(str, curves["spikes"][:5]))
        more = " and later" if len(curves["spikes"]) > 5 else ""
        yield f"The training loss jumped at update {at}{more}."
