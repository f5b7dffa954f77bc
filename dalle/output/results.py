"""The folder that `dalle generate` and `edit` write: a folder of PNGs per caption, results.jsonl with a line per PNG.

Any number of runs may write to one folder at once, also from several hosts. A caption's pictures and lines are written
under a lock of the folder, and pictures whose numbers are taken get higher ones. A run that is under way holds the lock
of a hidden folder of its own, by which the others know of it.
"""

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

from torch import Tensor

from dalle.output.sheets import save_png, slug
from dalle.output.text import counted
from dvae.images import to_image
from storage.atomic import PARTIAL, flush_names, replace_file
from storage.lock import LOCK, is_locked, locked
from storage.text import parse_json

logger = logging.getLogger(__name__)

RUN = ".run-"
"""Beginning of the name of a run's hidden folder."""
WRITTEN = ("results.jsonl", "sheet.png")
"""What runs write as they go on, and at their end."""
CLOCK_STEP_S = 0.02
"""Longest step of a disk's clock."""
HIDDEN = {"prefix": ".", "suffix": PARTIAL}
LONGEST_WAIT_S = 600.0
"""For the lock, which others hold as long as it takes to write the pictures of one caption."""


class Pictures(Protocol):
    """Pictures of a caption."""

    @property
    def caption(self) -> str:
        """May be empty."""

    @property
    def images(self) -> Tensor:
        """float32 (K, 3, H, W) in [0, 1]."""

    def described(self) -> list[dict[str, Any]]:
        """Return what is to be said of each, for its metadata."""


class ResultWriter:
    """Writes the pictures of captions to a folder: DIR/<slug>/NN.png and results.jsonl; a context.

    Captions of other runs stay. A caption that is made again replaces its pictures and lines that were there when the
    run began (logged), unless another run was under way then or since.

    Args:
        out: the folder; made if need be.
        age_s: seconds since the run began, to load models for example.

    Raises:
        OSError: it cannot be written to.
        ValueError: it holds a results.jsonl of something else, or another run holds the lock for too long.
    """

    def __init__(self, out: Path, age_s: float = 0.0) -> None:
        self._out, self._age_s = out, age_s
        self._path = out / "results.jsonl"
        self._older: list[dict[str, Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Begin; fails now rather than after an hour of sampling if the folder cannot be written to."""
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(f"{self._out} is a file: give a folder to write pictures to") from None
        own = self._out / f"{RUN}{secrets.token_hex(4)}"
        with self._locked():
            lines = _read_results(self._path)
            if not _others(self._out, self._age_s):
                self._older = lines
            self._stack.enter_context(locked(own))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(
        self,
        result: Pictures,
        settings: Mapping[str, Any],
        hashes: Mapping[str, str],
        each: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write the pictures of one caption; `each` is what else is to be said of each.

        Raises:
            OSError: the disk is full, for example; what was there before is unchanged.
            FolderInUseError: another run holds the lock for too long.
        """
        folder = self._out / slug(result.caption)
        folder.mkdir(exist_ok=True)
        older = [line for line in self._older if line["caption"] == result.caption]
        replaced = {line["file"] for line in older}
        with self._locked(), TemporaryDirectory(**HIDDEN, dir=folder, ignore_cleanup_errors=True) as name:
            making = Path(name)
            first = _free_number(folder, len(result.images), replaced)
            lines = _lines(result, folder.name, first, {**settings, "hashes": dict(hashes)}, each)
            _make(result, lines, making, folder)
            # a line never tells of another picture than its own, even if this ends between two of these
            if older or _is_torn(self._path):
                kept = [line for line in _read_results(self._path) if line not in older]
                replace_file(self._path, lambda partial: partial.write_bytes(_text(kept)))
            for file in replaced - {line["file"] for line in lines}:
                (self._out / file).unlink(missing_ok=True)
            for line in lines:
                os.replace(making / Path(line["file"]).name, self._out / line["file"])
            flush_names(folder)
            _append(self._path, _text(lines))
        self._older = [line for line in self._older if line["caption"] != result.caption]
        if older:
            logger.info("replaced the %s of an earlier run in %s", counted(len(older), "picture"), folder)
        if first > 1:
            logger.info("the pictures that are in %s stay: the new ones begin with %02d.png", folder, first)

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self._out, wait_s=LONGEST_WAIT_S)


def _others(out: Path, age_s: float) -> bool:
    """Return whether other runs have written to a folder in the last seconds, or are under way.

    This one holds the folder's lock, whose time is the disk's. What dead ones left is removed.
    """
    now = (out / LOCK).stat().st_mtime
    written = [out / name for name in WRITTEN if (out / name).exists()]
    found = any(path.stat().st_mtime > now - age_s + CLOCK_STEP_S for path in written)
    for folder in out.glob(f"{RUN}*"):
        with suppress(OSError):  # it ends at this moment
            if is_locked(folder):
                found = True
                continue
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _free_number(folder: Path, n: int, replaced: set[str]) -> int:
    """Return the first of n numbers for pictures in a folder: 1, unless one of those is taken and not replaced."""
    names = [path.name for path in folder.iterdir() if f"{folder.name}/{path.name}" not in replaced]
    taken = {int(match[1]) for name in names if (match := re.fullmatch(r"([0-9]{1,18})\.png", name))}
    return 1 if taken.isdisjoint(range(1, n + 1)) else max(taken) + 1


def _lines(
    result: Pictures,
    folder: str,
    first: int,
    settings: Mapping[str, Any],
    each: Sequence[Mapping[str, Any]] | None,
) -> list[dict[str, Any]]:
    """Return what results.jsonl says of each picture of a caption, best first."""
    return [
        {
            "caption": result.caption,
            "file": f"{folder}/{first + i:02}.png",
            **said,
            **({} if each is None else each[i]),
            **settings,
        }
        for i, said in enumerate(result.described())
    ]


def _make(result: Pictures, lines: Sequence[Mapping[str, Any]], making: Path, folder: Path) -> None:
    """Write the pictures of a caption to a hidden folder; an error names the one that they are meant for."""
    try:
        for image, line in zip(result.images, lines, strict=True):
            texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in line.items()}
            save_png(to_image(image), making / Path(line["file"]).name, texts)
    except OSError as error:
        error.filename = str(folder)
        raise


