"""A run's directory, read back: what it was told, its metrics, checkpoints and samples, and how it is going.

Nothing here imports torch: `dalle-train status` answers at once. Everything is read as it is found, also while a run is
going on, or after a crash: what is damaged is counted and left out.
"""

import itertools
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.metrics import read_metrics, read_object

RECENT_LINES = 50
"""Lines of metrics from which the time of a step is estimated."""
PAUSE_FACTOR = 10
"""Between two lines more than this many times the usual time lies an interruption, which no estimate counts."""
LONGEST_SILENCE = 5
"""A run that has not written for this many times the usual time shows no sign of life."""
LEAST_SILENCE_S, SILENCE_AT_START_S = 120.0, 600.0
"""But not before the first; and until the usual time is known, the second."""

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
    """Whether the run would go on from it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What there is of a run."""

    directory: Path
    config: dict[str, Any]
    """config.json; empty if that is missing or damaged."""
    lines: list[dict[str, Any]]
    """The readable lines of metrics.jsonl."""
    n_damaged: int
    """How many lines are not readable."""
    checkpoints: list[SavedCheckpoint]
    """In the order of their steps."""
    samples: list[tuple[int, Path]]
    """Step and picture, in the order of the steps."""
    said: dict[str, Any]
    """state.json; empty for a run that left none."""

    @property
    def stage(self) -> str:
        """The stage that is trained."""
        return str(self.described.get("stage", self.directory.name))

    @property
    def described(self) -> dict[str, Any]:
        """What config.json says of the run: stage, recipe, model."""
        return _dictionary(self.config.get("run"))

    @property
    def steps(self) -> int | None:
        """Optimizer steps that it was told to take."""
        return _whole(_dictionary(self.config.get("training")).get("steps"))

    @property
    def step(self) -> int:
        """The last step that there is a line or a checkpoint of."""
        return max([0, *(int(line["step"]) for line in self.lines), *(saved.step for saved in self.checkpoints)])

    def split(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a split, train or validation, in the order of their steps."""
        return sorted((line for line in self.lines if line.get("split") == name), key=lambda line: int(line["step"]))

    def series(self, split: str, name: str) -> Points:
        """Return the finite values of a metric."""
        return [(line["step"], line[name]) for line in self.split(split) if is_number(line.get(name))]

    def rows(self, split: str, name: str) -> list[tuple[int, list[float]]]:
        """Return the values of a metric that has several numbers, all of the same length and finite."""
        found = [(line["step"], line[name]) for line in self.split(split) if isinstance(line.get(name), list)]
        found = [(step, row) for step, row in found if row and all(is_number(value) for value in row)]
        return [(step, row) for step, row in found if len(row) == len(found[-1][1])]

    def names(self) -> list[str]:
        """Return the names of all metrics that have a number somewhere."""
        return sorted({name for line in self.lines for name, value in line.items() if is_number(value)} - _NO_METRICS)

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds that a step takes, of late, with validation and all; None if that cannot be told yet."""
        lines = [line for line in self.split("train") if is_number(line.get("time"))][-RECENT_LINES:]
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
        """Seconds until the last step at this speed."""
        if self.steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.steps - self.step) * self.seconds_per_step

    @property
    def last_sign_at(self) -> float | None:
        """When something was written last, in seconds since 1970."""
        times = [line["time"] for line in self.lines if is_number(line.get("time"))]
        times += [saved.saved_at for saved in self.checkpoints]
        times += [self.said["time"]] if is_number(self.said.get("time")) else []
        return max(times, default=None)

    def state(self, now: float) -> str:
        """Return running, finished, stopped, failed, or silent: it should have written something since.

        Args:
            now: seconds since 1970.
        """
        newest = max((saved.step for saved in self.checkpoints if saved.is_latest), default=0)
        is_done = self.steps is not None and newest >= self.steps
        said = self.said.get("state")
        if said in ("finished", "stopped", "failed"):
            return "finished" if is_done and said == "stopped" else str(said)
        if is_done and said is None:
            return "finished"
        return "running" if self.last_sign_at is not None and now - self.last_sign_at <= self._patience_s else "silent"

    @property
    def _patience_s(self) -> float:
        log_every = _whole(_dictionary(self.config.get("training")).get("log_every"))
        if self.seconds_per_step is None or log_every is None:
            return SILENCE_AT_START_S
        return max(LEAST_SILENCE_S, LONGEST_SILENCE * log_every * self.seconds_per_step)


_NO_METRICS = {"step", "time", "samples"}


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def find_runs(path: Path) -> list[Path]:
    """Return the runs in a directory: itself, those of a bundle, or of all bundles in a folder, in the order of start.

    Raises:
        FileNotFoundError: there is no such directory, or no run in it.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}: give a run's, a bundle's, or a folder of those")
    if _is_run(path):
        return [path]
    for pattern in ("training/*", "*", "*/training/*"):
        found = [folder for folder in path.glob(pattern) if _is_run(folder)]
        if found:
            return sorted(found, key=lambda folder: (folder.parent, _started_at(folder), folder.name))
    raise FileNotFoundError(
        f"there is no run in {path}: expected a run's directory, with config.json and metrics.jsonl in it, a bundle's, "
        "or a folder of those"
    )


def _is_run(path: Path) -> bool:
    return path.is_dir() and ((path / "metrics.jsonl").is_file() or "run" in read_object(path / "config.json"))


def _started_at(run: Path) -> float:
    """When a run was started: config.json is written then."""
    config = run / "config.json"
    return config.stat().st_mtime if config.is_file() else 0.0


def read_run(directory: Path) -> Run:
    """Return what there is of a run now.

    Raises:
        OSError: a file is there and cannot be read.
    """
    lines = read_metrics(directory / "metrics.jsonl")
    return Run(
        directory=directory,
        config=read_object(directory / "config.json"),
        lines=lines,
        n_damaged=_count_lines(directory / "metrics.jsonl") - len(lines),
        checkpoints=_checkpoints(directory / "checkpoints"),
        samples=_samples(directory / "samples"),
        said=read_object(directory / "state.json"),
    )


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    return sum(1 for line in path.read_bytes().splitlines() if line.strip())


def _checkpoints(folder: Path) -> list[SavedCheckpoint]:
    latest = folder / "latest"
    name_of_latest = latest.read_text(errors="replace").strip() if latest.is_file() else ""
    found = []
    for path, step in _by_step(folder, r"step(\d+)"):
        sizes = list(_file_sizes(path))
        if sizes:
            saved_at = max(modified_at for _, modified_at in sizes)
            size = sum(size for size, _ in sizes)
            is_latest = path.name == name_of_latest
            found.append(SavedCheckpoint(name=path.name, step=step, bytes=size, saved_at=saved_at, is_latest=is_latest))
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


def _samples(folder: Path) -> list[tuple[int, Path]]:
    return [(step, path) for path, step in _by_step(folder, r"step(\d+)\.png")]


def _by_step(folder: Path, pattern: str) -> Sequence[tuple[Path, int]]:
    """Return what a folder holds whose name is a step, in the order of the steps."""
    if not folder.is_dir():
        return []
    named = [(path, re.fullmatch(pattern, path.name)) for path in folder.iterdir()]
    return sorted(((path, int(match[1])) for path, match in named if match), key=lambda found: found[1])


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
