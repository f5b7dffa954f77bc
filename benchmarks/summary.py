"""All results together: the lines to reach, met or not, and the pages with their tables and plots.

python -m benchmarks.summary          # prints the table of lines
python -m benchmarks.summary --page   # also writes docs/performance.md, benchmarks/README.md and the plots
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, Line, Table, figure, text_table

BENCHMARKS = ("attention", "train_step", "decode", "dvae", "loading", "tokenizer", "scale", "family", "gpu")
"""In the order of the table of lines."""

PAGES = (ROOT / "docs/performance.md", ROOT / "benchmarks/README.md")
"""What users read: one table, three plots. And all tables, with the lines to reach."""
IMAGES = ROOT / "docs/images"

PLOTS = {
    "n-time": ("decode-time.png", "candidates", "ms per token and candidate", True),
    "n-memory": ("decode-memory.png", "candidates", "peak memory, MiB", True),
    "grid-time": ("step-time.png", "grid, tokens a side", "seconds a training step, one sample", False),
    "grid-memory": ("step-memory.png", "grid, tokens a side", "peak memory of it, MiB", False),
}
"""By plot: file, axes, and whether they are logarithmic."""


HEADLINES = (
    ("training step, float32, B=2", "DALLE-pytorch, full"),
    ("training step, float32, B=2", "DALLE-pytorch, sparse"),
    ("training step, our best, B=2", "DALLE-pytorch, sparse"),
    ("training step, our best, B=2", "DALLE-pytorch, sparse, bf16"),
    ("training step, our best, B=2", "bf16 floor"),
    ("peak memory, float32, B=2", "DALLE-pytorch, full"),
    ("decode, N=1, our best", "static cache at its best, compiled"),
    ("decode, N=8, our best", "DALLE-pytorch, as shipped"),
    ("decode, N=64, our best", "LlamaGen-style, eager"),
    ("decode, N=256, our best", "the arithmetic floor in bf16"),
    ("cache memory per further candidate, float32", "full attention, N copies, float32"),
    ("dVAE encode, 256×256, our best", "OpenAI's DALL-E"),
    ("dVAE decode, 256×256, our best", "OpenAI's DALL-E"),
)
"""The lines that docs/performance.md shows: what, and against what."""


def results(folder: Path = RESULTS) -> dict[str, Any]:
    """Return what the benchmarks have written, by name, in order.

    Raises:
        FileNotFoundError: there is nothing.
    """
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in BENCHMARKS
        if (path := folder / f"{name}.json").exists()
    }
    if not found:
        raise FileNotFoundError(f"no results in {folder}: expected the JSON files that `make bench` writes")
    return found


def lines(found: Mapping[str, Any]) -> list[Line]:
    """Return the lines to reach of all results."""
    names = ("what", "against", "value", "limit", "at_most", "unit")
    return [Line(**{name: line[name] for name in names}) for result in found.values() for line in result["lines"]]


def lines_table(of: Iterable[Line]) -> Table:
    """Return the table of the lines to reach."""
    rows = [
        [
            line.what,
            line.against,
            f"{figure(line.value)}{line.unit}",
            f"{'≤' if line.at_most else '≥'} {figure(line.limit)}{line.unit}",
            "met" if line.met else "NOT MET",
        ]
        for line in of
    ]
    return Table(title="Lines to reach", columns=["what", "against", "found", "to reach", ""], rows=rows)


def headline_table(of: Iterable[Line]) -> Table:
    """Return the table of docs/performance.md."""
    found = {(line.what, line.against): line for line in of}
    chosen = [found[key] for key in HEADLINES if key in found]
    rows = [[line.what, line.against, f"{figure(line.value)}{FASTER.get(line.unit, line.unit)}"] for line in chosen]
    return Table(title="Beside other code", columns=["what", "against", "found"], rows=rows)


FASTER = {"×": "× as fast"}
"""Units of lines, where the table for users has other words."""


def markdown(table: Table) -> str:
    """Return a table for the page."""
    rows = [[figure(cell).replace("|", "\\|") for cell in row] for row in (table.columns, *table.rows)]
    text = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"**{table.title}**", "", text[0], "|---" + "|---:" * (len(table.columns) - 1) + "|", *text[1:]])


def measured_on(found: Mapping[str, Any]) -> str:
    """Return what the figures were measured on, a line for each machine and day."""
    by_machine: dict[str, list[str]] = {}
    for name, result in found.items():
        machine, versions = result["machine"], result["versions"]
        place = (
            f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"{', '.join(machine['instructions'])}; "
            f"torch {versions['torch']}, Python {versions['python']}; {result['date']}"
        )
        by_machine.setdefault(place, []).append(f"{name} at {result['commit'] or 'an unknown commit'}")
    return "\n".join(f"- {place}: {', '.join(names)}" for place, names in by_machine.items())


def blocks(found: Mapping[str, Any]) -> dict[str, str]:
    """Return what the pages' marked places hold: the machine, the lines, and each benchmark's tables and rates."""
    of = lines(found)
    made = {
        "machine": measured_on(found),
        "ratios": markdown(headline_table(of)),
        "lines": markdown(lines_table(of)),
    }
    for name, result in found.items():
        tables = [Table(title=t["title"], columns=t["columns"], rows=t["rows"]) for t in result["tables"]]
        notes = [f"- {note}" for note in result["notes"]]
        made[name] = "\n\n".join([*map(markdown, tables), "\n".join(notes)])
    rates = found.get("train_step", {}).get("rates", {})
    made["rates"] = markdown(
        Table(title="Rates of this machine", columns=["", "GFLOP/s, GB/s"], rows=list(rates.items()))
    )
    return made


def filled(page: str, made: Mapping[str, str]) -> str:
    """Return the page with its places, `<!-- NAME -->` to `<!-- end -->`, filled anew; those without a result stay."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{made[name]}\n<!-- end -->" if name in made else match[0]

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, page, flags=re.S)


