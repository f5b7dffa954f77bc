"""A lock of a folder: one job at a time writes in it, be it on this host or on another one that shares the disk.

The lock is a hidden file that names its holder: host, process with its start time, and job. It appears whole and for
one job only, by a hard link, or by O_EXCL where a disk has no links: network disks keep to both, and not always to
fcntl. A thread sets the file's time every few seconds, which is the holder's sign of life.

A holder that has crashed keeps nobody out:

1. Of a holder on this host the system says whether its process is still there.
2. Of one on another host the sign of life is watched: it comes again, or has been missing for `SILENCE_S`. Ages are
   differences of two times that the disk gave, so that clocks need not agree.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from storage.process import Process, place_of_this_process, this_process

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the file."""
HEARTBEAT_S = 10.0
"""Seconds between two signs of life."""
SILENCE_S = 60.0
"""Seconds without a sign of life after which a holder on another host counts as dead."""
DYING_S = 1.0
"""Seconds for a holder that was killed a moment ago to be gone, and for another one to remove its lock."""
POLL_S = 0.1
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class FolderInUseError(ValueError):
    """Another job writes in the folder."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock, as the file says."""

    host: str
    place: str
    """Host and process namespace: see `place_of_this_process`."""
    process: Process
    job: str
    """What it does, such as "dalle-train clip"."""
    group: str
    """Name of the launched job that its process is one of; empty if it is alone."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells this lock from all others."""
    seen_at: float = 0.0
    """Last sign of life, in seconds since 1970 by the disk's clock."""

    def __str__(self) -> str:
        return f"{self.job} (host {self.host}, process {self.process.pid})"

    @property
    def is_here(self) -> bool:
        """Whether its process is one that this one can see."""
        return self.place == place_of_this_process()

    def has_ended(self, group: str) -> bool:
        """Return whether it is sure to have ended.

        Args:
            group: of the process that asks. A launcher that starts a job's first rank again, on another host too, has
                ended the one before.
        """
        return self.process.is_gone() if self.is_here else bool(group) and self.group == group


@contextlib.contextmanager
def locked(
    folder: Path,
    job: str,
    *,
    group: str = "",
    wait_s: float = 0.0,
    on_lost: Callable[[str], None] = logger.warning,
) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing.

    Args:
        folder: where this job writes.
        job: what it is, for messages.
        group: see `Holder.group`.
        wait_s: seconds to wait for another holder to end.
        on_lost: called in a thread, with a line that says so, if another job has taken the lock, because this process
            was stopped or its disk hung for longer than `SILENCE_S`.

    Raises:
        FolderInUseError: another job holds it.
        OSError: the folder cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    me = Holder(host=socket.gethostname(), place=place_of_this_process(), process=this_process(), job=job, group=group)
    path = folder / LOCK
    stopped = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, me, stopped, on_lost), name=f"lock of {folder}", daemon=True)
    try:
        _acquire(path, me, wait_s)
        thread.start()
        yield
    finally:
        stopped.set()
        if thread.ident is not None and os.getpid() == me.process.pid:  # and not in a forked child
            thread.join(POLL_S)
        with contextlib.suppress(OSError):
            if _is_of(path, me):
                path.unlink()
        with contextlib.suppress(OSError):  # what it was made for may not have begun
            for empty in made:
                empty.rmdir()


def holder_of(folder: Path) -> Holder | None:
    """Return who holds the lock of a folder; None if nobody does, or only a process of this host that has ended."""
    holder = _read(folder / LOCK)
    return None if holder is None or holder.has_ended("") else holder


def require_free(folder: Path, job: str, *, group: str = "", wait_s: float = 0.0) -> None:
    """Check that no living job holds the lock of a folder; arguments and errors as those of `locked`."""
    if holder_of(folder) is not None:
        with locked(folder, job, group=group, wait_s=wait_s):
            pass


