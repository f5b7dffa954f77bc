"""A run read from its folder: options, metrics, checkpoints, samples, and whether it is still running.

Nothing here imports torch: `dalle-train status` answers at once. A run may still write, or have crashed: damaged lines
are counted and left out.
"""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.run_files import (
    CHECKPOINTS,
    MAX_STEP,
    is_run,
    named_latest,
    parse_metrics,
    read_config,
    read_state,
    sheets_in,
    started_at,
    step_of,
    tags_in,
)

RECENT_LINES = 50
"""Lines of metrics from which the time of a step is estimated."""
PAUSE_FACTOR = 10
"""More than this many times the usual time between two lines is an interruption, which no estimate counts."""
SILENCE_FACTOR = 5
"""A run that has not written for this many times the usual time shows no sign of life."""
MIN_SILENCE_S, SILENCE_AT_START_S = 120.0, 600.0
"""Seconds that any run may be silent, and a run whose usual time is not known yet."""

MAX_VALUE = 1e100
"""Numbers beyond it are left out, as infinite ones are."""
MAX_TIME_S = 2e11
"""The year 8307."""

Points = list[tuple[int, float]]
"""Step and value."""


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint in a run's directory."""

    name: str
    step: int
    bytes: int
    saved_at: float
    """Seconds since 1970."""
    is_latest: bool
    """Whether the run would continue from it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run has written."""

    directory: Path
    config: dict[str, Any]
    """config.json; empty if that is missing or damaged."""
    lines: list[dict[str, Any]]
    """The readable lines of metrics.jsonl."""
    n_damaged: int
    """Lines of metrics.jsonl that are not readable."""
    checkpoints: list[SavedCheckpoint]
    """In the order of their steps."""
    samples: list[tuple[int, Path]]
    """Step and picture, in the order of the steps."""
    last_state: dict[str, Any]
    """state.json; empty for a run that left none."""

    @property
    def stage(self) -> str:
        """The stage: dvae, clip, transformer."""
        return str(self.described.get("stage", self.directory.name))

    @property
    def described(self) -> dict[str, Any]:
        """The run as config.json describes it: stage, recipe, model."""
        return _dictionary(self.config.get("run"))

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        return _count(_dictionary(self.config.get("training")).get("steps"))

    @property
    def step(self) -> int:
        """The last step with a line or a checkpoint."""
        return max([0, *(int(line["step"]) for line in self.lines), *(saved.step for saved in self.checkpoints)])

    def split(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a split, train or validation, in the order of their steps."""
        return sorted((line for line in self.lines if line.get("split") == name), key=lambda line: int(line["step"]))

    def series(self, split: str, name: str) -> Points:
        """Return the finite values of a metric."""
        return [(line["step"], line[name]) for line in self.split(split) if is_number(line.get(name))]

    def rows(self, split: str, name: str) -> list[tuple[int, list[float]]]:
        """Return the values of a metric with several numbers a step; only finite ones, as many as in the last step."""
        found = [(line["step"], line[name]) for line in self.split(split) if isinstance(line.get(name), list)]
        found = [(step, row) for step, row in found if row and all(is_number(value) for value in row)]
        return [(step, row) for step, row in found if len(row) == len(found[-1][1])]

    def names(self) -> list[str]:
        """Return the names of all metrics with a number in any line."""
        return sorted({name for line in self.lines for name, value in line.items() if is_number(value)} - _NO_METRICS)

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds that a step takes of late, validation included; None without enough lines."""
        lines = [line for line in self.split("train") if is_time(line.get("time"))][-RECENT_LINES:]
        pairs = [
            (later["time"] - earlier["time"], later["step"] - earlier["step"])
            for earlier, later in itertools.pairwise(lines)
            if later["time"] > earlier["time"] and later["step"] > earlier["step"]
        ]
        if not pairs:
            return None
        usual = statistics.median(elapsed_s / steps for elapsed_s, steps in pairs)
        steady = [(elapsed_s, steps) for elapsed_s, steps in pairs if elapsed_s / steps <= PAUSE_FACTOR * usual]
        return float(sum(elapsed_s for elapsed_s, _ in steady) / sum(steps for _, steps in steady))

    @property
    def left_s(self) -> float | None:
        """Seconds to the last step at this speed; None if not known."""
        if self.steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.steps - self.step) * self.seconds_per_step

    @property
    def last_sign_at(self) -> float | None:
        """Time of the last write, in seconds since 1970."""
        times = [line["time"] for line in self.lines if is_time(line.get("time"))]
        times += [saved.saved_at for saved in self.checkpoints]
        times += [self.last_state["time"]] if is_time(self.last_state.get("time")) else []
        return max(times, default=None)

    def state(self, now: float) -> str:
        """Return running, finished, stopped, failed, or silent if it is overdue to write something.

        Args:
            now: seconds since 1970.
        """
        newest = max((saved.step for saved in self.checkpoints if saved.is_latest), default=0)
        is_done = self.steps is not None and newest >= self.steps
        said = self.last_state.get("state")
        if said in ("finished", "stopped", "failed"):
            return "finished" if is_done and said == "stopped" else str(said)
        if is_done and said is None:
            return "finished"
        return "running" if self.last_sign_at is not None and now - self.last_sign_at <= self._patience_s else "silent"

    @property
    def _patience_s(self) -> float:
        log_every = _count(_dictionary(self.config.get("training")).get("log_every"))
        if self.seconds_per_step is None or log_every is None:
            return SILENCE_AT_START_S
        return max(MIN_SILENCE_S, SILENCE_FACTOR * log_every * self.seconds_per_step)


