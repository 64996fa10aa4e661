"""Small pieces of HTML; everything that comes from outside is escaped here."""

from html import escape
from typing import Any, Iterable, List, Optional, Sequence, Tuple

Cell = Tuple[str, Optional[float]]
"""What is shown, and the number that it is sorted by; ``None``: it is text."""


def text(value: Any) -> Cell:
    """A cell of text."""
    return str(value), None


def number(value: Optional[float], pattern: str = "{:,.0f}") -> Cell:
    """A cell with a number; nothing is a dash, which is the least."""
    return ("–", -1e300) if value is None else (pattern.format(value), float(value))


def share(value: Optional[float]) -> Cell:
    """A cell with a share as a percentage."""
    return number(value, "{:.1%}")


def table(name: str, heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table whose columns sort.

    Args:
        name: what it shows, for who does not see it.
        heads: of the columns.
        rows: the first cell of each is its head.
    """
    rows = list(rows)
    words = [all(row[i][1] is None for row in rows) for i in range(len(heads))]
    kind = [' class="text"' if is_text else "" for is_text in words]
    head = "".join(
        f'<th scope="col"{k}><button type="button">{escape(h)}</button></th>' for h, k in zip(heads, kind)
    )
    body = "\n".join(_row(row, kind) for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _row(row: Sequence[Cell], kinds: Sequence[str]) -> str:
    cells = []
    for i, ((shown, value), kind) in enumerate(zip(row, kinds)):
        by = "" if value is None else f' data-value="{value:.6g}"'
        tag = "th" if i == 0 else "td"
        cells.append(f"<{tag}{kind}{by}{' scope=row' if i == 0 else ''}>{escape(shown)}</{tag}>")
    return "<tr>" + "".join(cells) + "</tr>"


def figure(svg: str, title: str, words: str = "") -> str:
    """A picture with its title and what it says."""
    more = f" <span>{escape(words)}</span>" if words else ""
    return f"<figure><figcaption><b>{escape(title)}</b>{more}</figcaption>{svg}</figure>"


def grid(parts: Iterable[str]) -> str:
    """Pictures side by side, as many as fit."""
    parts = list(parts)
    return f'<div class="grid">{"".join(parts)}</div>' if parts else ""


def section(anchor: str, title: str, why: str, parts: Iterable[str], of: str = "") -> str:
    """A part of the page, which the navigation leads to."""
    small = f" <small>{escape(of)}</small>" if of else ""
    lines: List[str] = [f'<section id="{anchor}"><h2>{escape(title)}{small}</h2>']
    lines += [f'<p class="why">{escape(why)}</p>'] if why else []
    return "\n".join([*lines, *parts, "</section>"])


def note(sentence: str) -> str:
    """What cannot be shown, and why."""
    return f'<p class="note">{escape(sentence)}</p>'


def fold(title: str, words: str, inside: str, is_open: bool) -> str:
    """What can be folded away."""
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary>{escape(title)} "
        f"<span>{escape(words)}</span></summary><div>{inside}</div></details>"
    )