def _acquire(path: Path, me: Holder, wait_s: float) -> None:
    """Place this process's lock, after removing that of a dead holder.

    Raises:
        FolderInUseError: another one is alive.
        OSError: the folder cannot be written to.
    """
    own = path.with_name(f"{LOCK}.{me.token}.wanted")
    deadline = time.monotonic() + max(wait_s, DYING_S)
    first_seen: dict[str, float] = {}
    try:
        _write_beside(path, own, me)
        while not _place(own, path):
            holder = _read(path)
            if holder is None:
                continue
            silent_s = _now(own) - holder.seen_at
            is_seen = holder.is_here and holder.process.started  # without /proc an id may be another process's by now
            if holder.has_ended(me.group) or (not is_seen and silent_s >= SILENCE_S):
                _remove(path, holder, own)
                continue
            if holder.token not in first_seen and not holder.is_here:
                logger.info("waiting up to %.0f s for a sign of life of %s", SILENCE_S - silent_s, holder)
            is_alive = holder.is_here or holder.seen_at > first_seen.setdefault(holder.token, holder.seen_at)
            if is_alive and time.monotonic() >= deadline:
                raise FolderInUseError(
                    f"{path.parent} is in use by {holder}, last sign of life {max(0.0, silent_s):.0f} s ago: wait for "
                    "its end, stop it, or give another --out"
                )
            time.sleep(POLL_S)
    finally:
        with contextlib.suppress(OSError):
            own.unlink()


def _write_beside(path: Path, own: Path, me: Holder) -> None:
    """Write who wants the lock to a file of its own; the folder is made."""
    for is_last in (False, False, True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps({**asdict(me), "seen_at": time.time()}))
            return
        except OSError as error:
            # one that the folder was made for in vain may just have removed it
            if is_last or not isinstance(error, FileNotFoundError):
                error.filename = str(path.parent)
                raise


def _place(own: Path, path: Path) -> bool:
    """Let a file be the lock, unless there is one; returns whether it is."""
    try:
        os.link(own, path)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):  # a network disk may have linked it, and lost the answer
            return os.path.samefile(own, path)
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with path.open("xb") as file:
                file.write(own.read_bytes())
        except FileExistsError:
            return False
    return True


def _read(path: Path) -> Holder | None:
    """Return who holds a lock; None without one. A file that cannot be read as one is of an unknown holder."""
    try:
        with path.open("rb") as file:
            status, text = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None
    try:
        values = json.loads(text)
        return Holder(**{**values, "process": Process(**values["process"]), "seen_at": status.st_mtime})
    except (ValueError, KeyError, TypeError):
        nobody, token = Process(pid=0, started=0), f"{status.st_ino}-{status.st_mtime_ns}"
        return Holder(
            host="unknown", place="", process=nobody, job="a job", group="", token=token, seen_at=status.st_mtime
        )


def _is_of(path: Path, holder: Holder) -> bool:
    found = _read(path)
    return found is not None and found.token == holder.token


def _now(own: Path) -> float:
    """Return the time by the disk's clock."""
    os.utime(own)
    return own.stat().st_mtime


def _remove(path: Path, holder: Holder, own: Path) -> None:
    """Remove the lock of a dead holder.

    Of all that want to, only the one that makes a file named for this holder may: otherwise the second one would remove
    the new lock of the first.
    """
    mine = path.with_name(f"{LOCK}.{holder.token}.ended")
    try:
        mine.touch(exist_ok=False)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if _now(own) - mine.stat().st_mtime > DYING_S:  # left by one that crashed here
                mine.unlink()
        time.sleep(POLL_S)
        return
    try:
        if _is_of(path, holder):
            path.unlink()
    finally:
        mine.unlink(missing_ok=True)


def _beat(path: Path, me: Holder, stopped: threading.Event, on_lost: Callable[[str], None]) -> None:
    """Give signs of life until told to stop."""
    while not stopped.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # the next one may succeed
            holder = _read(path)
            if holder is not None and holder.token != me.token:
                on_lost(
                    f"{path.parent} was taken by {holder}, which saw no sign of life from here for {SILENCE_S:.0f} s"
                )
                return
            os.utime(path)
