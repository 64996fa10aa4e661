"""Pictures of what was measured: SVG by matplotlib, whose colours the page decides.

Every picture is drawn in stand-in colours, which become variables of the page's style sheet: it follows a
light or a dark scheme.  Categories have the colours of Okabe and Ito, which are told apart with any kind of
colour vision.  Heat maps are one colour, the more opaque the greater the number; two where it may be less or
more than usual: orange and blue.
"""

import io
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..checkpoints.files import CommandError
from .sample import Array

STAND_INS = {
    "#111111": "--ink",
    "#777777": "--muted",
    "#dddddd": "--line",
    "#0072b2": "--c0",
    "#e69f00": "--c1",
    "#009e73": "--c2",
    "#cc79a7": "--c3",
    "#56b4e9": "--c4",
    "#d55e00": "--c5",
}
INK, MUTED, LINE, *SERIES = STAND_INS
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)
DASHES = ("-", "--", "-.", ":")
WIDTH = 4.2
"""Inches: what fits a phone."""
PHASES = {0: "one expert", 1: "soft", 2: "last stage"}


class Pictures:
    """Draws pictures, each with names of its own for its parts, so that one page may hold them all.

    Raises:
        CommandError: matplotlib is not installed.
    """

    def __init__(self) -> None:
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError as error:
            raise CommandError(
                "The report is drawn with matplotlib, which is not installed: pip install matplotlib."
            ) from error
        if matplotlib.__version_info__ < (3, 7):
            raise CommandError(
                f"The report is drawn with matplotlib 3.7 or later, but {matplotlib.__version__} is "
                "installed: pip install -U matplotlib."
            )
        self._matplotlib, self._figure = matplotlib, Figure
        self._number = 0

    def _axes(self, height: float, rows: int = 1, **options: Any) -> Tuple[Any, Any]:
        figure = self._figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, 1, **options)
        for one in np.atleast_1d(axes):
            one.spines[["top", "right"]].set_visible(False)
            one.spines[["left", "bottom"]].set_color(LINE)
            one.tick_params(colors=MUTED, labelsize=9, length=2)
            one.set_facecolor("none")
        return figure, axes

    def _svg(self, figure: Any, alt: str) -> str:
        self._number += 1
        file = io.StringIO()
        style: Dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": f"evomoe{self._number}"}
        with self._matplotlib.rc_context(style):
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _inline(file.getvalue(), f"p{self._number}", alt)

    def bars(
        self, names: Sequence[str], shares: Sequence[float], even: Optional[Sequence[float]], alt: str
    ) -> str:
        """Load of each expert, with a mark at what would be even."""
        figure, axes = self._axes(1.9)
        axes.bar(range(len(names)), np.asarray(shares) * 100, color=SERIES[0], width=0.72)
        if even is not None:
            axes.scatter(
                range(len(names)),
                np.asarray(even) * 100,
                marker="_",
                s=1200 / max(len(names), 4),
                color=SERIES[1],
            )
        self._ticks(axes, names)
        axes.set_ylabel("% of the tokens", color=MUTED, fontsize=9)
        return self._svg(figure, alt)

    def _ticks(self, axes: Any, names: Sequence[str]) -> None:
        step = max(1, -(-len(names) // 16))
        turned = max((len(name) for name in names), default=0) > 3 and len(names) > 6
        axes.set_xticks(range(0, len(names), step), names[::step], rotation=90 if turned else 0)

    def points(self, x: Sequence[float], y: Sequence[float], names: Sequence[str], alt: str) -> str:
        """Load against width."""
        figure, axes = self._axes(1.9)
        axes.scatter(x, np.asarray(y) * 100, color=SERIES[0], s=28)
        for name, x_of, y_of in zip(names, x, y):
            axes.annotate(
                name, (x_of, y_of * 100), xytext=(4, 3), textcoords="offset points", fontsize=9, color=INK
            )
        axes.set_xlabel("hidden units", color=MUTED, fontsize=9)
        axes.set_ylabel("% of the tokens", color=MUTED, fontsize=9)
        axes.set_ylim(0, None)
        return self._svg(figure, alt)

    def histogram(self, counts: Sequence[int], alt: str) -> str:
        """How sure the gate is."""
        figure, axes = self._axes(1.9)
        share = np.asarray(counts) / max(sum(counts), 1) * 100
        axes.bar(
            np.arange(len(counts)) / len(counts) + 0.5 / len(counts),
            share,
            0.9 / len(counts),
            color=SERIES[0],
        )
        axes.set_xlabel("probability of the best expert", color=MUTED, fontsize=9)
        axes.set_ylabel("% of the tokens", color=MUTED, fontsize=9)
        axes.set_xlim(0, 1)
        return self._svg(figure, alt)

    def stacks(self, names: Sequence[str], parts: Mapping[str, Sequence[float]], alt: str) -> str:
        """Shares that sum to 1, a bar for each name."""
        figure, axes = self._axes(0.75 + 0.3 * len(names))
        left = np.zeros(len(names))
        for number, (part, values) in enumerate(parts.items()):
            width = np.asarray(values, dtype=float)
            axes.barh(
                range(len(names)),
                width * 100,
                left=left * 100,
                height=0.66,
                color=SERIES[number],
                alpha=0.8,
                label=part,
            )
            for y, (start, size) in enumerate(zip(left, width)):
                if size > 0.08:
                    axes.text(
                        (start + size / 2) * 100,
                        y,
                        f"{size:.0%}",
                        ha="center",
                        va="center",
                        fontsize=9,
                        color=INK,
                    )
            left += width
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100], ["0%", "50%", "100%"])
        figure.legend(loc="outside upper left", ncols=len(parts), frameon=False, fontsize=9, labelcolor=INK)
        return self._svg(figure, alt)

    def heat(
        self,
        matrix: Any,
        rows: Sequence[str],
        columns: Sequence[str],
        alt: str,
        labels: Tuple[str, str] = ("", ""),
        top: Optional[float] = None,
        lift: bool = False,
    ) -> str:
        """A matrix: the greater a number, the more opaque its cell.

        Args:
            matrix: the numbers.
            rows: what they are called.
            columns: likewise.
            alt: what the picture shows.
            labels: of the rows and the columns.
            top: the number that is fully opaque; the greatest if not given.
            lift: whether numbers are in units of what is usual: less is orange, more is blue.
        """
        matrix = np.asarray(matrix, dtype=float)
        cell = min(0.3, 3.4 / max(len(columns), 1))
        height = min(max(len(rows) * max(cell, 0.1 if len(rows) < 40 else 0.05), 0.5), 4.2) + 0.75
        figure, axes = self._axes(height)
        opaque = _opaque(matrix, top, lift)
        axes.imshow(opaque, interpolation="none", aspect="auto")
        axes.spines[:].set_visible(False)
        if max(matrix.shape) <= 12:
            for (i, j), value in np.ndenumerate(matrix):
                if np.isnan(value):
                    continue
                text = f"{value:.1f}" if lift else f"{value:.2f}".replace("0.", ".", 1)
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=INK)
        self._ticks(axes, columns)
        step = max(1, -(-len(rows) // 16))
        axes.set_yticks(range(0, len(rows), step), rows[::step])
        axes.set_ylabel(labels[0], color=MUTED, fontsize=9)
        axes.set_xlabel(labels[1], color=MUTED, fontsize=9)
        return self._svg(figure, alt)

    def lines(
        self,
        x: Sequence[float],
        series: Mapping[str, Sequence[Optional[float]]],
        alt: str,
        label: str,
        percent: bool = True,
    ) -> str:
        """Curves over updates, told apart by colour and dashes."""
        figure, axes = self._axes(2.1)
        factor = 100 if percent else 1
        for number, (name, values) in enumerate(series.items()):
            y = [np.nan if value is None else factor * value for value in values]
            axes.plot(
                x,
                y,
                color=SERIES[number % 6],
                linestyle=DASHES[number // 6 % 4],
                marker="o",
                ms=3,
                label=name,
            )
        axes.set_xlabel("update", color=MUTED, fontsize=9)
        axes.set_ylabel(label, color=MUTED, fontsize=9)
        if percent:
            axes.set_ylim(0, None)
        if len(series) <= 12:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
        return self._svg(figure, alt)

    def tree(self, generations: List[Dict[str, Any]], alt: str) -> str:
        """The experts at each update, each joined to the one that it came from; the more load, the larger."""
        most = max(one["experts"] for one in generations)
        figure, axes = self._axes(min(max(1.2, 0.2 * most + 0.7), 6))
        places: List[Array] = []
        for number, one in enumerate(generations):
            y = (np.arange(one["experts"]) + 0.5) / one["experts"] * most - 0.5
            if "parents" in one:
                self._branches(axes, number, places[-1][one["parents"]], y, np.array(one["likeness"]))
            total = max(sum(one["load"]), 1e-9)
            size = 12 + 160 * np.asarray(one["load"]) / total * min(one["experts"], 8) / 8
            axes.scatter(
                np.full(one["experts"], number), y, s=size, color=SERIES[1], edgecolors=INK, lw=0.5, zorder=2
            )
            places.append(y)
        axes.set_xticks(range(len(generations)), [str(one["update"]) for one in generations])
        axes.set_yticks(places[-1], [str(e) for e in range(most)] if most <= 24 else [""] * most)
        axes.set_ylabel("expert", color=MUTED, fontsize=9)
        axes.set_xlabel("update", color=MUTED, fontsize=9)
        axes.invert_yaxis()
        return self._svg(figure, alt)

    def _branches(self, axes: Any, number: int, before_E: Array, after_E: Array, likeness_E: Array) -> None:
        """Lines from each parent, in ten shades."""
        shade_E = np.clip(np.ceil(likeness_E * 10), 2, 10)
        for shade in np.unique(shade_E):
            here = shade_E == shade
            gap = np.full(int(here.sum()), np.nan)
            x = np.tile([number - 1, number, np.nan], len(gap))
            y = np.stack([before_E[here], after_E[here], gap], 1).ravel()
            axes.plot(x, y, color=SERIES[0], alpha=shade / 10, linewidth=1.2, zorder=1)

    def curve(
        self,
        updates: Sequence[int],
        values: Sequence[Optional[float]],
        name: str,
        alt: str,
        phases: Optional[Sequence[Optional[float]]] = None,
        valid: Optional[Dict[str, Sequence[float]]] = None,
        marked: Sequence[int] = (),
        is_share: bool = False,
    ) -> str:
        """A curve of a log; phases are shaded, validations are points, what is marked are crosses."""
        figure, axes = self._axes(1.9)
        y = np.array([np.nan if value is None else value for value in values], dtype=float)
        axes.plot(updates, y, color=SERIES[0], linewidth=1.2, label="training")
        if valid and valid["update"]:
            axes.plot(
                valid["update"],
                valid["loss"],
                "o--",
                color=SERIES[1],
                ms=3.5,
                linewidth=1,
                label="validation",
            )
        if marked:
            at = [list(updates).index(update) for update in marked]
            axes.plot(list(marked), y[at], "X", color=SERIES[5], ms=7, label="jump")
        if phases is not None:
            self._shade(axes, updates, phases)
        if is_share:
            axes.set_ylim(0, 1.05)
        axes.set_ylabel(name, color=MUTED, fontsize=9)
        axes.set_xlabel("update", color=MUTED, fontsize=9)
        if (valid and valid["update"]) or marked:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        return self._svg(figure, alt)

    def _shade(self, axes: Any, updates: Sequence[int], phases: Sequence[Optional[float]]) -> None:
        # a label is as wide as its letters: where it would not fit there is none
        room = 0.022 * max(updates[-1] - updates[0], 1)
        rounded = [0 if phase is None else round(phase) for phase in phases]
        start = 0
        for i in range(1, len(rounded) + 1):
            if i == len(rounded) or rounded[i] != rounded[start]:
                end = updates[min(i, len(updates) - 1)]
                if rounded[start]:
                    axes.axvspan(updates[start], end, color=SERIES[rounded[start] + 1], alpha=0.12, lw=0)
                name = PHASES.get(rounded[start], "")
                axes.annotate(
                    name if end - updates[start] > room * len(name) else "",
                    ((updates[start] + end) / 2, 1),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    fontsize=8,
                    color=MUTED,
                )
                start = i


def _inline(svg: str, prefix: str, alt: str) -> str:
    """matplotlib's file as an element of a page: small, and in the page's colours and font."""
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S
    )
    for color, variable in STAND_INS.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r"font: [\d.]*?([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"<(g|text) id=\"[^\"]*\"", r"<\1", text)  # nobody refers to these
    text = re.sub(r"(\sid=\"|url\(#|href=\"#)", rf"\g<1>{prefix}-", text)
    text = re.sub(r"(\d+\.\d)\d+(?=[ \"\n,)])", r"\1", text)  # a tenth of a point
    text = re.sub(
        r" clip-path=\"[^\"]*\"|<defs>\s*<clipPath.*?</defs>", "", text, flags=re.S
    )  # all is inside
    text = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", text))
    width = float(re.search(r"viewBox=\"0 0 ([\d.]+) ", text)[1]) * 4 / 3  # type: ignore[index]
    head, rest = text.split(">", 1)
    head = re.sub(r" (height|width|version|xmlns)=\"[^\"]*\"", "", head)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = head.replace("<svg", f'<svg role="img" aria-label="{label}" style="max-width:{width:.0f}px"')
    return f"{head}>{rest}"


def _opaque(matrix: Array, top: Optional[float], lift: bool) -> Array:
    """Colours with opacity, uint8 (rows, columns, 4)."""
    if lift:
        strength = np.clip(np.log2(np.maximum(matrix, 1e-3)) / 2, -1, 1)  # four times or a quarter is full
    else:
        strength = np.clip(matrix / (top or max(float(np.nanmax(matrix, initial=0)), 1e-9)), -1, 1)
    strength = np.nan_to_num(strength)  # what is not there is clear
    result = np.empty((*matrix.shape, 4), dtype=np.uint8)
    result[..., :3] = np.where(strength[..., None] < 0, ORANGE, BLUE)
    # never fully, so that numbers can be read on it; in steps, which makes large pictures small
    result[..., 3] = np.round(np.abs(strength) * 38) * 5
    return result
