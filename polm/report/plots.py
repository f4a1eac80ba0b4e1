"""Line, bar and interval plots as inline SVG, written by hand: no library, no script, no style attribute.

Colours are CSS variables with a fallback, and axes are drawn in `currentColor`, so a plot fits a light and a dark page.
A series is told apart by colour, dash and marker, never by colour alone. Every plot carries its units, and a line that
says how to read it. What cannot be drawn (nan, infinity) is counted below the plot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polm.report.escape import esc, shorten

# Chosen to differ in lightness as well as in hue, after the palette of Okabe and Ito for colour-blind readers.
# The page may define --series-N for its light and dark themes; these are the fallbacks.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#a8508a", "#b07a00", "#777777")
DASHES = ("", "6 3", "2 3", "8 3 2 3")

# One plot is 480 x 290 units; on a phone it shrinks to about three quarters, where the text is still readable.
WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 80, 14, 12, 44
FONT_SIZE = 12
JOIN_WIDTH = 16  # marks that are closer than this share one ring and stand side by side
# More points than this are not visible at this width; lines are thinned to it.
MAX_POINTS = 240


@dataclass(frozen=True)
class Line:
    """One series: `x` and `y` of equal length; `low` and `high` (also of that length) draw a band or error bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    dash: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Mark:
    """A place on a line plot that the text speaks of: a ring with a letter, and a dashed line down to the axis."""

    x: float
    y: float
    letter: str
    label: str
    series: int


@dataclass(frozen=True)
class Bar:
    """One bar from zero to `value`."""

    label: str
    value: float
    series: int = 0


@dataclass(frozen=True)
class IntervalMark:
    """One row of an interval plot: a point with bounds (nan: none)."""

    label: str
    mean: float
    low: float
    high: float
    series: int = 0