COLOURS = {
    "ours, best": "#0b5394",
    "ours, bf16": "#0b5394",
    "ours, float32, eager": "#8fbce6",
    "ours": "#3d85c6",
    "DALLE-pytorch": "#cc4125",
    "LlamaGen": "#e69138",
    "static cache": "#8a8a8a",
}
"""By the beginning of a curve's name, the first that fits."""


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Draw the plots of which there are curves."""
    import matplotlib  # only for the plots, and slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    series = [one for result in found.values() for one in result["series"]]
    for plot, (file, x_label, y_label, logarithmic) in PLOTS.items():
        curves = [one for one in series if one["plot"] == plot]
        if not curves:
            continue
        figure_, axes = pyplot.subplots(figsize=(6.4, 4.6), dpi=120, layout="constrained")
        for curve in curves:
            name = curve["name"]
            colour = next(colour for start, colour in COLOURS.items() if name.startswith(start))
            line = "-" if name.startswith("ours") else "--"
            axes.plot(curve["x"], curve["y"], label=name, color=colour, linestyle=line, marker="o", linewidth=2)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        else:
            axes.set_ylim(bottom=0)
        ticks = sorted({x for curve in curves for x in curve["x"]})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure_.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
        figure_.savefig(folder / file, metadata={"Software": None})
        pyplot.close(figure_)


def write_pages(found: Mapping[str, Any]) -> None:
    """Write the tables of the results into the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), blocks(found)), encoding="utf-8")


def main() -> None:
    """Print the table of lines; write the page if told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the pages and the plots, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    arguments = parser.parse_args()
    try:
        found = results(arguments.results)
    except FileNotFoundError as error:
        sys.exit(str(error))
    of = lines(found)
    print(text_table(lines_table(of)))
    print(f"\n{sum(line.met for line in of)} of {len(of)} met")
    if arguments.page:
        write_pages(found)
        draw(found, IMAGES)


if __name__ == "__main__":
    main()
