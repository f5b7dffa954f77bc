"""Plots of a comparison: rate and distortion, and how codes are used. Drawn by matplotlib."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle.evaluation.tokenizers.codes import by_frequency, entropy_by_place
from dalle.evaluation.tokenizers.comparison import Standing
from storage.atomic import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = 4.0, 3.4
"""Size of a panel in inches."""
MARKERS = {"raw": "s", "entropy": "o", "transformer": "^"}
"""Marker of each way to count bits."""
LEGENDS = {"raw": "tokens × log2 V", "entropy": "entropy of the codes", "transformer": "under the transformer"}
LOG_RATIO = 4
"""Bits are on a logarithmic axis where the most are so many times the fewest."""
DPI = 110


@dataclass(frozen=True)
class _Axis:
    label: str
    of: Callable[[Standing], float | None]


def save_rate_distortion(standings: Sequence[Standing], paths: Sequence[Path], *, distance_name: str) -> None:
    """Draw PSNR, MS-SSIM and the own-feature distance, as far as there are, against bits a picture.

    A tokenizer is a line of one colour at the height of its distortion, with a marker for each way to count bits.

    Args:
        standings: of at least one tokenizer.
        paths: files, whose endings say the format, such as .svg and .png.
        distance_name: of the own-feature distance.

    Raises:
        OSError: a file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.lines import Line2D

    panels = [panel for panel in _panels(distance_name) if any(panel.of(one) is not None for one in standings)]
    figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1] + 0.9), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    found = [bits for one in standings for bits in _bits(one).values() if bits]
    for axes, panel in zip(row, panels, strict=True):
        for number, one in enumerate(standings):
            _draw(axes, one, panel.of(one), f"C{number % 10}")
        if max(found) >= LOG_RATIO * min(found):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(_plain)
        axes.set(xlabel="bits a picture", ylabel=panel.label)
        axes.grid(alpha=0.3)
    names = [one.contender.name for one in standings]
    handles = [Line2D([], [], color=f"C{i % 10}", label=name) for i, name in enumerate(names)]
    counts = [count for count in MARKERS if any(_bits(one)[count] is not None for one in standings)]
    handles += [
        Line2D([], [], color="grey", linestyle="", marker=MARKERS[count], label=LEGENDS[count]) for count in counts
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8, frameon=False)
    _save(figure, paths)


def _panels(distance_name: str) -> list[_Axis]:
    return [
        _Axis("PSNR, dB", lambda one: one.mean.psnr),
        _Axis("MS-SSIM", lambda one: one.mean.ms_ssim),
        _Axis(
            f"{distance_name} (lower is closer)", lambda one: None if one.distance is None else one.distance.distance
        ),
    ]


def _bits(one: Standing) -> dict[str, float | None]:
    return {"raw": one.rates.raw, "entropy": one.rates.entropy, "transformer": one.rates.transformer}


def _draw(axes: Any, one: Standing, y: float | None, colour: str) -> None:
    # a codebook of which one code is used has an entropy of 0, which a logarithmic axis cannot show
    points = {count: bits for count, bits in _bits(one).items() if bits}
    if y is None:
        return
    axes.plot(list(points.values()), [y] * len(points), color=colour, linewidth=1, alpha=0.6)
    for count, bits in points.items():
        axes.plot([bits], [y], color=colour, marker=MARKERS[count], markersize=6)


def _plain(value: float, _: object) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def save_usage(standings: Sequence[Standing], path: Path) -> None:
    """Draw how often each code is used, by rank, and for each tokenizer where in pictures its codes vary.

    Args:
        standings: of at least one tokenizer.
        path: the file.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    n = 1 + len(standings)
    columns = min(n, 4)
    rows = -(-n // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    first, *others = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, one in enumerate(standings):
        _, counts_V = by_frequency(one.tokens, one.contender.codec.config.vocab_size)
        shares = (counts_V[counts_V > 0].double() / counts_V.sum()).tolist()
        label = f"{one.contender.name}: perplexity {one.rates.usage.perplexity:.0f}"
        first.plot(range(1, len(shares) + 1), shares, color=f"C{number % 10}", label=label)
    first.set(xscale="log", yscale="log", xlabel="code, by rank", ylabel="share of the tokens")
    first.legend(fontsize=8)
    first.grid(alpha=0.3)
    for axes, one in zip(others, standings, strict=False):
        bits_YX = entropy_by_place(one.tokens, one.contender.codec.config.vocab_size)
        image = axes.imshow(bits_YX, cmap="viridis", interpolation="none")
        axes.set_title(f"{one.contender.name}: bits of the codes at each place", fontsize=9)
        axes.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=axes)
    for axes in others[len(standings) :]:
        axes.remove()
    _save(figure, [path])


def _save(figure: "Figure", paths: Sequence[Path]) -> None:
    """Write a figure, each file whole or not at all, without the time of day."""
    from matplotlib import rc_context

    for path in paths:
        kind = path.suffix[1:]
        metadata = {"Date": None} if kind == "svg" else None
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "comparison"}):
            replace_file(
                path,
                lambda partial, kind=kind, metadata=metadata: figure.savefig(  # type: ignore[misc]
                    partial, format=kind, dpi=DPI, metadata=metadata
                ),
            )
