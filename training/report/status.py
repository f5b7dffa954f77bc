"""`dalle-train status`: prints how a run is going, read from its folder; the run itself is not disturbed."""

import itertools
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dalle.output.text import aligned, duration, printable_line
from training.report.runs import Points, Run, find_runs, is_number, read_run

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
SPARKLINE_WIDTH = 60
CHANGE_LINES = 5
"""Lines of metrics whose mean is compared with the mean of as many lines before."""
CLEAR_SCREEN = "\x1b[2J\x1b[H"
LOSSES = ("loss", "text_loss", "image_loss", "nll", "kl", "psnr", "hard_psnr", "codes_used", "perplexity", "accuracy")
"""Metrics shown with their change, where a run has them."""
MAX_WATCH_S = 86_400
BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def show_status(path: Path, *, watch_s: float | None = None, out: TextIO | None = None) -> None:
    """Print how the runs in a directory are going; with `watch_s`, again and again until they end, or Ctrl-C.

    Args:
        path: a run's directory, a bundle's, or a folder of those.
        watch_s: seconds between two looks.
        out: where to print; stdout by default.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: `watch_s` is not above 0, or more than a day.
    """
    if watch_s is not None and not 0 < watch_s <= MAX_WATCH_S:
        raise ValueError(f"--watch must be above 0 seconds and at most {MAX_WATCH_S:,}, got {watch_s:g}")
    stream = sys.stdout if out is None else out
    while True:
        now = time.time()
        runs = [read_run(run) for run in find_runs(path)]
        text = _for_stream("\n\n".join(summary(run, now, blocks=_blocks(stream)) for run in runs), stream)
        print((CLEAR_SCREEN if watch_s is not None and stream.isatty() else "") + text, file=stream, flush=True)
        if watch_s is None or not any(run.state(now) in ("running", "silent") for run in runs):
            return
        try:
            time.sleep(watch_s)
        except KeyboardInterrupt:
            return
        if not stream.isatty():
            print(file=stream)


def _blocks(stream: TextIO) -> str:
    """Return the characters of a sparkline that a stream can encode."""
    try:
        BLOCKS.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return ASCII_BLOCKS
    return BLOCKS


def _for_stream(text: str, stream: TextIO) -> str:
    """Return a text with characters that a stream cannot encode replaced; names can have any."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def summary(run: Run, now: float, *, blocks: str = BLOCKS) -> str:
    """Return a run's summary for a terminal, several lines.

    Args:
        run: as it was read.
        now: seconds since 1970.
        blocks: the characters of a sparkline, from low to high.
    """
    recipe = run.described.get("recipe")
    heading = f"{run.directory}: {run.stage}" + (f", recipe {recipe}" if recipe else "")
    rows = [(label, printable_line(text)) for label, text in summary_rows(run, now, blocks)]
    return f"{printable_line(heading)}\n{aligned(rows, indent=2)}"


def summary_rows(run: Run, now: float, blocks: str = "") -> list[tuple[str, str]]:
    """Return a run's summary as labels and texts; with the curve of the loss if there are `blocks` to draw it."""
    rows = [
        ("state", state_line(run, now)),
        ("progress", _progress(run, now)),
        *((name, _with_change(points)) for name, points in _losses(run, "train")),
        ("", sparkline([value for _, value in run.series("train", "loss")], blocks) if blocks else ""),
        ("validation", _validation(run)),
        ("optimizer", _optimizer(run)),
        ("speed", _speed(run)),
        ("samples", _samples(run)),
        ("checkpoints", _checkpoints(run, now)),
        ("disk", f"{size(shutil.disk_usage(run.directory).free)} free"),
        ("damaged", f"{run.n_damaged} lines of metrics.jsonl cannot be read" if run.n_damaged > 1 else ""),
    ]
    return [(label, text) for label, text in rows if text]


def state_line(run: Run, now: float) -> str:
    """Say whether a run still trains, or how and when it ended."""
    state, since = run.state(now), run.last_sign_at
    when = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}, {ago(now - since)}" if since else "never"
    reason = f": {run.last_state['reason']}" if run.last_state.get("reason") else ""
    if state == "running":
        return f"running, last sign of life {ago(now - since)}" if since else "running"
    if state == "silent":
        return f"no sign of life since {when}" if since else "no sign of life yet"
    return f"{state}, {when}" + (reason if state != "finished" else "")


