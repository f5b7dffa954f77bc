"""`dalle-train report`: runs as one HTML page with pictures and curves.

The page, `report.html` beside this file, needs nothing else: no network, no script, no file. Jinja escapes everything
that comes from a run, and the page itself forbids scripts and requests (Content-Security-Policy).
"""

import base64
import io
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from storage.atomic import replace_text
from training.report.curves import SPLITS, Curve, chart, has_log_values, heat_map
from training.report.evaluation import evaluation_section
from training.report.runs import Run, find_runs, has_runs, read_run
from training.report.status import ago, quality, size, state_line, summary_rows

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
"""Titles of charts; other metrics have their names."""
MAX_SHEETS, SHEET_WIDTH, SHEET_QUALITY = 12, 1000, 82
"""Sample sheets shown of a run, spread over its steps; their width in pixels, and JPEG's quality."""
MAX_SHEET_BYTES = 400_000
"""A larger sheet is shown smaller."""


def write_report(path: Path, out: Path | None = None) -> Path:
    """Write the page of the runs in a directory, and of its evaluation; returns the file.

    Args:
        path: a run's directory, a bundle's, a folder of those, or one that `dalle evaluate` has written to.
        out: the file; report.html in that directory if not given.

    Raises:
        FileNotFoundError: there is no run.
        OSError: the page cannot be written.
    """
    evaluation = evaluation_section(path)
    runs = [] if evaluation is not None and not has_runs(path) else [read_run(run) for run in find_runs(path)]
    target = out if out is not None else path / "report.html"
    html = page(runs, path.name or str(path.absolute()), time.time(), evaluation)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, html)
    return target


def page(runs: Sequence[Run], name: str, now: float, evaluation: dict[str, Any] | None = None) -> str:
    """Return the page of some runs.

    Args:
        runs: in the order in which they are shown.
        name: the page's title.
        now: seconds since 1970.
        evaluation: of `evaluation_section`; None for none.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only here

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    shown = [_shown(run, now) for run in runs]
    return environment.get_template("report.html").render(name=name, written=written, runs=shown, evaluation=evaluation)


def _shown(run: Run, now: float) -> dict[str, Any]:
    """Return what the page shows of a run."""
    return {
        "stage": run.stage,
        "state": state_line(run, now),
        "quality": quality(run),
        "charts": _charts(run),
        "maps": _maps(run),
        "sheets": _sheets(run),
        "n_sheets": len(run.samples),
        "summary": summary_rows(run, now),
        "checkpoints": [
            {
                "name": saved.name,
                "size": size(saved.bytes),
                "ago": ago(now - saved.saved_at),
                "note": "the run continues from it" if saved.is_latest else "",
            }
            for saved in reversed(run.checkpoints)
        ],
        "origin": [("directory", str(run.directory.absolute())), *_short(run.described), *_short(run.config)],
        "config": json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
    }


def _charts(run: Run) -> list[dict[str, Any]]:
    """Return the charts of a run's metrics, each twice: with steps on a linear and on a logarithmic axis."""
    names = run.names()
    charts = []
    for name in [
        *(name for name in FIRST_CHARTS if name in names),
        *(name for name in names if name not in FIRST_CHARTS),
    ]:
        curves = [Curve(kind=split, points=points) for split in SPLITS if (points := run.series(split, name))]
        linear, log = chart(curves, log_x=False), chart(curves, log_x=True)
        if linear or log:
            title = TITLES.get(name, name.replace("_", " ")) + (" (logarithmic)" if has_log_values(curves) else "")
            kinds = [curve.kind for curve in curves]
            charts.append({"title": title, "kinds": kinds, "linear": linear, "log": log})
    return charts


def _maps(run: Run) -> list[dict[str, Any]]:
    maps = []
    for split in SPLITS:
        rows = [(step, row) for step, row in run.rows(split, "image_perplexity_by_row") if min(row) > 0]
        if rows:
            values = [value for _, row in rows for value in row]
            title = f"perplexity of image tokens, {split}"
            maps.append(
                {"title": title, "low": f"{min(values):.3g}", "high": f"{max(values):.3g}", "svg": heat_map(rows)}
            )
    return maps


def _sheets(run: Run) -> list[dict[str, Any]]:
    """Return some of a run's sample sheets, the newest first."""
    last = len(run.samples) - 1
    count = min(MAX_SHEETS, len(run.samples))
    chosen = {round(last * place / max(1, count - 1)) for place in range(count)} | ({last} if count else set())
    return [_sheet(*run.samples[place]) for place in sorted(chosen, reverse=True)]


def _sheet(step: int, path: Path) -> dict[str, Any]:
    try:
        jpeg = base64.b64encode(_thumbnail(path)).decode()
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all of them for damaged files
        logger.warning("%s is left out of the report (%s)", path, error)
        jpeg = ""
    return {"step": step, "name": path.name, "jpeg": jpeg}


def _thumbnail(path: Path) -> bytes:
    """Return a picture as a JPEG of limited width and size."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((SHEET_WIDTH, 4 * SHEET_WIDTH))
    while True:
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=SHEET_QUALITY)
        if buffer.tell() <= MAX_SHEET_BYTES or min(picture.size) < 64:
            return buffer.getvalue()
        picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4))


def _short(described: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the entries that are no lists and no dictionaries."""
    return [(str(name), str(value)) for name, value in described.items() if not isinstance(value, dict | list)]