_NO_METRICS = {"step", "time", "samples"}


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number, and none that sums and curves of floats cannot hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_VALUE


def is_time(value: Any) -> bool:
    """Whether a value read from JSON is a time in seconds since 1970 that a calendar knows."""
    return is_number(value) and 0 <= value <= MAX_TIME_S


def find_runs(path: Path) -> list[Path]:
    """Return the runs in a directory: itself, those of a bundle, or of all bundles in a folder, in the order of start.

    Raises:
        FileNotFoundError: there is no such directory, or no run in it.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}: give a run's, a bundle's, or a folder of those")
    if found := _runs_in(path):
        return found
    raise FileNotFoundError(
        f"there is no run in {path}: expected a run's directory, with config.json and metrics.jsonl in it, a bundle's, "
        "or a folder of those"
    )


def has_runs(path: Path) -> bool:
    """Return whether `find_runs` finds any."""
    return bool(_runs_in(path))


def _runs_in(path: Path) -> list[Path]:
    if is_run(path):
        return [path]
    for pattern in ("training/*", "*", "*/training/*"):
        found = [folder for folder in path.glob(pattern) if is_run(folder)]
        if found:
            return sorted(found, key=lambda folder: (folder.parent, started_at(folder), folder.name))
    return []


def read_run(directory: Path) -> Run:
    """Return a run as its folder shows it now.

    Raises:
        OSError: a file is there and cannot be read.
    """
    lines, n_damaged = parse_metrics(directory)
    return Run(
        directory=directory,
        config=read_config(directory),
        lines=lines,
        n_damaged=n_damaged,
        checkpoints=_checkpoints(directory / CHECKPOINTS),
        samples=sheets_in(directory),
        last_state=read_state(directory),
    )


def _checkpoints(folder: Path) -> list[SavedCheckpoint]:
    latest, found = named_latest(folder), []
    for tag in reversed(tags_in(folder)):
        sizes = list(_file_sizes(folder / tag))
        if sizes:
            checkpoint = SavedCheckpoint(
                name=tag,
                step=step_of(tag),
                bytes=sum(size for size, _ in sizes),
                saved_at=max(modified_at for _, modified_at in sizes),
                is_latest=tag == latest,
            )
            found.append(checkpoint)
    return found


def _file_sizes(folder: Path) -> Iterator[tuple[int, float]]:
    """Yield the size of every file below a folder, and when it was written; the run may be deleting them meanwhile."""
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except OSError:
            continue
        if path.is_file():
            yield status.st_size, status.st_mtime


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and 1 <= value <= MAX_STEP else None