def _text(lines: Sequence[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode("utf-8", errors="replace")


def _append(path: Path, text: bytes) -> None:
    """Add text to a file, all of it or nothing.

    Raises:
        OSError: the disk is full, for example.
    """
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                n_written = file.write(text)
                if n_written != len(text):
                    file.write(text[n_written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        error.filename = str(path)
        raise


def _is_torn(path: Path) -> bool:
    """Return whether the last line of a file has no end: what wrote it has crashed."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _read_results(path: Path) -> list[dict[str, Any]]:
    """Read the lines of earlier runs; none if there is no file. The last one may be cut short by a crash.

    Raises:
        ValueError: the file was not written by `ResultWriter`, and must hence not be changed.
    """
    if not path.exists():
        return []
    foreign = ValueError(f"{path} is not a results.jsonl of `dalle generate`: give another folder with --out")
    try:
        *whole, last = path.read_bytes().decode().split("\n")
        lines = [parse_json(line) for line in whole if line.strip()]
    except ValueError as error:
        raise foreign from error
    if last.strip():
        try:
            lines.append(parse_json(last))
        except ValueError:
            logger.warning("the last line of %s was cut short by a crash and is left out", path)
    # the names are removed when their captions are made again: only such as we write
    is_ours = [
        isinstance(line, dict)
        and isinstance(line.get("caption"), str)
        and re.fullmatch(r"[a-z0-9-]+/\d+\.png", str(line.get("file"))) is not None
        for line in lines
    ]
    if not all(is_ours) or (last.strip() and not lines):
        raise foreign
    return lines
