"""Several runs side by side, and the options in which they differ."""

from typing import Any, Dict, List, Tuple

from .. import html
from ..figures import Pictures
from ..findings import mean_beside_diagonal, percent
from .common import big, routed


def side_by_side(report: Dict[str, Any], pictures: Pictures) -> str:
    """Means over the layers of each run, what explains their routing, and their options."""
    runs: List[Dict[str, Any]] = report["runs"]
    names = [run["name"] for run in runs]
    rows = [[html.text(name), *cells] for name, cells in _rows(runs)]
    parts = [html.table("Means over the layers of each run", ["measure", *names], rows)]
    drawn = []
    known = [(run["name"], _explained(run)) for run in runs if _explained(run)]
    if known:
        shares = {
            word: [one[key] for _, one in known]
            for word, key in (("token", "id"), ("position", "position"), ("context", "context"))
        }
        told = "; ".join(
            f"{name}: token {percent(one['id'])}, context {percent(one['context'])}" for name, one in known
        )
        picture = pictures.stacks(
            [name for name, _ in known], shares, f"What explains the routing of each run. {told}."
        )
        drawn.append(html.figure(picture, "What the routing depends on", "mean over the layers"))
    curves = [run for run in runs if run.get("curves", {}).get("valid", {}).get("update")]
    if curves:
        drawn.append(html.figure(_losses(curves, pictures), "Validation loss"))
    parts.append(html.grid(drawn))
    if report["differences"]:
        rows = [
            [html.text(_flag(one["option"])), *(html.text(_value(value)) for value in one["values"])]
            for one in report["differences"]
        ]
        parts += ["<h3>Options that differ</h3>", html.table("Options that differ", ["option", *names], rows)]
    else:
        parts.append(html.note("The options of the runs do not differ."))
    return html.section("side-by-side", "Side by side", "", parts)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(value: Any) -> str:
    return "–" if value is None else str(value)


def _explained(run: Dict[str, Any]) -> Dict[str, float]:
    known = [layer["explained"] for layer in routed(run) if layer["explained"]]
    return {key: sum(one[key] for one in known) / len(known) for key in known[0]} if known else {}


def _losses(runs: List[Dict[str, Any]], pictures: Pictures) -> str:
    updates = sorted({update for run in runs for update in run["curves"]["valid"]["update"]})
    series = {}
    for run in runs:
        at = dict(zip(run["curves"]["valid"]["update"], run["curves"]["valid"]["loss"]))
        series[run["name"]] = [at.get(update) for update in updates]
    told = "; ".join(f"{run['name']}: {run['curves']['valid']['loss'][-1]:.3f}" for run in runs)
    return pictures.lines(
        updates, series, f"Validation loss of each run, at the end {told}.", "loss", percent=False
    )


def _rows(runs: List[Dict[str, Any]]) -> List[Tuple[str, List[html.Cell]]]:
    def mean(run: Dict[str, Any], key: str) -> Any:
        values = [layer[key] for layer in routed(run) if layer[key] is not None]
        return sum(values) / len(values) if values else None

    def alike(run: Dict[str, Any], key: str) -> Any:
        values = [mean_beside_diagonal(layer[key]) for layer in routed(run)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    rows: List[Tuple[str, List[html.Cell]]] = [
        ("router", [html.text(run["router"]) for run in runs]),
        ("updates", [html.text(f"{run['update']:,}") for run in runs]),
        ("experts", [html.text(_span([len(layer["experts"]) for layer in routed(run)])) for run in runs]),
        ("parameters", [html.text(big(run["parameters"])) for run in runs]),
    ]
    for name, key in (
        ("experts of a token", "experts_per_token"),
        ("evenness of the loads", "evenness"),
        ("busiest expert, in even loads", "busiest"),
        ("confidence of the gate", "confidence"),
    ):
        rows.append((name, [html.text(_shown(mean(run, key))) for run in runs]))
    losses = [run.get("curves", {}).get("valid", {}).get("loss") for run in runs]
    if any(losses):
        shown = [html.text(f"{loss[-1]:.3f}" if loss else "–") for loss in losses]
        rows.append(("last validation loss, by its log", shown))
    for name, key in (
        ("similarity of weights", "similarity_of_weights"),
        ("similarity of outputs", "similarity_of_outputs"),
    ):
        rows.append((name, [html.text(_shown(alike(run, key))) for run in runs]))
    return rows


def _span(numbers: List[int]) -> str:
    return "–".join(map(str, dict.fromkeys((min(numbers), max(numbers))))) if numbers else "1"


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}"
