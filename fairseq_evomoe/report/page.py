"""``report.html``: one page that needs nothing else."""

from html import escape
from pathlib import Path
from string import Template
from typing import Any, Dict, List, Tuple

from .figures import Pictures
from .sections import SECTIONS, overview, side_by_side

TEMPLATE = Path(__file__).parent / "template"


def render(report: Dict[str, Any], pictures: Pictures) -> str:
    """The page.

    Args:
        report: what ``report.json`` says.
        pictures: draws.
    """
    runs = report["runs"]
    body: List[str] = []
    links: List[Tuple[str, str, bool]] = []
    if len(runs) > 1:
        body.append(side_by_side(report, pictures))
        links.append(("side-by-side", "Side by side", False))
    for number, run in enumerate(runs):
        of = run["name"] if len(runs) > 1 else ""
        anchor = f"run{number}"
        body.append(overview(run, anchor, pictures, of))
        links.append((anchor, of or "At a glance", bool(of)))
        for key, (title, make) in SECTIONS.items():
            made = make(run, f"{anchor}-{key}", pictures, of)
            if made:
                body.append(made)
                links.append((f"{anchor}-{key}", title, False))
    names = " and ".join(run["name"] for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    navigation = "\n".join(
        f'<li{" class=run" if is_run else ""}><a href="#{anchor}">{escape(title)}</a></li>'
        for anchor, title, is_run in links
    )
    data = report["data"]
    lead = f"What {_plural(runs)} did with {data['tokens']:,} tokens of {data['subset']} in {data['folder']}."
    return Template((TEMPLATE / "page.html").read_text(encoding="utf-8")).substitute(
        version=escape(report["version"]),
        title=escape(f"What the experts of {names} do"),
        lead=escape(lead),
        style=(TEMPLATE / "style.css").read_text(encoding="utf-8"),
        script=(TEMPLATE / "sort.js").read_text(encoding="utf-8"),
        navigation=navigation,
        body="\n".join(body),
    )


def _plural(runs: List[Dict[str, Any]]) -> str:
    if len(runs) > 1:
        return f"the experts of {len(runs)} runs"
    layers = len(runs[0]["layers"])
    return f"the experts of {layers} MoE layer{'s' if layers > 1 else ''}"
