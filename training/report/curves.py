"""Curves and heat maps as SVG elements for an HTML page, drawn by matplotlib.

They have no scripts, no titles and no legends, which are the page's; text stays text. Their colours are the page's
variables (`COLOURS`), so that they suit light and dark pages; curves differ in black and white, too.
"""

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from training.report.runs import Points

COLOURS = {
    "#010101": "var(--faint)",
    "#020202": "var(--rule)",
    "#030303": "var(--train)",
    "#040404": "var(--validation)",
}
"""Colours that matplotlib draws with, and the page's variables that replace them."""
FAINT, RULE, TRAIN, VALIDATION = COLOURS
WIDTH, HEIGHT, FONT, LETTER = 288, 158, 9, 5.7
"""Size of a chart, of its text and of a digit in points, which are pixels of the narrowest page."""
MAX_POINTS = 240
"""Points of a curve: more are drawn as means, with a band from the lowest to the highest."""
LOG_Y_RATIO = 30
"""A chart whose largest value is more than this many times its smallest has a logarithmic axis."""
MAX_COLUMNS = 80
"""Columns of a heat map: more steps are drawn as means."""


Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart."""

    kind: Split
    points: Points


@dataclass(frozen=True, kw_only=True)
class _Bin:
    x: float
    low: float
    mean: float
    high: float


def _bins(points: Points) -> list[_Bin]:
    """Return a curve's points, neighbours together where there are more than `MAX_POINTS`."""
    bins = []
    for group in _groups(points, MAX_POINTS):
        values = [value for _, value in group]
        x = sum(step for step, _ in group) / len(group)
        bins.append(_Bin(x=x, low=min(values), mean=sum(values) / len(values), high=max(values)))
    return bins


def _groups(items: Sequence[Any], limit: int) -> Iterator[Sequence[Any]]:
    """Yield items in at most `limit` groups of neighbours."""
    count = min(limit, len(items))
    edges = [len(items) * number // count for number in range(count + 1)]
    yield from (items[first:last] for first, last in itertools.pairwise(edges))


def has_log_values(curves: Sequence[Curve]) -> bool:
    """Return whether a chart of these curves has a logarithmic axis of values."""
    values = [value for curve in curves for _, value in curve.points]
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_Y_RATIO


def chart(curves: Sequence[Curve], *, log_x: bool) -> str:
    """Return a chart as an SVG element; "" if there is nothing to draw.

    Args:
        curves: of the same metric.
        log_x: draw steps on a logarithmic axis; step 0 is left out.
    """
    shown = [(curve.kind, [(x, y) for x, y in curve.points if x > 0 or not log_x]) for curve in curves]
    drawn = [(kind, _bins(points)) for kind, points in shown if points]
    if not drawn:
        return ""
    with _axes() as (axes, save):
        for kind, bins in drawn:
            _draw(axes, kind, bins)
        if log_x:
            _make_logarithmic(axes, "x")
        if has_log_values(curves):
            _make_logarithmic(axes, "y")
        axes.grid(axis="y", color=RULE, linewidth=0.8, clip_on=False)
        return save()


def _draw(axes: Any, kind: str, bins: Sequence[_Bin]) -> None:
    colour, style = (TRAIN, "-") if kind == "train" else (VALIDATION, (0, (5, 2)))
    x = [one.x for one in bins]
    if any(one.high > one.low for one in bins):
        outline = [one.high for one in bins] + [one.low for one in reversed(bins)]
        axes.fill(x + x[::-1], outline, color=colour, alpha=0.2, linewidth=0, clip_on=False)
    marker = "o" if len(bins) == 1 else ""
    axes.plot(x, [one.mean for one in bins], color=colour, linestyle=style, marker=marker, markersize=4, clip_on=False)


def _make_logarithmic(axes: Any, name: str) -> None:
    """Make an axis logarithmic, with marks at powers of ten, and at 2 and 5 times those where they would be few."""
    from matplotlib.ticker import LogLocator

    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_data_interval()
    axes.set(**{f"{name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1,) if high >= 100 * low else (1, 2, 5), numticks=6))
    axis.set_minor_locator(LogLocator(subs=()))


def heat_map(rows: Sequence[tuple[int, Sequence[float]]]) -> str:
    """Return a map of several numbers over the steps as an SVG element, dark where they are low; "" without any.

    Args:
        rows: step, and at each as many numbers above 0: the first one is drawn at the top.
    """
    if not rows:
        return ""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    columns = [_mean([row for _, row in group]) for group in _groups(rows, MAX_COLUMNS)]
    first, last, n_lines = rows[0][0], rows[-1][0], len(columns[0])
    with _axes() as (axes, save):
        axes.imshow(
            list(zip(*columns, strict=True)),
            norm=LogNorm(),
            cmap="viridis",
            aspect="auto",
            interpolation="none",
            extent=(first, max(last, first + 1), n_lines - 0.5, -0.5),
            clip_on=False,
        )
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return save()


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


@contextmanager
def _axes() -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield the axes of a new figure, and the function that returns the figure as an SVG element."""
    from matplotlib import rc_context  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    settings = {"svg.fonttype": "none", "svg.hashsalt": None, "font.size": FONT, "font.family": "DejaVu Sans"}
    with rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_subplot()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.spines[:].set_visible(False)

        def save() -> str:
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
            axes.tick_params(length=0, labelcolor=FAINT)
            _leave_room(figure, axes)
            return _element(figure)

        yield axes, save


def _leave_room(figure: Any, axes: Any) -> None:
    """Make the margins as wide as the marks; a layout of matplotlib's would double the time of a page."""
    widest = [
        LETTER * max((len(label(tick)) for tick in ticks), default=0)
        for ticks in (axes.get_xticks(), axes.get_yticks())
    ]
    figure.subplots_adjust(
        left=(6 + widest[1]) / WIDTH,
        right=1 - (2 + widest[0] / 2) / WIDTH,
        bottom=2 * FONT / HEIGHT,
        top=1 - FONT / HEIGHT,
    )


def _element(figure: Any) -> str:
    """Return a figure as an SVG element without what a page must not have: a size, a style sheet, ids used twice."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text)
    used = set(re.findall(r"#([\w-]+)[\")]", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    return re.sub(r">\s+<", "><", text).strip()


def label(value: float) -> str:
    """Return a number as a mark of an axis has it: "0.0003", "1500", "15k", "2.5M"."""
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if limit <= abs(value) < 1e15:
            return f"{value / divisor:.6g}{unit}"
    return f"{value:.6g}"


def save_panels(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    file: Path | BinaryIO,
    *,
    x_label: str,
    y_label: str,
    legend: str,
    limits: tuple[float, float] | None = (-3, 103),
) -> None:
    """Draw curves over best of N as a PNG: a panel for each title, in it a line for each name.

    Args:
        panels: x, drawn to base 2, and y, by title and name.
        file: the file, or where it is written.
        x_label: of all panels.
        y_label: of all panels.
        legend: title of the list of names.
        limits: of y, which suit percent; None for those of the curves.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(4 * len(panels), 3.2), layout="tight")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(row, panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel=x_label, ylim=limits)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    row[0].set_ylabel(y_label)
    row[-1].legend(title=legend, fontsize=8, title_fontsize=8)
    figure.savefig(file, format="png", dpi=110)
