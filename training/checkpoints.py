"""Checkpoints to resume from: a folder of them, of which `latest` names the newest complete one.

DeepSpeed writes and reads the tensors; here is what makes that safe: names, an atomic `latest`, errors that every rank
hears of, and a reader that executes nothing.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

WRITE_ERRORS = (OSError, RuntimeError)
"""torch's zip writer raises RuntimeError when the disk is full."""
READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, AssertionError, pickle.UnpicklingError)
"""What torch and DeepSpeed raise for damaged, forged and foreign checkpoints."""


@contextmanager
def errors_kept(errors: list[Exception]) -> Iterator[None]:
    """While it lasts, DeepSpeed's failing writes end up in `errors`, and no rank leaves the others in a barrier."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    original = TorchCheckpointEngine.save

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except WRITE_ERRORS as error:
            errors.append(error)

    TorchCheckpointEngine.save = save
    try:
        yield
    finally:
        TorchCheckpointEngine.save = original


@contextmanager
def tensors_only() -> Iterator[None]:
    """While it lasts, DeepSpeed reads checkpoints without executing anything in them (0.19.8 would unpickle freely)."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def load(_self: object, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    original = TorchCheckpointEngine.load
    TorchCheckpointEngine.load = load
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]):
            yield
    finally:
        TorchCheckpointEngine.load = original


def checkpoint_tag(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step{step:08d}"


def latest_tag(directory: Path) -> str | None:
    """Return the name of the newest complete checkpoint in `directory`, or None."""
    latest = directory / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text().strip()
    return tag if tag and (directory / tag).is_dir() else None


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """Return what the newest checkpoint says of itself: step, ranks, zero_stage, state.

    Raises:
        ValueError: that file is missing or damaged.
    """
    path = directory / (latest_tag(directory) or "") / "checkpoint.json"
    try:
        return cast(dict[str, Any], json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}): name an earlier checkpoint in {directory / 'latest'}, "
            "or use --fresh"
        ) from None


def sync_files(folder: Path) -> None:
    """Bring the files of a folder to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def publish(directory: Path, tag: str, keep: int) -> None:
    """Let `latest` name a complete checkpoint; drop older ones, and what interrupted saves of later steps have left."""
    replace_text(directory / "latest", tag)
    tags = sorted(path for path in directory.glob("step*") if path.is_dir())
    complete = [path for path in tags if path.name <= tag]
    for path in tags:
        if path not in complete[-keep:]:
            shutil.rmtree(path, ignore_errors=True)