def _progress(run: Run, now: float) -> str:
    if run.steps is None:
        return f"step {run.step:,}"
    text = f"step {run.step:,} of {run.steps:,} ({run.step / run.steps:.1%})"
    if run.state(now) == "running" and run.left_s is not None:
        text += f", {duration(run.left_s)} left"
    elif run.left_s and run.step < run.steps:
        text += f", {duration(run.left_s)} of training left"
    return text


def _with_change(points: Points) -> str:
    """Return the last value of a metric, and its change."""
    if not points:
        return ""
    text = f"{points[-1][1]:.4g}"
    count = min(CHANGE_LINES, len(points) // 2)
    if count == 0:
        return text
    later, earlier = points[-count:], points[-2 * count : -count]
    change = sum(value for _, value in later) / count - sum(value for _, value in earlier) / count
    return f"{text} ({change:+.2g} in {later[-1][0] - earlier[-1][0]:,} steps)"


def sparkline(values: Sequence[float], blocks: str = BLOCKS, width: int = SPARKLINE_WIDTH) -> str:
    """Return a curve in one line of text, of means where there are more values than characters; "" for fewer than 2."""
    if len(values) < 2:
        return ""
    width = min(width, len(values))
    edges = [len(values) * column // width for column in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(blocks[min(len(blocks) - 1, int((mean - low) / span * len(blocks)))] for mean in means)


def _validation(run: Run) -> str:
    lines = run.split("validation")
    if not lines:
        return ""
    count = lines[-1].get("samples")
    on = f", {count:,} samples" if is_number(count) else ""
    shown = [f"{name} {_with_change(points)}" for name, points in _losses(run, "validation")]
    return f"step {lines[-1]['step']:,}{on}: {', '.join(shown)}"


def _losses(run: Run, split: str) -> list[tuple[str, Points]]:
    found = [(name.replace("_", " "), run.series(split, name)) for name in LOSSES]
    return [(name, points) for name, points in found if points]


def quality(run: Run) -> str:
    """Return the last losses of a run: on validation samples, or in training where there are none."""
    for split in ("validation", "train"):
        if found := _losses(run, split):
            return f"{split}: " + ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in found)
    return ""


def _optimizer(run: Run) -> str:
    return _listed(
        ("learning rate {:.4g}", _last(run, "learning_rate")),
        ("gradient norm {:.4g}", _last(run, "grad_norm")),
        ("loss scale {:,.0f}", _last(run, "loss_scale")),
        ("skipped steps {:,.0f}", _last(run, "skipped_steps")),
    )


def _speed(run: Run) -> str:
    return _listed(
        ("{:,.0f} tokens/s", _last(run, "tokens_per_s")),
        ("{:,.0f} images/s", _last(run, "images_per_s")),
        ("MFU {:.1%}", _last(run, "mfu")),
        ("waiting for data {:.1%}", _last(run, "data_wait")),
        ("{:.2f} GiB at most", _last(run, "peak_memory_gib")),
    )


def _samples(run: Run) -> str:
    return _listed(
        ("bad samples {:,.0f}", _last(run, "bad_samples")), ("captions cut {:.1%}", _last(run, "captions_cut"))
    )


def _last(run: Run, name: str) -> float | None:
    points = run.series("train", name)
    return points[-1][1] if points else None


def _listed(*parts: tuple[str, float | None]) -> str:
    return ", ".join(pattern.format(value) for pattern, value in parts if value is not None)


def _checkpoints(run: Run, now: float) -> str:
    if not run.checkpoints:
        return "none"
    return "; ".join(
        f"step {saved.step:,}, {size(saved.bytes)}, {ago(now - saved.saved_at)}"
        + ("" if saved.is_latest else " (older)" if _has_latest(run) else " (not complete)")
        for saved in reversed(run.checkpoints)
    )


def _has_latest(run: Run) -> bool:
    return any(saved.is_latest for saved in run.checkpoints)


def size(n_bytes: float) -> str:
    """Return a number of bytes for people: "1.2 GiB"."""
    for unit in BINARY_UNITS[:-1]:
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} {BINARY_UNITS[-1]}"


def ago(seconds: float) -> str:
    """Return an age for people: "42 s ago", "3 days ago"."""
    if seconds < 0:
        return "in the future by this clock"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds / 86_400:.0f} days ago"
