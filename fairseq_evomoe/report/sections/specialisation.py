"""What decides where a token goes, and how experts stand to what is known of the text."""

from typing import Any, Dict, List

from .. import html
from ..figures import Pictures
from ..findings import percent
from .common import drawn, left_out, lift_of, routed

WHY = (
    "How much of the routing is explained by the token itself, by its place beyond that (0, 1, 2–3, 4–7, "
    "...), and by neither, which leaves its context. A layer that looks tokens up in a table has 100% token. "
    "The maps below say what each expert gets of a part of the text, in units of what it gets of all: 1 is "
    "usual."
)
MAPS = {
    "parts": ("Part of the sentence", "first and last token, and the thirds between"),
    "frequency": ("Frequency of the token", "its rank in the training data"),
    "domains": ("Domain", "known parts of the text"),
}


def make(run: Dict[str, Any], anchor: str, pictures: Pictures, of: str) -> str:
    """What explains the routing of all layers, a map of each layer, and both sides of a translation."""
    layers = routed(run)
    if not layers:
        return ""
    known = [layer for layer in layers if layer["explained"] is not None]
    pictured = []
    if known:
        pictured.append(html.figure(_explained(known, pictures), "What the routing depends on"))
    for layer in drawn(layers):
        pictured += _maps(layer, pictures)
    parts = [_table(layers), *_sides(run, layers), *map(html.note, left_out(layers)), html.grid(pictured)]
    return html.section(anchor, "Specialisation", WHY, parts, of)


def _explained(layers: List[Dict[str, Any]], pictures: Pictures) -> str:
    named = {"token": "id", "position": "position", "context": "context"}
    parts = {word: [layer["explained"][key] for layer in layers] for word, key in named.items()}
    told = "; ".join(
        f"{layer['name']}: " + ", ".join(f"{w} {percent(layer['explained'][k])}" for w, k in named.items())
        for layer in layers
    )
    return pictures.stacks(
        [_short(layer["name"]) for layer in layers], parts, f"What explains the routing. {told}."
    )


def _short(name: str) -> str:
    return name.replace(".layers.", " ").replace("sentence_encoder", "").strip(".")


def _table(layers: List[Dict[str, Any]]) -> str:
    heads = [
        "layer",
        "token",
        "position",
        "context",
        "position alone",
        "of rows",
        "part of sentence",
        "frequency",
        "domain",
    ]
    rows = []
    for layer in layers:
        one = layer["explained"] or {}
        rows.append(
            [
                html.text(layer["name"]),
                *(
                    html.share(one.get(key))
                    for key in ("id", "position", "context", "position_alone", "covered")
                ),
                *(html.share((layer[key] or {}).get("information")) for key in MAPS),
            ]
        )
    return html.table(
        "Share of the routing that is explained, and share of the choice of an expert that is known by part "
        "of the sentence, frequency and domain",
        heads,
        rows,
    )


def _maps(layer: Dict[str, Any], pictures: Pictures) -> List[str]:
    made = []
    for key, (title, words) in MAPS.items():
        bins = layer[key]
        if not bins or len(bins["names"]) < 2:
            continue
        lift = lift_of(bins, layer)
        most = max((value, e, b) for e, row in enumerate(lift) for b, value in enumerate(row))
        alt = (
            f"What each expert of {layer['name']} gets by {title.lower()}; most above its usual share is "
            f"expert {layer['experts'][most[1]]} with {most[0]:.1f} times that in {bins['names'][most[2]]}."
        )
        picture = pictures.heat(lift, layer["experts"], bins["names"], alt, ("expert", ""), lift=True)
        made.append(html.figure(picture, f"{title}, {layer['name']}", words))
    return made


def _sides(run: Dict[str, Any], layers: List[Dict[str, Any]]) -> List[str]:
    sides = list(dict.fromkeys(layer["side"] for layer in layers))
    if len(sides) < 2:
        return []
    rows = []
    for side in sides:
        of_side = [layer for layer in layers if layer["side"] == side]
        word = {"encoder": "source (encoder)", "decoder": "target (decoder)"}.get(side, side)
        known = [layer["explained"] for layer in of_side if layer["explained"]]
        cells = [html.text(word), html.number(run["texts"][side])]
        for key in ("evenness", "busiest", "experts_per_token"):
            cells.append(html.number(_mean([layer[key] for layer in of_side]), "{:.2f}"))
        cells += [html.share(_mean([one[key] for one in known])) for key in ("id", "position", "context")]
        rows.append(cells)
    heads = ["side", "tokens", "evenness", "busiest", "experts of a token", "token", "position", "context"]
    return ["<h3>Source and target side</h3>", html.table("Means over the layers of each side", heads, rows)]


def _mean(values: List[float]) -> Any:
    return sum(values) / len(values) if values else None
