"""`dalle-train report`: a run as one HTML page with curves and pictures.

The page needs nothing else: no network, no script, no file beside it. Everything that comes from the run is escaped,
and the page itself forbids scripts and requests (Content-Security-Policy).
"""

import base64
import io
import json
import logging
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from storage.atomic import replace_text
from training.report.curves import Curve, chart, heat_map
from training.report.runs import Run, find_runs, read_run
from training.report.status import ago, size, state_line, summary

logger = logging.getLogger(__name__)

FIRST_CHARTS = (
    "loss",
    "text_loss",
    "image_loss",
    "nll",
    "kl",
    "psnr",
    "hard_psnr",
    "codes_used",
    "perplexity",
    "accuracy",
    "grad_norm",
    "learning_rate",
    "tokens_per_s",
    "images_per_s",
    "mfu",
    "data_wait",
)
"""Metrics whose curves come first, in this order; the others follow by name."""
TITLES = {
    "loss": "loss",
    "text_loss": "text loss, nats per token",
    "image_loss": "image loss, nats per token",
    "nll": "reconstruction loss",
    "psnr": "PSNR, dB",
    "hard_psnr": "PSNR of argmax tokens, dB",
    "codes_used": "codes used in a batch",
    "perplexity": "perplexity of the codes in a batch",
    "accuracy": "right caption nearest, fraction",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "images_per_s": "images per second",
    "mfu": "model FLOP/s utilisation, fraction",
    "data_wait": "waiting for data, fraction",
    "peak_memory_gib": "memory at most, GiB",
    "captions_cut": "captions cut, fraction",
}
"""Of the curves; other metrics are called by their names."""
MOST_SHEETS, SHEET_WIDTH, SHEET_QUALITY = 12, 1000, 82
"""Sample sheets of a run that are shown, spread over its steps; their width in pixels, and JPEG's quality."""
MOST_SHEET_BYTES = 400_000
"""Of one of them: a larger one is shown smaller."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --faint: #6b6b6b; --rule: #dcdcdc; --paper: #fff; --a: #1f6fb4;
  --b: #d1570a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --faint: #a0a0a0; --rule: #3a3a3a; --paper: #161616;
  --a: #6db3ee; --b: #ff9d5c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1040px;
  margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.25em; margin-top: 2.5em; border-top: 2px solid var(--rule);
  padding-top: 1em; } h3 { font-size: 1.05em; margin-top: 1.6em; }
pre { overflow-x: auto; font-size: 12.5px; line-height: 1.4; } table { border-collapse: collapse; }
td, th { text-align: left; padding: 2px 1.2em 2px 0; vertical-align: top; } th { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 10px; }
svg.chart { width: 100%; height: auto; } figure { margin: 1em 0; } figcaption { color: var(--faint); }
figure img { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .title { font-size: 13px; font-weight: 600; }
svg .mark { fill: var(--faint); } svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 1.6; } svg polyline.train { stroke: var(--a); }
svg polyline.validation { stroke: var(--b); stroke-dasharray: 5 3; }
svg polygon.train { fill: var(--a); } svg polygon.validation { fill: var(--b); } svg .band { opacity: .18; }
svg circle.train { fill: var(--a); } svg circle.validation { fill: var(--b); }
svg text.train { fill: var(--a); } svg text.validation { fill: var(--b); }
svg.log { display: none; } #log:checked ~ main svg.log { display: inline; }
#log:checked ~ main svg.linear { display: none; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(path: Path, out: Path | None = None) -> Path:
    """Write the page of the runs in a directory; returns the file.

    Args:
        path: a run's directory, a bundle's, or a folder of those.
        out: the file; report.html in that directory if not given.

    Raises:
        FileNotFoundError: there is no run.
        OSError: the page cannot be written.
    """
    runs = [read_run(run) for run in find_runs(path)]
    target = out if out is not None else path / "report.html"
    html = page(runs, path.name or str(path.absolute()), time.time())
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, html)
    return target


def page(runs: Sequence[Run], name: str, now: float) -> str:
    """Return the page of some runs.

    Args:
        runs: in the order in which they are shown.
        name: of all of them.
        now: seconds since 1970.
    """
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    links = [
        f'<li><a href="#run{i}">{escape(run.stage)}</a>: {escape(state_line(run, now))}</li>' for i, run in _n(runs)
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(name)}</h1>\n<p>Written {escape(written)}.</p>\n<ul>{''.join(links)}</ul>",
            '<input type="checkbox" id="log"> <label for="log">steps on a logarithmic axis</label>',
            "<main>",
            *(_section(i, run, now) for i, run in _n(runs)),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _n(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    return list(enumerate(runs, start=1))


def _section(number: int, run: Run, now: float) -> str:
    """Return a run's part of the page."""
    parts = [
        f'<section id="run{number}">\n<h2>{escape(run.stage)}</h2>',
        f"<pre>{escape(summary(run, now))}</pre>",
        _charts(run),
        _perplexities(run),
        _sheets(run),
        _checkpoints(run, now),
        _origin(run),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _charts(run: Run) -> str:
    names = run.names()
    ordered = [name for name in FIRST_CHARTS if name in names]
    ordered += [name for name in names if name not in FIRST_CHARTS]
    charts = []
    for name in ordered:
        curves = [
            Curve(name=split, kind=split, points=points)
            for split in ("train", "validation")
            if (points := run.series(split, name))
        ]
        title = TITLES.get(name, name.replace("_", " "))
        charts += [chart(title, curves, log_x=False), chart(title, curves, log_x=True)]
    return f'<h3>Curves</h3>\n<div class="charts">{"".join(charts)}</div>' if charts else "<p>No metrics yet.</p>"


def _perplexities(run: Run) -> str:
    maps = []
    for split in ("train", "validation"):
        rows = [(step, row) for step, row in run.rows(split, "image_perplexity_by_row") if min(row) > 0]
        maps.append(heat_map(f"perplexity of image tokens, {split}", rows))
    if not any(maps):
        return ""
    note = "The rows of the image from top to bottom, the steps from left to right."
    return f'<h3>Perplexity by row of the image</h3>\n<p>{note}</p>\n<div class="charts">{"".join(maps)}</div>'


def _sheets(run: Run) -> str:
    if not run.samples:
        return ""
    last = len(run.samples) - 1
    count = min(MOST_SHEETS, len(run.samples))
    chosen = sorted({round(last * place / max(1, count - 1)) for place in range(count)} | {last}, reverse=True)
    figures = [_figure(*run.samples[place]) for place in chosen]
    shown = f", {len(chosen)} of {len(run.samples)}" if len(chosen) < len(run.samples) else ""
    return f"<h3>Samples, the newest first{shown}</h3>\n" + "\n".join(figures)


def _figure(step: int, path: Path) -> str:
    try:
        picture = _thumbnail(path)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all of them for damaged files
        logger.warning("%s is left out of the report (%s)", path, error)
        return f"<p>{escape(path.name)} cannot be read.</p>"
    source = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    return f'<figure><img alt="samples at step {step}" src="{source}"><figcaption>step {step:,}</figcaption></figure>'


def _thumbnail(path: Path) -> bytes:
    """Return a picture as a JPEG of limited width and size."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((SHEET_WIDTH, 4 * SHEET_WIDTH))
    while True:
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=SHEET_QUALITY)
        if buffer.tell() <= MOST_SHEET_BYTES or min(picture.size) < 64:
            return buffer.getvalue()
        picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4))


def _checkpoints(run: Run, now: float) -> str:
    if not run.checkpoints:
        return ""
    rows = [
        f"<tr><td>{escape(saved.name)}</td><td>{size(saved.bytes)}</td><td>{ago(now - saved.saved_at)}</td>"
        f"<td>{'the run goes on from it' if saved.is_latest else ''}</td></tr>"
        for saved in reversed(run.checkpoints)
    ]
    head = "<tr><th>name</th><th>size</th><th>saved</th><th></th></tr>"
    return f"<h3>Checkpoints</h3>\n<table>{head}{''.join(rows)}</table>"


def _origin(run: Run) -> str:
    """Return what the run was told, and what it ran on."""
    if not run.config:
        return "<p>config.json is missing or damaged.</p>"
    short = {name: value for name, value in run.config.items() if not isinstance(value, dict | list)}
    short = {"directory": str(run.directory.absolute()), **_short(run.described), **short}
    rows = [f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in short.items()]
    config = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    details = f"<details><summary>config.json</summary><pre>{config}</pre></details>"
    return f"<h3>Where it comes from</h3>\n<table>{''.join(rows)}</table>\n{details}"


def _short(described: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if not isinstance(value, dict | list)}
