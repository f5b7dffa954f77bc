"""Curves and heat maps as SVG, to be put into an HTML page: no script, no network, readable in black and white.

Colours and sizes of lines and text are those of the page's style sheet: see the classes in `training/report/report.py`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from training.report.runs import Points

WIDTH, HEIGHT = 480, 240
"""Of a chart, in its own units."""
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 26, 28
"""Margins."""
MOST_POINTS = 240
"""Of a curve: more are drawn as means, with a band from the lowest to the highest."""
LOG_Y_FROM = 30
"""A chart whose largest value is more than this many times its smallest has a logarithmic axis."""
MOST_COLUMNS = 80
"""Of a heat map: more steps are drawn as means."""

Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart."""

    name: str
    kind: str
    """Its class in the style sheet: train or validation."""
    points: Points


@dataclass(frozen=True, kw_only=True)
class _Bin:
    x: float
    low: float
    mean: float
    high: float


def _bins(points: Points) -> list[_Bin]:
    """Return a curve's points, the ones that are near each other together."""
    count = min(MOST_POINTS, len(points))
    edges = [len(points) * number // count for number in range(count + 1)]
    bins = []
    for first, last in itertools.pairwise(edges):
        values = [value for _, value in points[first:last]]
        x = sum(step for step, _ in points[first:last]) / len(values)
        bins.append(_Bin(x=x, low=min(values), mean=sum(values) / len(values), high=max(values)))
    return bins


def chart(title: str, curves: Sequence[Curve], *, log_x: bool) -> str:
    """Return a chart as an SVG element; "" if there is nothing to draw.

    Args:
        title: drawn above it.
        curves: of the same metric.
        log_x: draw steps on a logarithmic axis.
    """
    visible = [(curve, [point for point in curve.points if point[0] > 0 or not log_x]) for curve in curves]
    drawn = [(curve, _bins(points)) for curve, points in visible if points]
    if not drawn:
        return ""
    bins = [one for _, found in drawn for one in found]
    low, high = min(one.low for one in bins), max(one.high for one in bins)
    log_y = low > 0 and high / low > LOG_Y_FROM
    x = _scale(min(one.x for one in bins), max(one.x for one in bins), LEFT, WIDTH - RIGHT, is_log=log_x)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP, is_log=log_y)
    parts = [
        f'<svg class="chart {"log" if log_x else "linear"}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<text class="title" x="{LEFT}" y="16">{escape(title)}{" (logarithmic)" if log_y else ""}</text>',
        *_horizontal_lines(low, high, y, is_log=log_y),
        *_step_marks(min(one.x for one in bins), max(one.x for one in bins), x, is_log=log_x),
    ]
    for curve, found in drawn:
        parts += _drawn(curve, found, x, y)
    return "".join([*parts, *_legend([curve for curve, _ in drawn]), "</svg>"])


def _scale(low: float, high: float, start: float, end: float, *, is_log: bool) -> Scale:
    """Return the function from values to places; a single value is in the middle."""
    if is_log:
        low, high = math.log(max(low, 1e-300)), math.log(max(high, 1e-300))
    span = high - low

    def place(value: float) -> float:
        position = math.log(max(value, 1e-300)) if is_log else value
        return start + (end - start) * ((position - low) / span if span > 0 else 0.5)

    return place


def _drawn(curve: Curve, bins: Sequence[_Bin], x: Scale, y: Scale) -> list[str]:
    """Return the elements of one curve."""
    parts = []
    if any(one.high > one.low for one in bins):
        outline = [(one.x, one.high) for one in bins] + [(one.x, one.low) for one in reversed(bins)]
        parts.append(f'<polygon class="band {curve.kind}" points="{_places(outline, x, y)}"/>')
    if len(bins) == 1:
        parts.append(f'<circle class="{curve.kind}" cx="{x(bins[0].x):.1f}" cy="{y(bins[0].mean):.1f}" r="2.5"/>')
    else:
        line = _places([(one.x, one.mean) for one in bins], x, y)
        parts.append(f'<polyline class="{curve.kind}" points="{line}"/>')
    return parts


def _places(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)


def _horizontal_lines(low: float, high: float, y: Scale, *, is_log: bool) -> list[str]:
    parts = []
    for value in _powers(low, high) if is_log else _round_numbers(low, high):
        place = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="mark end" x="{LEFT - 6}" y="{place + 4:.1f}">{_label(value)}</text>')
    return parts


