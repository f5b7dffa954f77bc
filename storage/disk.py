"""A full disk: whether it is behind an error, and which one it is."""

import errno
import os
import shutil
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ALL_BUT_FULL = 1 << 20
"""Bytes; with fewer left, a write that failed for an unknown reason is taken to have failed for want of space."""


def is_of_full_disk(error: BaseException, path: Path) -> bool:
    """Return whether writing failed because the disk is full, or a user's share of it.

    Args:
        error: what was raised. Some libraries lose the system's number of it.
        path: what could not be written.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if any(os.strerror(number) in str(error) for number in _FULL):
        return True
    return shutil.disk_usage(nearest_folder(path)).free < _ALL_BUT_FULL


def full_disk_note(error: BaseException, path: Path) -> str:
    """Return what follows an error's own words: "; " and `full_disk_text` if the disk was full, else nothing."""
    return f"; {full_disk_text(path)}" if is_of_full_disk(error, path) else ""


def full_disk_text(path: Path) -> str:
    """Return in words which disk a path is on, how much of it is left, and what to do."""
    there = nearest_folder(path)
    mount = next(folder for folder in (there, *there.parents) if os.path.ismount(folder))
    usage = shutil.disk_usage(there)
    left = f"{usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB left"
    return f"the disk at {mount} is full, or your share of it ({left}): free some space"


def nearest_folder(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
