"""A run's folder: the names of its files, and the JSON in them, written and read here only.

    config.json     what the run was told; written when it starts
    metrics.jsonl   a line for each step that was measured
    state.json      whether the run is running, or how it ended
    data.json       the samples it is trained on
    checkpoints/    step00000500/ and so on, and `latest`
    samples/        step00000500.png and so on
    stacks/         rank00000.txt and so on: where each rank of a run that hung stood
    tensorboard/, wandb-id

It imports no torch: `dalle-train status` answers at once.
"""

import json
import logging
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from storage.atomic import replace_text
from storage.text import parse_json

logger = logging.getLogger(__name__)

CONFIG, METRICS, STATE, DATA, WANDB_ID = "config.json", "metrics.jsonl", "state.json", "data.json", "wandb-id"
CHECKPOINTS, SAMPLES, STACKS, TENSORBOARD = "checkpoints", "samples", "stacks", "tensorboard"
LATEST = "latest"

RunState = Literal["running", "stopped", "finished", "failed"]
Line = dict[str, Any]
"""A line of metrics.jsonl: step, split, time, and the values by name."""
MAX_STEP = 10**18
"""Steps above it, or below 0, are no steps of ours: their line is damaged."""


# -------------------------------------------------------------------------------------------------- config.json


def write_config(run: Path, record: Mapping[str, Any]) -> None:
    """Write config.json: `run` describes the run, `training` has its options."""
    replace_text(run / CONFIG, json.dumps(record, indent=2, default=str))


def read_config(run: Path) -> dict[str, Any]:
    """Return config.json; empty if it is missing or damaged."""
    return _object(run / CONFIG)


def read_description(run: Path) -> dict[str, Any] | None:
    """Return the `run` of config.json: stage, recipe, model; None if there is no config.json.

    Raises:
        ValueError: it is damaged.
    """
    path = run / CONFIG
    if not path.is_file():
        return None
    try:
        return dict(parse_json(path.read_text(encoding="utf-8"))["run"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or use --fresh to train anew") from None


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's."""
    return folder.is_dir() and ((folder / METRICS).is_file() or "run" in read_config(folder))


def started_at(run: Path) -> float:
    """Return when config.json was written, in seconds since 1970; 0 without one."""
    config = run / CONFIG
    return config.stat().st_mtime if config.is_file() else 0.0


def clear(run: Path) -> None:
    """Delete what a run that starts anew must not find: checkpoints, samples, stacks, TensorBoard's files."""
    for name in (CHECKPOINTS, SAMPLES, STACKS, TENSORBOARD):
        shutil.rmtree(run / name, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ metrics.jsonl


def metrics_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return lines as metrics.jsonl has them."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_metrics(run: Path) -> list[Line]:
    """Return the readable lines of metrics.jsonl; none without the file."""
    return parse_metrics(run)[0]


def parse_metrics(run: Path) -> tuple[list[Line], int]:
    """Return the readable lines of metrics.jsonl, and the number of damaged ones, such as a crash leaves."""
    path = run / METRICS
    if not path.is_file():
        return [], 0
    texts = [text for text in path.read_bytes().splitlines() if text.strip()]
    lines = [line for text in texts if (line := _line(text)) is not None]
    return lines, len(texts) - len(lines)


def _line(text: bytes) -> Line | None:
    try:
        line = parse_json(text.decode("utf-8", "replace"))
    except ValueError:
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if type(step) is int and 0 <= step <= MAX_STEP else None


# --------------------------------------------------------------------------------------- state.json, data.json


def write_state(run: Path, state: RunState, reason: str = "") -> None:
    """Write state.json, or warn: failing to write it must not stop a run, nor hide why a run ends.

    Args:
        run: the run's folder.
        state: what the run does, or how it ended.
        reason: why it ended.
    """
    record = {"state": state, "reason": reason, "time": round(time.time(), 3), "host": socket.gethostname()}
    try:
        replace_text(run / STATE, json.dumps(record))
    except OSError as error:
        logger.warning("%s cannot be written (%s)", run / STATE, error)


def read_state(run: Path) -> dict[str, Any]:
    """Return state.json: state, reason, time, host; empty if it is missing or damaged."""
    return _object(run / STATE)


def write_data(run: Path, record: Mapping[str, Any]) -> None:
    """Write data.json: the number and the order of the samples."""
    replace_text(run / DATA, json.dumps(record, indent=1) + "\n")


def read_data(run: Path) -> dict[str, Any] | None:
    """Return data.json; None without it.

    Raises:
        ValueError: it is damaged.
    """
    path = run / DATA
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        orders = [found.get("order", []), found.get("validation") or []]
        n_rows = {len(row) for order in orders for row in order}
        if type(found["samples"]) is not int or not all(type(n) is int for n in found["shards"].values()):
            raise ValueError("its numbers of samples are no whole numbers")
        if n_rows - {2}:
            raise ValueError("its shards are not pairs of name and fingerprint")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): it tells which samples the run has seen; restore it, or delete it to "
            "resume without this check"
        ) from None
    return dict(found)


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is none to read."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --------------------------------------------------------------------------- checkpoints/, samples/ and stacks/


def checkpoint_tag(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step{step:08d}"


def is_tag(name: str) -> bool:
    """Return whether this is the name of a checkpoint; never true of a path."""
    return re.fullmatch(r"step\d{8,18}", name, re.ASCII) is not None


def step_of(tag: str) -> int:
    """Return the step that a checkpoint is named for."""
    return int(tag.removeprefix("step"))


def tags_in(checkpoints: Path) -> list[str]:
    """Return the names of the checkpoints in a folder, complete or not, newest first."""
    names = [path.name for path in checkpoints.iterdir() if path.is_dir()] if checkpoints.is_dir() else []
    return sorted(filter(is_tag, names), key=step_of, reverse=True)


def named_latest(checkpoints: Path) -> str | None:
    """Return the checkpoint that `latest` names; None if it names none."""
    try:
        tag = (checkpoints / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return tag if is_tag(tag) else None


def sheet_path(run: Path, step: int) -> Path:
    """Return the file of a step's sample sheet; its folder is made."""
    folder = run / SAMPLES
    folder.mkdir(exist_ok=True)
    return folder / f"{checkpoint_tag(step)}.png"


def sheets_in(run: Path) -> list[tuple[int, Path]]:
    """Return step and file of each sample sheet, in the order of the steps."""
    folder = run / SAMPLES
    paths = [path for path in folder.glob("*.png") if is_tag(path.stem)] if folder.is_dir() else []
    return sorted((step_of(path.stem), path) for path in paths)


def stacks_path(run: Path, rank: int) -> Path:
    """Return the file of a rank's stacks."""
    return run / STACKS / f"rank{rank:05d}.txt"
