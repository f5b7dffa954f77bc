"""Files that are read soon, at random places: read ahead into the page cache, whole and in sequence, by a thread."""

import contextlib
import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_PIECE = 16 << 20
"""Bytes that the system is asked for at once."""
_REMEMBERED = 1024
"""Files that are not asked for again."""
_MEMORY_SHARE = 8
"""Files wanted together may have one of so many parts of the memory that is free; others are left to random reads."""


class ReadAhead:
    """Reads files ahead; nothing else depends on it: what fails here is found where the file is read.

    Its thread starts with the first wish, so that it may be made before a process forks.
    """

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._known: OrderedDict[Path, None] = OrderedDict()
        self._thread: threading.Thread | None = None

    def want(self, files: Sequence[Path]) -> None:
        """Read files ahead that were not asked for lately, in their order; returns at once."""
        new = [file for file in files if file not in self._known]
        if not new or not hasattr(os, "posix_fadvise"):
            return
        for file in new:
            self._known[file] = None
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        if _size(files) > _free_memory() // _MEMORY_SHARE:
            logger.debug("%d files are too large to be read ahead", len(files))
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        for file in new:
            self._wanted.put(file)

    def _work(self) -> None:
        while True:
            path = self._wanted.get()
            try:
                with path.open("rb", buffering=0) as file:
                    for at in range(0, os.fstat(file.fileno()).st_size, _PIECE):
                        os.posix_fadvise(file.fileno(), at, _PIECE, os.POSIX_FADV_WILLNEED)
            except OSError as error:
                logger.debug("%s is not read ahead: %s", path, error)


def _size(files: Sequence[Path]) -> int:
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def _free_memory() -> int:
    """Return the bytes that the page cache may grow by; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
