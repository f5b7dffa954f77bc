"""Writing a file or a folder whole or not at all: readers see the older one or all of the new one.

What is new is written beside its place, brought to the disk, and renamed. Everything written through here has the modes
that the umask gives, also where a library makes its files private.
"""

import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"
"""How the names of hidden files and folders end that are being written."""


def replace_file(path: Path | str, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place.

    Args:
        path: the file; its folder is there.
        write: called with the path to write to.

    Raises:
        OSError: what `write` or the renaming raises; the older file is then still there.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        write_public(partial, write)
        flush(partial)
        os.replace(partial, path)
        flush_names(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path | str, text: str) -> None:
    """Write a text file, in UTF-8.

    Raises:
        OSError: it cannot be written; the older file is then still there.
    """
    data = text.encode()  # before anything is written
    replace_file(path, lambda partial: partial.write_bytes(data))


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder to where nothing is yet.

    Raises:
        OSError: it cannot be copied; `target` is then not there.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
    try:
        shutil.copytree(source, partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_public(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, which then has the mode of a plainly opened one: safetensors makes its files 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    write(path)
    path.chmod(mode)


def flush(file: Path) -> None:
    """Bring what a file holds to the disk.

    Raises:
        OSError: it cannot be written.
    """
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def flush_names(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
