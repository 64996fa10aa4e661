"""``examples/systems/labels.py``: names of lines, beside their ends."""

import sys
from pathlib import Path

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "systems"))

from labels import label_lines, spread

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.text import Text


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.08))
def test_spread_keeps_the_order_and_the_gap_within_the_axis(wanted, gap):
    places = spread(wanted, gap)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    for below, above in zip(order, order[1:]):
        assert places[above] - places[below] >= gap - 1e-9
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)


def test_spread_leaves_what_has_room():
    assert spread([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    # more than there is room for: all above each other, over the top
    assert spread([0.5] * 30, 0.1) == pytest.approx([0.1 * i for i in range(30)])


def test_names_are_beside_the_ends_in_the_lines_colours():
    """On a logarithmic axis, in the order of the ends, none over another."""
    figure, axis = pyplot.subplots()
    axis.set_yscale("log")
    for name, end in (("high", 100.0), ("low", 1.0), ("lower", 0.99), ("", 10.0)):
        axis.plot([0, 1], [1, end], label=name or "_none")
    label_lines(axis)
    texts = {text.get_text(): text for text in axis.texts}
    assert texts.keys() == {"high", "low", "lower"}
    assert all(texts[line.get_label()].get_color() == line.get_color() for line in axis.lines[:3])
    assert texts["low"].xy == (1, 1.0)
    figure.draw_without_rendering()
    # of the name without its line
    boxes = [Text.get_window_extent(texts[name]) for name in ("lower", "low", "high")]
    assert all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:]))
    assert min(box.x0 for box in boxes) >= axis.get_window_extent().x1
    pyplot.close(figure)
