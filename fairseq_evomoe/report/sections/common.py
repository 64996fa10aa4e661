"""What several parts of the page say."""

from typing import Any, Dict, List


def routed(run: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The layers whose experts have spawned."""
    return [layer for layer in run["layers"] if "load" in layer]


def notes(run: Dict[str, Any]) -> List[str]:
    """What cannot be shown, each sentence once, with the layers that it is of unless it is of all."""
    of: Dict[str, List[str]] = {}
    for layer in run["layers"]:
        for sentence in layer["notes"]:
            of.setdefault(sentence, []).append(layer["name"])
    everywhere = len(run["layers"])
    return [text if len(names) == everywhere else f"{', '.join(names)}: {text}" for text, names in of.items()]


def big(number: float) -> str:
    """A large number to read: 1.2 M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {sign}"
    return f"{number:.0f}"


def lift_of(bins: Dict[str, Any], layer: Dict[str, Any]) -> List[List[float]]:
    """What each expert gets of each bin, in units of what it gets of all: one row for each expert."""
    total = sum(bins["counts"]) or 1
    columns = list(zip(*bins["share"]))
    usual = [sum(s * c for s, c in zip(column, bins["counts"])) / total for column in columns]
    return [[s / mean if mean else 0.0 for s in column] for column, mean in zip(columns, usual)]


MOST_DRAWN = 6
"""Layers that have pictures of their own."""


def drawn(layers: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The layers that have pictures of their own: all, or of many some from the first to the last."""
    if len(layers) <= MOST_DRAWN:
        return layers
    last = len(layers) - 1
    return [layers[round(i * last / (MOST_DRAWN - 1))] for i in range(MOST_DRAWN)]


def left_out(layers: List[Dict[str, Any]]) -> List[str]:
    """A sentence, if not all are drawn."""
    shown = len(drawn(layers))
    if shown == len(layers):
        return []
    return [f"Pictures are of {shown} of the {len(layers)} layers; the numbers of all are in report.json."]
