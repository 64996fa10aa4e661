"""The first thing of a run: what it is, and what stands out."""

from html import escape
from typing import Any, Dict, List, Tuple

from .. import html
from ..figures import Pictures
from ..findings import findings
from .common import big, notes, routed


def overview(run: Dict[str, Any], anchor: str, pictures: Pictures, of: str) -> str:
    """Facts and findings."""
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_breakable(value)}</dd></div>" for name, value in _facts(run)
    )
    found = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(run))
    parts = [f'<dl class="facts">{facts}</dl>', f'<ul class="findings">{found}</ul>' if found else ""]
    parts += [html.note(sentence) for sentence in notes(run)]
    return html.section(anchor, "At a glance", "", parts, of or run["checkpoint"])


def _breakable(value: str) -> str:
    return escape(value).replace("_", "_<wbr>")


def _facts(run: Dict[str, Any]) -> List[Tuple[str, str]]:
    layers = routed(run)
    experts = sorted({len(layer["experts"]) for layer in layers}) or [1]
    facts = [
        ("router", run["router"]),
        ("preset", str(run["options"].get("moe_preset") or "none")),
        ("task", run["task"].replace("_", " ")),
        ("updates", f"{run['update']:,}"),
        ("MoE layers", str(len(run["layers"]))),
        ("experts of a layer", "–".join(map(str, dict.fromkeys((experts[0], experts[-1]))))),
        ("parameters", big(run["parameters"])),
    ]
    if layers:
        mean = sum(layer["experts_per_token"] for layer in layers) / len(layers)
        facts.append(("experts of a token", f"{mean:.2f}"))
    return facts
