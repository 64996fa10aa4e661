"""What each expert sees: tokens, words, and examples in context."""

from html import escape
from typing import Any, Dict, List

from .. import html
from ..figures import Pictures
from ..findings import percent
from .common import routed

WHY = (
    "Of each expert the tokens, and words, that it gets more often than others do. The number is the lift: "
    "how much larger its share of their occurrences is than its share of all tokens. Below, some of them "
    "where they stand, with the token marked that went to the expert."
)
CARDS, ROWS = 128, 1500
"""How many of a run, shared out among its layers, are shown of the busiest experts; all is in report.json."""


def make(run: Dict[str, Any], anchor: str, pictures: Pictures, of: str) -> str:
    """A card for each expert, and all tokens in a table, layer by layer."""
    layers = routed(run)
    most = max(CARDS // max(len(layers), 1), 8)
    folds = [_layer(layer, most, ROWS // len(layers), number == 0) for number, layer in enumerate(layers)]
    return html.section(anchor, "What experts see", WHY, folds, of) if folds else ""


def _layer(layer: Dict[str, Any], most: int, rows: int, is_open: bool) -> str:
    number = {name: e for e, name in enumerate(layer["experts"])}
    busiest = sorted(layer["seen"], key=lambda seen: -layer["load"][number[seen["expert"]]])
    shown = {seen["expert"] for seen in busiest[:most]}
    cards = [
        _card(seen, layer["load"][number[seen["expert"]]], max(layer["load"]))
        for seen in layer["seen"]
        if seen["expert"] in shown
    ]
    left = len(layer["seen"]) - len(cards)
    words = f"{len(layer['experts'])} experts" + (f", the busiest {len(cards)} of them shown" if left else "")
    inside = f'<div class="experts">{"".join(cards)}</div>' + _table(
        layer, max(rows // len(layer["seen"]), 2)
    )
    return html.fold(layer["name"], words, inside, is_open)


def _card(seen: Dict[str, Any], load: float, most: float) -> str:
    width = 100 * load / max(most, 1e-9)
    parts = [
        f"<header><h4>Expert {escape(seen['expert'])}</h4><span>{percent(load)} of the "
        "tokens</span></header>",
        f'<div class="meter" aria-hidden="true"><i style="width:{width:.1f}%"></i></div>',
    ]
    if not seen["tokens"]:
        parts.append('<p class="label">no token that it gets more often than others do</p>')
    for kind in ("tokens", "words"):
        if seen[kind]:
            parts.append(
                f'<p class="label">{kind}</p><ul class="chips">{"".join(map(_chip, seen[kind]))}</ul>'
            )
    if seen["examples"]:
        lines = "".join(f"<li>{_example(one)}</li>" for one in seen["examples"])
        parts.append(f'<p class="label">in context</p><ul class="lines">{lines}</ul>')
    return f'<article class="card">{"".join(parts)}</article>'


def _chip(one: Dict[str, Any]) -> str:
    title = f"{one['count']:,.0f} times, {percent(one['share'])} of its occurrences"
    return (
        f'<li style="--s:{one["share"]:.2f}" title="{escape(title)}">{escape(one["text"])} '
        f"<small>{one['lift']:.1f}×</small></li>"
    )


def _example(one: Dict[str, Any]) -> str:
    before, after = escape(one["before"].lstrip()), escape(one["after"].rstrip())
    token = one["token"]
    space = " " if token.startswith(" ") else ""
    end = " " if token.endswith(" ") and token.strip() else ""
    return (
        f'<span class="around">{before}</span>{space}<mark>{escape(token.strip() or token)}</mark>{end}'
        f'<span class="around">{after}</span>'
    )


def _table(layer: Dict[str, Any], most: int) -> str:
    """The most telling tokens and words of all experts, so many of each."""
    rows: List[List[html.Cell]] = []
    for seen in layer["seen"]:
        half = -(-most // 2) if seen["words"] else most
        shown = [("token", one) for one in seen["tokens"][:half]]
        shown += [("word", one) for one in seen["words"][:half]]
        for kind, one in shown:
            rows.append(
                [
                    html.text(one["text"]),
                    html.text(kind),
                    html.text(seen["expert"]),
                    html.number(one["count"]),
                    html.share(one["share"]),
                    html.number(one["lift"], "{:.2f}"),
                ]
            )
    heads = ["text", "kind", "expert", "times here", "of its occurrences", "lift"]
    made = html.table(f"Tokens and words of the experts of {layer['name']}", heads, rows)
    return html.fold("As a table", f"{len(rows)} rows", made, False)
