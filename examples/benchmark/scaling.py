"""How the time of a layer grows with its experts, with the active ones and with the tokens."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Callable

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "systems"))

from labels import label_lines
from layer import Size, dense, sparse, top
from timing import clean_up, interleave

SIZE = Size(tokens=2048, dim=512, hidden=1024)


def series() -> list[tuple[str, list[int], Callable[[int], tuple[Size, torch.Tensor]]]]:
    """Name of what grows, its values, and for each the size and the T x E mask of active pairs."""

    def tokens(count: int) -> tuple[Size, torch.Tensor]:
        size = Size(count, SIZE.dim, SIZE.hidden)
        return size, top(size, 8, 1)

    return [
        ("experts, top-1", [1, 2, 4, 8, 16, 32, 64, 128], lambda e: (SIZE, top(SIZE, e, 1))),
        ("active experts of 8", [1, 2, 3, 4, 6, 8], lambda k: (SIZE, top(SIZE, 8, k))),
        ("tokens, top-1 of 8", [16, 64, 256, 1024, 4096, 16384], tokens),
    ]


def run(repeats: int) -> dict:
    """Minima in milliseconds of the layer and of a dense FFN on the same number of rows."""
    result = []
    for axis, values, problem in series():
        times: dict[str, list[float]] = {"layer": [], "floor": []}
        for value in values:
            size, mask = problem(value)
            functions = {"layer": sparse(size, mask), "floor": dense(size, int(mask.sum()))}
            for name, t in interleave(functions, repeats).items():
                times[name].append(1000 * t["minimum"])
            print(
                "  {} {}: {:.1f} / {:.1f} ms".format(axis, value, *(times[n][-1] for n in times)), flush=True
            )
            del functions
            clean_up()
        result.append({"axis": axis, "x": values, **times})
    note = f"T = {SIZE.tokens}, d = {SIZE.dim}, h = {SIZE.hidden} unless varied; random loads"
    return {"note": note, "series": result}


def plot(result: dict, path: Path) -> None:
    """A small picture of the series, on logarithmic axes; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("scaling.svg is not drawn: it needs matplotlib")
        return
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq shows every logger's messages
    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams.update({"svg.hashsalt": "evomoe", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, len(result["series"]), figsize=(11, 2.8), constrained_layout=True)
    for ax, data in zip(axes, result["series"]):
        ax.plot(data["x"], data["layer"], "o-", ms=3, label="MoE layer")
        ax.plot(data["x"], data["floor"], "s--", ms=3, label="dense FFN, same rows")
        ax.set(xscale="log", yscale="log", xlabel=data["axis"], xticks=data["x"], ylim=(None, None))
        ax.set_xticklabels(data["x"])
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        ax.minorticks_off()
    bottom, top_ = axes[0].get_ylim()
    axes[0].set_ylim(0.5 * bottom, 2 * top_)
    axes[0].set_ylabel("ms, forward and backward")
    label_lines(axes[-1], size=9)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
