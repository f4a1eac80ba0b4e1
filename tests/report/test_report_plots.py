"""Plots: round ticks, points in their places, gaps that stay gaps, and labels that cannot act."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from polm.report import plots
from polm.report.plots import (
    Bar,
    IntervalMark,
    Line,
    Mark,
    build_bar_plot,
    build_interval_plot,
    build_line_plot,
    compute_histogram_edges,
    compute_ticks,
    format_tick,
)

WORDS = {"title": "Title", "x_label": "tokens", "how_to_read": "Read it."}


def get_svg(figure: str) -> ElementTree.Element:
    """The main picture, parsed: it must be well-formed."""
    match = re.search(r"<svg viewBox.*?</svg>", figure, flags=re.S)
    assert match is not None
    return ElementTree.fromstring(match.group(0))


def get_paths(figure: str) -> list[str]:
    return [path.attrib["d"] for path in get_svg(figure).iter("path") if path.attrib.get("stroke-width") == "1.8"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 99.0, [0, 20, 40, 60, 80, 100]),
        (1.1, 2.9, [1.0, 1.5, 2.0, 2.5, 3.0]),
        (-3.0, 5.0, [-4, -2, 0, 2, 4, 6]),
        (2.0, 2.0, [1.8, 1.9, 2.0, 2.1, 2.2]),
        (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (2e-4, math.nextafter(2e-4, 1.0), [1.8e-4, 1.9e-4, 2e-4, 2.1e-4, 2.2e-4]),
        (math.nextafter(-2.0, -3.0), -2.0, [-2.2, -2.1, -2.0, -1.9, -1.8]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, expected: list[float]) -> None:
    assert compute_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("span", [1e-9, 0.003, 0.7, 12.0, 9.99e5, 3e12])
def test_ticks_cover_every_size(span: float) -> None:
    ticks = compute_ticks(-0.3 * span, 0.7 * span)
    assert ticks[0] <= -0.3 * span * 0.999
    assert ticks[-1] >= 0.7 * span * 0.999
    assert 3 <= len(ticks) <= 9


def test_tick_labels_are_short() -> None:
    assert [format_tick(value) for value in (0.0, 15_000, 2e6, 3.5e9, -20_000)] == [
        "0",
        "15k",
        "2M",
        "3.5G",
        "\u221220k",
    ]
    assert [format_tick(value, 0.5) for value in (0.5, 1.0, -1.5)] == ["0.5", "1.0", "\u22121.5"]
    assert format_tick(1200.0, 200.0) == "1200"
    assert format_tick(2e-5, 1e-5) == "2e\u221205"


def test_a_line_runs_through_its_points() -> None:
    figure = build_line_plot([Line("a", [0, 5, 10], [0.0, 1.0, 0.5], 0)], y_label="loss", **WORDS)
    left, right = plots.LEFT, plots.WIDTH - plots.RIGHT
    top, bottom = plots.TOP, plots.HEIGHT - plots.BOTTOM
    middle = (left + right) / 2
    assert get_paths(figure) == [
        f"M{left:.1f} {bottom:.1f} L{middle:.1f} {top:.1f} L{right:.1f} {(top + bottom) / 2:.1f}"
    ]
    assert "How to read:" in figure
    assert "Read it." in figure


def test_gaps_stay_gaps_and_are_counted() -> None:
    line = Line("a", [0, 1, 2, 3, 4], [1.0, 2.0, math.nan, math.inf, 3.0], 0)
    figure = build_line_plot([line], y_label="y", **WORDS)
    (path,) = get_paths(figure)
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert "2 values that are not finite are not drawn." in figure


def test_a_constant_whose_mean_is_off_in_the_last_digit_is_drawn() -> None:
    """The mean of seven equal learning rates is not quite the learning rate."""
    mean = float(np.mean([2e-4] * 7))
    assert 0 < abs(mean - 2e-4) < 1e-18
    line = Line("lr", [100.0, math.nextafter(100.0, 101.0)], [mean] * 2, 0, low=[2e-4] * 2, high=[2e-4] * 2)
    figure = build_line_plot([line], y_label="learning rate", **WORDS)
    places = re.findall(r"[ML]([\d.]+) ([\d.]+)", get_paths(figure)[0])
    middle = f"{(plots.HEIGHT - plots.BOTTOM + plots.TOP) / 2:.1f}"
    assert [y for _, y in places] == [middle] * 2
    assert all(plots.LEFT < float(x) < plots.WIDTH - plots.RIGHT for x, _ in places)


def test_long_curves_are_thinned_and_say_so() -> None:
    xs = [float(index) for index in range(5_000)]
    figure = build_line_plot([Line("a", xs, xs, 0)], y_label="y", **WORDS)
    (path,) = get_paths(figure)
    assert path.count("L") + 1 == plots.MAX_POINTS
    assert f"{plots.WIDTH - plots.RIGHT:.1f} {plots.TOP:.1f}" in path.split("L")[-1]  # the last point is kept
    assert f"{plots.MAX_POINTS} of up to 5000 points are drawn." in figure


def test_named_places_get_error_bars() -> None:
    line = Line("a", [0, 1], [1.0, 2.0], 0, low=[0.5, math.nan], high=[1.5, math.nan])
    figure = build_line_plot([line], y_label="%", x_names=("base", "rl"), **WORDS)
    bars = [path for path in get_svg(figure).iter("path") if path.attrib.get("stroke-width") == "1.2"]
    assert len(bars) == 1  # nan bounds draw none
    assert ">base<" in figure
    assert ">rl<" in figure


def test_letters_of_marks_do_not_lie_on_each_other() -> None:
    line = Line("a", [0.0, 100.0], [1.0, 2.0], 0)
    marks = [Mark(50.0, 1.5, "A", "one", 0), Mark(51.0, 1.5, "B", "two", 1), Mark(90.0, 1.9, "C", "three", 1)]
    figure = build_line_plot([line], y_label="y", marks=marks, **WORDS)
    assert ">A B</text>" in figure
    assert ">C</text>" in figure
    assert "<title>one; two</title>" in figure
    assert ">B</text>" not in figure


def test_interval_plot_marks_zero_and_missing_intervals() -> None:
    marks = [IntervalMark("a", 1.0, 0.5, 1.5, 0), IntervalMark("b", -1.0, math.nan, math.nan, 1)]
    figure = build_interval_plot(marks, **WORDS)
    svg = get_svg(figure)
    zero = [line for line in svg.iter("line") if line.attrib.get("stroke-dasharray")]
    assert len(zero) == 1
    (bar,) = (path.attrib["d"] for path in svg.iter("path"))
    low = float(re.match(r"M([\d.]+)", bar).group(1))  # type: ignore[union-attr]
    assert low > float(zero[0].attrib["x1"])  # the interval lies to the right of zero
    assert "1 without an interval." in figure


def test_bars_stand_on_zero() -> None:
    bars = [Bar("a", 2.0), Bar("b", -1.0), Bar("c", math.nan)]
    figure = build_bar_plot(bars, y_label="share", **WORDS)
    rects = list(get_svg(figure).iter("rect"))
    assert len(rects) == 2
    up, down = rects
    assert float(up.attrib["y"]) + float(up.attrib["height"]) == pytest.approx(float(down.attrib["y"]), abs=0.11)
    assert float(up.attrib["height"]) == pytest.approx(2 * float(down.attrib["height"]), abs=0.11)
    assert "1 values that are not finite" in figure


def test_histogram_edges_are_equal_bins() -> None:
    assert compute_histogram_edges(0.0, 2.0, 4) == (0.0, 0.5, 1.0, 1.5, 2.0)
    figure = build_bar_plot(
        [Bar("x", 1.0), Bar("y", 1.0)], y_label="share", edges=compute_histogram_edges(0, 2, 2), **WORDS
    )
    assert ">1.0<" in figure


def test_series_differ_by_more_than_colour() -> None:
    lines = [Line(f"arm {index}", [0, 1], [index, index], index, dash=index % 2) for index in range(4)]
    figure = build_line_plot(lines, y_label="y", x_names=("a", "b"), **WORDS)
    svg = get_svg(figure)
    shapes = {(element.tag, len(element.attrib.get("points", "").split())) for element in svg.iter()}
    assert {("circle", 0), ("polygon", 4), ("polygon", 3)} <= shapes
    assert {path.attrib.get("stroke-dasharray") for path in svg.iter("path")} >= {"", "6 3"}
    assert "var(--series-0, #0072b2)" in figure
    assert "style=" not in figure


class Tags(HTMLParser):
    """The names of all tags and attributes in a text, as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}


def test_hostile_labels_stay_text(hostile: str) -> None:
    words = {"title": hostile, "x_label": hostile, "how_to_read": hostile}
    figures = [
        build_line_plot([Line(hostile, [0, 1], [1.0, 2.0], 0)], y_label=hostile, **words),
        build_line_plot([Line(hostile, [0], [1.0], 0)], y_label=hostile, x_names=(hostile,), **words),
        build_bar_plot([Bar(hostile, 1.0)], y_label=hostile, **words),
        build_interval_plot([IntervalMark(hostile, 1.0, 0.0, 2.0)], **words),
    ]
    for figure in figures:
        tags = Tags()
        tags.feed(figure)
        assert not tags.names & {"img", "script", "onerror", "onload", "src", "style"}
        assert "\x00" not in figure
        assert "\u202e" not in figure


@pytest.mark.parametrize("lines", [[], [Line("a", [], [], 0)], [Line("a", [1.0], [math.nan], 0)]])
def test_nothing_to_draw_is_still_a_plot(lines: list[Line]) -> None:
    assert "<svg" in build_line_plot(lines, y_label="y", **WORDS)
