"""Checkpoints that are forged, and saves that are killed."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from training.engine.checkpoints import digest_of, read_manifest, write_manifest

Act = Callable[..., Any]


def forge_digests(folder: Path) -> None:
    """Let checkpoint.json say that the files are as they should be."""
    note = read_manifest(folder)
    write_manifest(folder, {**note, "files": {name: digest_of(folder / name) for name in note["files"]}})


class Killed(BaseException):
    """The process ends here."""


def kill_at(patch: pytest.MonkeyPatch, moment: int) -> None:
    """Let the process end before the `moment`th thing that it would do to the disk."""
    counter = itertools.count()

    def ending(original: Act) -> Act:
        def act(*args: Any, **kwargs: Any) -> Any:
            if next(counter) >= moment:
                raise Killed
            return original(*args, **kwargs)

        return act

    for name in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
        patch.setattr(os, name, ending(getattr(os, name)))
    patch.setattr(torch, "save", ending(torch.save))
    patch.setattr(Path, "open", ending(Path.open))
    patch.setattr("training.engine.engine.save_file", ending(save_file))
