"""Which experts work together, and how alike they are."""

from typing import Any, Dict, List

from .. import html
from ..figures import Pictures
from ..findings import mean_beside_diagonal, percent
from .common import drawn, left_out, routed

WHY = (
    "Pairs: of the tokens of an expert (row), how many have another one, too. Paths: where they go in the "
    "next MoE layer. Similarity: the cosine of two experts' weights, and the mean cosine of what they make "
    "of the same tokens; 1 is the same, 0 is unrelated."
)


def make(run: Dict[str, Any], anchor: str, pictures: Pictures, of: str) -> str:
    """Maps of pairs, paths and similarities."""
    layers = {layer["name"]: layer for layer in routed(run)}
    if not layers:
        return ""
    pictured: List[str] = []
    shown = drawn(list(layers.values()))
    for layer in shown:
        if layer["pairs"]:
            alt = f"Of the tokens of each expert of {layer['name']}, how many have each other one."
            picture = pictures.heat(
                layer["pairs"], layer["experts"], layer["experts"], alt, ("of", "also"), top=1
            )
            pictured.append(html.figure(picture, f"Pairs, {layer['name']}"))
    for path in drawn(run["across"]):
        one, other = layers[path["from"]], layers[path["to"]]
        known = percent(path["information"])
        alt = (
            f"Where the tokens of each expert of {path['from']} go in {path['to']}; the first choice tells "
            f"{known} of the second."
        )
        labels = (path["from"], path["to"])
        picture = pictures.heat(path["probability"], one["experts"], other["experts"], alt, labels)
        words = f"the first choice tells {known} of the second"
        pictured.append(html.figure(picture, "Paths to the next layer", words))
    for layer in shown:
        for key, what in (("similarity_of_weights", "weights"), ("similarity_of_outputs", "outputs")):
            mean = mean_beside_diagonal(layer[key])
            if mean is None:
                continue
            names = layer["experts"][: len(layer[key])]
            alt = f"Cosine of the {what} of each two experts of {layer['name']}: {mean:.2f} on average."
            picture = pictures.heat(layer[key], names, names, alt, top=1)
            pictured.append(
                html.figure(picture, f"Similarity of {what}, {layer['name']}", f"mean {mean:.2f}")
            )
    single = [layer["name"] for layer in layers.values() if not layer["pairs"] and not layer["notes"]]
    parts = [html.note(sentence) for sentence in left_out(list(layers.values()))]
    if single and all(abs(layers[name]["experts_per_token"] - 1) < 1e-9 for name in single):
        parts.append(html.note("Each token has one expert, so that there are no pairs within a layer."))
    return html.section(anchor, "Together", WHY, [*parts, html.grid(pictured)], of)