def _step_marks(low: float, high: float, x: Scale, *, is_log: bool) -> list[str]:
    values = _powers(low, high) if is_log else _round_numbers(low, high)
    bottom = HEIGHT - BOTTOM
    return [
        f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text class="mark middle" x="{x(value):.1f}" y="{bottom + 17}">{_label(value)}</text>'
        for value in values
    ]


def _legend(curves: Sequence[Curve]) -> list[str]:
    return [
        f'<text class="mark end {curve.kind}" x="{WIDTH - RIGHT - 72 * place}" y="16">{escape(curve.name)}</text>'
        for place, curve in enumerate(reversed(curves))
    ]


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 2 to 7 round numbers in a range; its only value if it has no extent."""
    span = high - low
    if not span > abs(high) * 1e-12:
        return [low]
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Return the powers of ten in a range, with their doubles and fivefolds if there would be fewer than two."""
    low, high = max(low, 1e-300), max(high, 1e-300)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [
            factor * 10.0**exponent
            for exponent in exponents
            for factor in factors
            if low * (1 - 1e-9) <= factor * 10.0**exponent <= high * (1 + 1e-9)
        ]
        if len(found) >= 2:
            return found[:: math.ceil(len(found) / 6)]
    return [low, high] if high > low else [low]


def _label(value: float) -> str:
    if value == 0:
        return "0"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.3g}"


def heat_map(title: str, rows: Sequence[tuple[int, Sequence[float]]]) -> str:
    """Return a map of several numbers over the steps as an SVG element, dark where they are low; "" if there are none.

    Args:
        title: drawn above it.
        rows: step, and at each as many numbers above 0: the first one is drawn at the top.
    """
    if not rows:
        return ""
    columns = _columns(rows)
    values = [value for _, column in columns for value in column]
    low, high = min(values), max(values)
    n_lines = len(columns[0][1])
    width, height = (WIDTH - LEFT - RIGHT) / len(columns), (HEIGHT - TOP - BOTTOM) / n_lines
    shade = _scale(low, high, 0, 1, is_log=True)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>',
        f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>',
        f'<text class="mark end" x="{WIDTH - RIGHT}" y="16">{_label(low)} (dark) to {_label(high)}</text>',
    ]
    for number, (step, column) in enumerate(columns):
        for line, value in enumerate(column):
            place = f'x="{LEFT + number * width:.2f}" y="{TOP + line * height:.2f}"'
            size = f'width="{width + 0.3:.2f}" height="{height + 0.3:.2f}"'
            note = f"<title>step {step:,}, row {line}: {value:.4g}</title>" if len(columns) * n_lines <= 600 else ""
            parts.append(f'<rect {place} {size} fill="{_colour(shade(value))}">{note}</rect>')
    bottom = HEIGHT - BOTTOM + 17
    parts += [
        f'<text class="mark end" x="{LEFT - 6}" y="{TOP + 10}">row 0</text>',
        f'<text class="mark end" x="{LEFT - 6}" y="{HEIGHT - BOTTOM}">{n_lines - 1}</text>',
        f'<text class="mark" x="{LEFT}" y="{bottom}">step {_label(columns[0][0])}</text>',
        f'<text class="mark end" x="{WIDTH - RIGHT}" y="{bottom}">{_label(columns[-1][0])}</text>',
    ]
    return "".join([*parts, "</svg>"])


def _columns(rows: Sequence[tuple[int, Sequence[float]]]) -> list[tuple[int, list[float]]]:
    """Return the columns of a heat map: means of neighbouring steps where there are too many."""
    count = min(MOST_COLUMNS, len(rows))
    edges = [len(rows) * number // count for number in range(count + 1)]
    columns = []
    for first, last in itertools.pairwise(edges):
        group = rows[first:last]
        means = [sum(values) / len(values) for values in zip(*(row for _, row in group), strict=True)]
        columns.append((group[-1][0], means))
    return columns


PALETTE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Five colours of viridis (matplotlib), which stay in order in grey and for colour-blind eyes."""


def _colour(value: float) -> str:
    """Return the colour of a number in [0, 1]."""
    place = min(max(value, 0.0), 1.0) * (len(PALETTE) - 1)
    index = min(int(place), len(PALETTE) - 2)
    mixed = (a + (b - a) * (place - index) for a, b in zip(PALETTE[index], PALETTE[index + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)
