"""``evomoe info`` in words and tables."""

from typing import Iterator, List, Sequence, Tuple

from ..config.commands import table
from ..config.errors import PREFIX, flag
from .flop import Active, Figures
from .info import Info, LayerInfo

Row = Tuple[str, ...]


def text(info: Info) -> str:
    """What is printed."""
    parts = [table(list(_what(info)))]
    if info.layers:
        parts.append(
            table([("layer", "experts", "hidden units of each", "parameters"), *_layers(info.layers)])
        )
    parts.append(table(list(_cost(info))))
    parts.append(table(list(_sizes(info))))
    if info.options:
        names = info.not_defaults if info.unresolved is None else list(info.options)
        rows = [(flag(PREFIX + name), _word(info.options[name])) for name in names]
        parts.append(
            f"Options that are not defaults of the router (--json has all):\n{table(rows) or '(none)'}"
        )
    return "\n\n".join(parts)


def _what(info: Info) -> Iterator[Row]:
    files = "" if info.files == 1 else f", {info.files} files"
    yield "checkpoint", f"{info.path} ({_bytes(info.bytes)}{files})"
    names = (("task", info.task), ("criterion", info.criterion))
    yield "model", ", ".join([info.architecture or "?"] + [f"{kind} {name or '?'}" for kind, name in names])
    if info.layers:
        yield "preset", f"{info.preset or '(none)'}, router {info.router}"
    elif info.preset:
        yield "preset", info.preset
    epoch = "" if info.epoch is None else f", epoch {info.epoch}"
    best = "" if info.best is None else f", best validation {info.best:g}"
    temperature = "" if info.temperature is None else f", temperature {info.temperature:g}"
    yield "update", f"{info.update}{epoch}{best}"
    yield "stage", info.stage + temperature
    yield "resumes here", "; ".join(info.obstacles) or "yes, as far as the file tells"
    if info.saved_with:
        yield "saved with", _versions(info.saved_with)
    yield "here", _versions(info.here)
    if info.unresolved is not None and not info.obstacles:
        yield "options", info.unresolved


def _versions(versions: "dict[str, str]") -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _layers(layers: Sequence[LayerInfo]) -> Iterator[Row]:
    for layer in layers:
        widths: List[str] = [str(width) for width in layer.widths]
        shown = widths[0] if len(set(widths)) == 1 else " ".join(widths)
        gated = ", gated" * layer.gated + f", {layer.heads} heads" * (layer.heads > 1)
        yield layer.name, str(layer.experts), shown + gated, f"{layer.parameters:,}"


def _cost(info: Info) -> Iterator[Row]:
    yield "parameters", f"{info.parameters:,}"
    if info.experts_per_token is not None:
        yield "experts of a token", f"{_active(info.experts_per_token)}, in evaluation"
        yield "of them active", f"{_figures(info.active_parameters)} for a token, without tables"
    if info.table_parameters:
        yield "in tables", f"{info.table_parameters:,}, one row for each entry of the vocabulary"
    flop = info.flop_per_token
    yield "FLOP for a token", f"{_figures(flop.forward)} forward, {_figures(flop.training)} in training"
    yield "", f"and forward {flop.per_attended:,} for each token that it attends to"
    name = info.optimizer or "no state of the optimizer"
    yield "optimizer", f"{name}, {_bytes(info.optimizer_bytes)}"


def _sizes(info: Info) -> Iterator[Row]:
    yield "in the files", "size", "share"
    for name, size in [*info.parts.items(), ("all else", info.bytes - sum(info.parts.values()))]:
        if size > 0:
            yield name, _bytes(size), f"{size / info.bytes:.0%}"


def _active(active: Active) -> str:
    if active.least == active.most:
        return f"{active.least:g}"
    aimed = "" if active.expected is None else f", {active.expected:g} aimed at"
    return f"{active.least:g} to {active.most:g}{aimed}"


def _figures(figures: Figures) -> str:
    if figures.least == figures.most:
        return f"{figures.least:,}"
    aimed = "" if figures.expected is None else f", {figures.expected:,} as aimed at"
    return f"{figures.least:,} to {figures.most:,}{aimed}"


def _bytes(number: int) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number = number / 1000  # type: ignore[assignment]
    return f"{number:.3g} GB"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
