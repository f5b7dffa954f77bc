"""A lock of a folder: one job at a time writes in it, be it on this host or on another one that shares the disk.

The lock is a lease of filelock: a hidden file that names its holder's host and process, and whose time a thread sets
every few seconds, as a sign of life. Of a holder on this host the system says whether it has ended; of any other one
the sign of life is awaited, and a lease without any for `SILENCE_S` is taken over.

`host_lock` is another kind: of the system's, for moments, among the processes of one host.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from filelock import FileLock, LeaseCompromise, SoftFileLease, Timeout
from filelock import OwnerRecord as Holder

from storage.process import status_of

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the file."""
SILENCE_S = 60.0
"""Seconds without a sign of life after which a holder counts as dead; it gives one every third of them."""
POLL_S = 0.1


class FolderInUseError(ValueError):
    """Another job writes in the folder."""


@contextlib.contextmanager
def locked(folder: Path, *, wait_s: float = 0.0, on_lost: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing.

    Args:
        folder: where this job writes.
        wait_s: seconds to wait for another holder to end.
        on_lost: called in a thread, with a line that says so, if another job has taken the lock, because this process
            was stopped or its disk hung for longer than `SILENCE_S`.

    Raises:
        FolderInUseError: another job holds it.
        OSError: the folder cannot be written to.
    """

    def lost(how: LeaseCompromise) -> None:
        (on_lost if how.reason == "owner-changed" else logger.warning)(
            f"the lock of {folder} was lost ({how.reason}): another job may write in it"
        )

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lease = _lease(folder, lost)
    try:
        try:
            _acquire(lease, folder, wait_s)
        except OSError as error:
            error.filename = error.filename or str(folder)
            raise
        yield
    finally:
        lease.release()
        with contextlib.suppress(OSError):  # what it was made for may not have begun
            for empty in made:
                empty.rmdir()


def require_free(folder: Path, *, wait_s: float = 0.0) -> None:
    """Check that no living job holds the lock of a folder; arguments and errors as those of `locked`."""
    if (folder / LOCK).exists():
        with locked(folder, wait_s=wait_s):
            pass


def is_locked(folder: Path) -> bool:
    """Return whether a job that may be alive holds the lock of a folder, which exists."""
    lease = _lease(folder)
    try:
        with lease.acquire(timeout=0):
            return False
    except Timeout:
        return True


def is_locked_by(folder: Path, processes: Collection[int]) -> bool:
    """Return whether one of these processes of this host, by their ids, holds the lock of a folder."""
    holder = _lease(folder).owner
    return holder is not None and holder.pid in processes and _runs_here(holder)


@contextlib.contextmanager
def host_lock(file: Path, wait_s: float) -> Iterator[bool]:
    """Hold a lock among the processes and threads of one host, which ends with its holder; yields whether it is held.

    Args:
        file: stands for what is locked; made if it is missing, with its folder, and left there.
        wait_s: seconds to wait for another holder.

    Raises:
        OSError: the file cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=wait_s, poll_interval=POLL_S)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _lease(folder: Path, on_compromise: Callable[[LeaseCompromise], None] | None = None) -> SoftFileLease:
    return SoftFileLease(
        folder / LOCK,
        lease_duration=SILENCE_S,
        poll_interval=POLL_S,
        thread_local=False,
        on_compromise=on_compromise,
    )


def _acquire(lease: SoftFileLease, folder: Path, wait_s: float) -> None:
    """Acquire a lease, when its holder ends, has ended, or has been silent for too long.

    Raises:
        FolderInUseError: another holder is alive.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    first: tuple[Holder, float] | None = None
    while True:
        with contextlib.suppress(Timeout):
            lease.acquire(timeout=POLL_S)
            return
        holder = lease.owner
        try:
            seen_at = (folder / LOCK).stat().st_mtime
        except FileNotFoundError:
            continue
        if holder is None:
            continue  # half-written, or damaged: filelock removes it when it is old
        silent_s = max(0.0, time.time() - seen_at)
        if first is None:
            first = (holder, seen_at)
            if not _runs_here(holder):
                logger.info("waiting up to %.0f s for a sign of life of %s", SILENCE_S, _name(holder))
        is_alive = _runs_here(holder) or (holder, seen_at) != first
        if is_alive and time.monotonic() >= deadline:
            raise FolderInUseError(
                f"{folder} is in use by {_name(holder)}, last sign of life {silent_s:.0f} s ago: wait for its end, "
                "stop it, or give another --out"
            )


def _name(holder: Holder) -> str:
    return f"process {holder.pid} on host {holder.hostname.partition('?pidns-')[0]}"


def _runs_here(holder: Holder) -> bool:
    """Return whether a holder is a process of this host that has not ended."""
    status = status_of(holder.pid)
    if status is None or status.state in "ZX" or holder.start is None:
        return False
    return holder.start % 2**64 == status.started  # above are the digits of the host's start
