"""Names of a plot's lines beside their ends, in their colours: nobody has to go to a legend and back."""

from __future__ import annotations

from statistics import mean
from typing import Any


def spread(wanted: list[float], gap: float) -> list[float]:
    """Places in [0, 1], at least `gap` apart and in the order of those that are wanted, close to them.

    Where there is no room for all, they begin at 0 and go over 1.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    # without the gaps below it, no place may be under the one before: what is out of order gets its mean
    blocks: list[list[float]] = []
    for i, index in enumerate(order):
        blocks.append([wanted[index] - i * gap])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    room = max(0.0, 1 - (len(wanted) - 1) * gap)
    levels = [min(max(mean(block), 0.0), room) for block in blocks for _ in block]
    places = {index: level + i * gap for i, (index, level) in enumerate(zip(order, levels))}
    return [places[index] for index in range(len(wanted))]


def label_lines(axis: Any, size: float = 7.0) -> None:
    """Writes the label of each line of `axis`, matplotlib's Axes, to the right of where the line ends.

    Call it when limits, scales and layout are final; there must be room, as with `bbox_inches="tight"`. Lines
    without a label of their own stay without. Names that would lie over each other are moved apart, with a
    thin line to where they belong. `size` is in points.
    """
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    axis.figure.draw_without_rendering()  # so that the layout is known, in which heights are pixels
    height = axis.get_window_extent().height
    wanted = [axis.transAxes.inverted().transform(axis.transData.transform(end))[1] for end in ends]
    gap = 1.15 * size * axis.figure.dpi / 72 / height
    for line, end, place in zip(lines, ends, spread([min(max(y, 0.0), 1.0) for y in wanted], gap)):
        axis.annotate(
            line.get_label(),
            xy=end,
            xytext=(1.06, place),
            textcoords="axes fraction",
            color=line.get_color(),
            fontsize=size,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "linewidth": 0.4,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