@dataclass(frozen=True)
class Scale:
    """A linear map of data in `low..high` to positions in `start..end`, with the places of its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def build_colour(series: int) -> str:
    """The colour of series number `series` as a CSS value."""
    index = series % len(PALETTE)
    return f"var(--series-{index}, {PALETTE[index]})"


def _is_constant(low: float, high: float) -> bool:
    """Whether rounding alone may tell the two apart: the mean of equal numbers can be off in its last digits, and
    ticks so close together would be one."""
    return high - low <= 1e-9 * max(abs(low), abs(high))


def compute_ticks(low: float, high: float, *, num_ticks: int = 5) -> tuple[float, ...]:
    """About `num_ticks` round numbers (1, 2 or 5 times a power of ten) that cover `low..high`, both ends included."""
    if _is_constant(low, high):
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    rough = (high - low) / max(1, num_ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.75)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def format_tick(value: float, step: float = 0.0) -> str:
    """A short number for an axis: 1.5k, 2M, 0.25. `step` is the distance of the ticks and sets the decimals."""
    if value == 0:
        return "0"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / limit if suffix != 'k' else value / 1e3:.4g}{suffix}".replace("-", "\u2212")
    if abs(value) < 1e-3:
        return f"{value:.2g}".replace("-", "\u2212")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 3
    text = f"{value:.{min(decimals, 6)}f}"
    return (text if step > 0 else text.rstrip("0").rstrip(".")).replace("-", "\u2212")


def _build_scale(values: Sequence[float], start: float, end: float, *, include_zero: bool = False) -> Scale:
    shown = [value for value in values if math.isfinite(value)] + ([0.0] if include_zero else [])
    ticks = compute_ticks(min(shown, default=0.0), max(shown, default=1.0))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def _build_tight_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """For the x axis of curves: the axis ends where the data end, the ticks lie inside."""
    shown = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    if _is_constant(low, high):
        margin = max(0.5, 1e-6 * abs(high))
        low, high = low - margin, high + margin
    ticks = tuple(tick for tick in compute_ticks(low, high) if low <= tick <= high)
    return Scale(low, high, start, end, ticks)


def _text(x: float, y: float, content: str, *, anchor: str = "middle", rotate: bool = False, bold: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if rotate else ""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{FONT_SIZE}" fill="currentColor"'
        f"{weight}{turn}>{esc(content)}</text>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float, *, opacity: float, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" '
        f'stroke-opacity="{opacity}"{dashes}/>'
    )


def _get_step(scale: Scale) -> float:
    return scale.ticks[1] - scale.ticks[0] if len(scale.ticks) > 1 else 0.0


def _build_y_axis(scale: Scale, label: str) -> str:
    step = _get_step(scale)
    parts = []
    for tick in scale.ticks:
        y = scale.place(tick)
        parts.append(_rule(LEFT, y, WIDTH - RIGHT, y, opacity=0.35 if tick == 0 else 0.12))
        parts.append(_text(LEFT - 7, y + 4, format_tick(tick, step), anchor="end"))
    parts.append(_text(13, (scale.start + scale.end) / 2, label, rotate=True))
    return "".join(parts)


def _build_x_axis(scale: Scale, label: str, bottom: float, names: Sequence[str] | None) -> str:
    step = _get_step(scale)
    parts = [_rule(LEFT, bottom, WIDTH - RIGHT, bottom, opacity=0.5)]
    for tick in scale.ticks:
        x = scale.place(tick)
        name = format_tick(tick, step) if names is None else shorten(names[round(tick)], 14)
        parts += [_rule(x, bottom, x, bottom + 4, opacity=0.5), _text(x, bottom + 18, name)]
    parts.append(_text((scale.start + scale.end) / 2, bottom + 38, label))
    return "".join(parts)


def _build_marker(x: float, y: float, series: int, title: str, *, radius: float = 3.2) -> str:
    """A circle, square, diamond or triangle by series; the title is shown by the browser on hover."""
    colour, note = build_colour(series), f"<title>{esc(title)}</title>"
    shape, r = series % 4, radius
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}">{note}</circle>'
    corners = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -r * 1.4), (r * 1.4, 0), (0, r * 1.4), (-r * 1.4, 0)],
        3: [(0, -r * 1.3), (r * 1.25, r), (-r * 1.25, r)],
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}">{note}</polygon>'


def _join_marks(marks: Sequence[Mark], x_scale: Scale) -> list[Mark]:
    """Marks whose letters would lie on each other become one, "A B", at the place of the first."""
    joined: list[Mark] = []
    for mark in sorted(marks, key=lambda one: (one.x, one.letter)):
        last = joined[-1] if joined else None
        if last is not None and x_scale.place(mark.x) - x_scale.place(last.x) < JOIN_WIDTH:
            words = f"{last.letter} {mark.letter}", f"{last.label}; {mark.label}"
            joined[-1] = Mark(last.x, last.y, *words, last.series)
        else:
            joined.append(mark)
    return joined


def _build_mark(mark: Mark, x_scale: Scale, y_scale: Scale) -> str:
    x, y = x_scale.place(mark.x), min(max(y_scale.place(mark.y), y_scale.end), y_scale.start)
    side = -9 if x > (LEFT + WIDTH) / 2 else 9
    return (
        f"<g>{_rule(x, y, x, y_scale.start, opacity=0.6, dash='2 2')}"
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="{build_colour(mark.series)}" stroke-width="2"/>'
        f"{_text(x + side, y - 8, mark.letter, anchor='end' if side < 0 else 'start', bold=True)}"
        f"<title>{esc(mark.label)}</title></g>"
    )


def build_legend(labels: Sequence[tuple[str, int, int]]) -> str:
    """Legend below a plot from (label, series, dash); it is HTML, so that long names wrap on a narrow page."""
    entries = []
    for label, series, dash in labels:
        swatch = (
            f'<svg class="swatch" width="26" height="10" viewBox="0 0 26 10" aria-hidden="true"><line x1="0" y1="5" '
            f'x2="26" y2="5" stroke="{build_colour(series)}" stroke-width="2.2" '
            f'stroke-dasharray="{DASHES[dash % len(DASHES)]}"/>{_build_marker(13, 5, series, label)}</svg>'
        )
        entries.append(f"<li>{swatch}<span>{esc(label)}</span></li>")
    return f'<ul class="legend">{"".join(entries)}</ul>' if entries else ""


def build_figure(
    body: str, *, title: str, how_to_read: str, legend: str = "", note: str = "", size: tuple[int, int] | None = None
) -> str:
    """The frame of every plot: heading, picture with a text alternative, legend, and how to read it."""
    width, height = size or (WIDTH, HEIGHT)
    notes = f' <span class="note">{esc(note)}</span>' if note else ""
    return (
        f'<figure class="plot"><h4>{esc(title)}</h4>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(f"{title}. {how_to_read}")}">{body}</svg>'
        f"{legend}<figcaption><b>How to read:</b> {esc(how_to_read)}{notes}</figcaption></figure>"
    )


def _thin(num_points: int) -> list[int]:
    """Evenly spread indices, the first and the last always among them."""
    if num_points <= MAX_POINTS:
        return list(range(num_points))
    return [round(index * (num_points - 1) / (MAX_POINTS - 1)) for index in range(MAX_POINTS)]


def _build_path(points: Sequence[tuple[float, float] | None]) -> str:
    """An SVG path; None lifts the pen, so a gap in the data is a gap in the line."""
    commands, is_drawing = [], False
    for point in points:
        if point is None:
            is_drawing = False
            continue
        commands.append(f"{'L' if is_drawing else 'M'}{point[0]:.1f} {point[1]:.1f}")
        is_drawing = True
    return " ".join(commands)


def _build_band(line: Line, indices: Sequence[int], x_scale: Scale, y_scale: Scale) -> str:
    assert line.low is not None
    assert line.high is not None
    low, high = line.low, line.high
    usable = [
        (x_scale.place(line.x[i]), y_scale.place(low[i]), y_scale.place(high[i]))
        for i in indices
        if all(map(math.isfinite, (line.x[i], low[i], high[i])))
    ]
    if not usable:
        return ""
    edge = [f"{x:.1f},{bottom:.1f}" for x, bottom, _ in usable] + [f"{x:.1f},{top:.1f}" for x, _, top in usable[::-1]]
    return f'<polygon points="{" ".join(edge)}" fill="{build_colour(line.series)}" fill-opacity="0.15"/>'


def _build_error_bar(x: float, low: float, high: float, series: int) -> str:
    return (
        f'<path d="M{x:.1f} {low:.1f} L{x:.1f} {high:.1f} M{x - 3:.1f} {low:.1f} h6 M{x - 3:.1f} {high:.1f} h6" '
        f'stroke="{build_colour(series)}" stroke-width="1.2" fill="none"/>'
    )


def _draw_line(line: Line, x_scale: Scale, y_scale: Scale, *, with_markers: bool) -> str:
    indices = _thin(len(line.x))
    places: list[tuple[float, float] | None] = []
    extra: list[str] = []
    if line.low is not None and line.high is not None and not with_markers:
        extra.append(_build_band(line, indices, x_scale, y_scale))
    marks: list[str] = []
    # On a curve a few markers are enough to tell it by shape; they start at another place for each series.
    every = 1 if with_markers else max(1, len(indices) // 5)
    for position, i in enumerate(indices):
        if not (math.isfinite(line.x[i]) and math.isfinite(line.y[i])):
            places.append(None)
            continue
        x, y = x_scale.place(line.x[i]), y_scale.place(line.y[i])
        places.append((x, y))
        bounds = (line.low[i], line.high[i]) if with_markers and line.low and line.high else (math.nan, math.nan)
        if math.isfinite(sum(bounds)):
            extra.append(_build_error_bar(x, y_scale.place(bounds[0]), y_scale.place(bounds[1]), line.series))
        if (position - 4 * line.series) % every == 0:
            marks.append(_build_marker(x, y, line.series, f"{line.label}: {line.y[i]:.4g}", radius=4))
    path = (
        f'<path d="{_build_path(places)}" fill="none" stroke="{build_colour(line.series)}" stroke-width="1.8" '
        f'stroke-linejoin="round" stroke-dasharray="{DASHES[line.dash % len(DASHES)]}">'
        f"<title>{esc(line.label)}</title></path>"
    )
    return "".join(extra) + path + "".join(marks)


def _describe_gaps(lines: Sequence[Line]) -> str:
    num_gaps = sum(
        not (math.isfinite(x) and math.isfinite(y)) for line in lines for x, y in zip(line.x, line.y, strict=True)
    )
    num_thinned = max((len(line.x) for line in lines), default=0)
    notes = []
    if num_gaps:
        notes.append(f"{num_gaps} values that are not finite are not drawn.")
    if num_thinned > MAX_POINTS:
        notes.append(f"{MAX_POINTS} of up to {num_thinned} points are drawn.")
    return " ".join(notes)


def build_line_plot(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    how_to_read: str,
    x_names: Sequence[str] | None = None,
    marks: Sequence[Mark] = (),
) -> str:
    """Curves over a numeric axis, or, with `x_names`, points over named places 0, 1, 2 ... with error bars.

    Labels carry the units. A series of one point is drawn as a marker. Lines of one place are moved apart slightly.
    """
    bounds = [bound for line in lines for values in (line.y, line.low or (), line.high or ()) for bound in values]
    y_scale = _build_scale(bounds, HEIGHT - BOTTOM, TOP)
    body = [_build_y_axis(y_scale, y_label)]
    if x_names is None:
        x_scale = _build_tight_scale([x for line in lines for x in line.x], LEFT, WIDTH - RIGHT)
    else:
        ticks = tuple(float(index) for index in range(len(x_names)))
        x_scale = Scale(-0.5, len(x_names) - 0.5, LEFT, WIDTH - RIGHT, ticks)
    body.append(_build_x_axis(x_scale, x_label, HEIGHT - BOTTOM, x_names))
    for index, line in enumerate(lines):
        if x_names is not None:
            shift = (index - (len(lines) - 1) / 2) * min(0.07, 0.5 / len(lines))
            moved = [x + shift for x in line.x]
            line = Line(line.label, moved, line.y, line.series, line.dash, line.low, line.high)
        body.append(_draw_line(line, x_scale, y_scale, with_markers=x_names is not None or len(line.x) == 1))
    body += [_build_mark(mark, x_scale, y_scale) for mark in _join_marks(marks, x_scale)]
    legend = build_legend([(line.label, line.series, line.dash) for line in lines])
    return build_figure("".join(body), title=title, how_to_read=how_to_read, legend=legend, note=_describe_gaps(lines))


def build_bar_plot(
    bars: Sequence[Bar],
    *,
    title: str,
    x_label: str,
    y_label: str,
    how_to_read: str,
    edges: Sequence[float] | None = None,
) -> str:
    """Vertical bars. With `edges` (one more than bars) it is a histogram: the axis shows the edges, not the names."""
    scale = _build_scale([bar.value for bar in bars], HEIGHT - BOTTOM, TOP, include_zero=True)
    body = [_build_y_axis(scale, y_label)]
    span = (WIDTH - RIGHT - LEFT) / max(1, len(bars))
    gap = min(6.0, span * 0.12)
    zero = scale.place(0.0)
    every = math.ceil(len(bars) / (6 if edges is None else 8))
    for index, bar in enumerate(bars):
        x = LEFT + index * span
        if edges is None and index % every == 0:
            body.append(_text(x + span / 2, HEIGHT - BOTTOM + 18, shorten(bar.label, 12)))
        if not math.isfinite(bar.value):
            continue
        y = scale.place(bar.value)
        body.append(
            f'<rect x="{x + gap / 2:.1f}" y="{min(y, zero):.1f}" width="{span - gap:.1f}" '
            f'height="{abs(y - zero):.1f}" fill="{build_colour(bar.series)}">'
            f"<title>{esc(f'{bar.label}: {bar.value:.4g}')}</title></rect>"
        )
    if edges is not None:
        x_scale = _build_tight_scale(list(edges), LEFT, WIDTH - RIGHT)
        body.append(_build_x_axis(x_scale, x_label, HEIGHT - BOTTOM, None))
    else:
        body.append(_rule(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, opacity=0.5))
        body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 38, x_label))
    num_gaps = sum(not math.isfinite(bar.value) for bar in bars)
    note = f"{num_gaps} values that are not finite are not drawn." if num_gaps else ""
    return build_figure("".join(body), title=title, how_to_read=how_to_read, note=note)


def build_interval_plot(marks: Sequence[IntervalMark], *, title: str, x_label: str, how_to_read: str) -> str:
    """Horizontal intervals, one row each, with a line at zero: what does not touch the line differs from zero."""
    left, row_height = 150, 26
    height = TOP + row_height * max(1, len(marks)) + BOTTOM
    bounds = [bound for mark in marks for bound in (mark.mean, mark.low, mark.high)]
    scale = _build_scale(bounds, left, WIDTH - RIGHT - 6, include_zero=True)
    bottom = height - BOTTOM
    step = _get_step(scale)
    body = []
    for tick in scale.ticks:
        x = scale.place(tick)
        body.append(_rule(x, TOP, x, bottom, opacity=0.7 if tick == 0 else 0.12, dash="4 3" if tick == 0 else ""))
        body.append(_text(x, bottom + 18, format_tick(tick, step)))
    body.append(_text((left + WIDTH - RIGHT) / 2, bottom + 38, x_label))
    for index, mark in enumerate(marks):
        y = TOP + row_height * (index + 0.5)
        colour = build_colour(mark.series)
        body.append(_text(left - 10, y + 4, shorten(mark.label, 22), anchor="end"))
        if not math.isfinite(mark.mean):
            continue
        if math.isfinite(mark.low) and math.isfinite(mark.high):
            low, high = scale.place(mark.low), scale.place(mark.high)
            body.append(
                f'<path d="M{low:.1f} {y:.1f} H{high:.1f} M{low:.1f} {y - 5:.1f} v10 M{high:.1f} {y - 5:.1f} v10" '
                f'stroke="{colour}" stroke-width="2" fill="none"/>'
            )
        words = f"{mark.label}: {mark.mean:+.4g} ({mark.low:+.4g} to {mark.high:+.4g})"
        body.append(_build_marker(scale.place(mark.mean), y, mark.series, words, radius=4.5))
    num_gaps = sum(not math.isfinite(mark.low) or not math.isfinite(mark.high) for mark in marks)
    note = f"{num_gaps} without an interval." if num_gaps else ""
    return build_figure("".join(body), title=title, how_to_read=how_to_read, note=note, size=(WIDTH, height))


def compute_histogram_edges(low: float, high: float, num_bins: int) -> tuple[float, ...]:
    """The `num_bins` + 1 edges of equal bins over `low..high`."""
    return tuple(low + (high - low) * index / num_bins for index in range(num_bins + 1))
