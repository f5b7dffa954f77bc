"""Writes a file or a folder whole or not at all: readers see the older one or all of the new one.

A new file is written beside its place, flushed to the disk, and renamed. It has the mode that the umask gives, even if
a library makes its files private.
"""

import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"
"""Ending of hidden files and folders that are being written."""


def replace_file(path: Path | str, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place.

    Args:
        path: the file; its folder is there.
        write: called with the path to write to.

    Raises:
        OSError: writing or renaming failed, and `path` is named; the older file is still there.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        write_public(partial, write)
        flush(partial)
        os.replace(partial, path)
        flush_names(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(partial), partial):
            error.filename = str(path)  # a full disk is found in a file that is open, of which the error says no name
        raise
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path | str, text: str) -> None:
    """Write a text file, in UTF-8.

    Raises:
        OSError: it cannot be written; the older file is still there.
    """
    data = text.encode()  # before anything is written
    replace_file(path, lambda partial: partial.write_bytes(data))


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder to a place that is free.

    Raises:
        OSError: it cannot be copied; `target` does not exist then.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
    try:
        shutil.copytree(source, partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_public(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, then give it the mode of a plainly opened one: safetensors makes its files 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    write(path)
    if stat.S_IMODE(path.stat().st_mode) != mode:  # some network disks know no modes, and refuse to set one
        path.chmod(mode)


def flush(file: Path) -> None:
    """Flush a file to the disk.

    Raises:
        OSError: it cannot be written.
    """
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def flush_names(folder: Path) -> None:
    """Flush the names in a folder to the disk, if its file system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
