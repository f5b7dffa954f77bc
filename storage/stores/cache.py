"""Copies of stores' files in a folder of bounded size, which all processes of a host share.

1. A file is fetched whole, by one process, into a hidden partial file; the others wait for it. A lock of the system's,
   which ends with its holder, says who fetches.
2. What a killed process has fetched is gone on with, if the store still has the same version of the file.
3. The bytes are compared with the size that the store tells, and with a digest where one is known; only then has the
   copy its name. Its time of change is that of the store's file.
4. Before a fetch, the copies that have not been opened for the longest time make room, and last the indexes of shards.
   One that is open can be read on.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from storage.atomic import PARTIAL, flush
from storage.disk import full_disk_note
from storage.lock import host_lock
from storage.process import is_there
from storage.stores import errors
from storage.stores.errors import DiskError, StoreError, WrongBytesError, patiently, within
from storage.stores.remote import Body, Digest, Status, digest_beside, opened
from storage.stores.urls import place_of, plain

logger = logging.getLogger(__name__)

MB = 10**6
GB = 10**9
_LOCKS = ".locks"
_NOTE = ".fetched"
"""Ending of the hidden file beside a partial one: which version it is of, and how large it will be."""
UPLOAD = ".upload"
"""Ending of the hidden file .NAME.PID.upload that a process writes for a store; it may be written as another one."""
_OF_UPLOAD = re.compile(rf"\.(\d+){UPLOAD}(\.\d+{PARTIAL})?$")
_INDEX = ".index"
"""Ending of what is kept of a shard, and of use without it."""
_POLL_S = 0.2
_PROGRESS_S = 10.0
_STILL_S = 600.0
"""Seconds without any progress of another process's fetch after which it is not waited for."""
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


class _Copy(NamedTuple):
    """A file in the cache, whole or partial."""

    used_at: float
    path: Path
    n_bytes: int
    is_whole: bool


class Cache:
    """A folder with copies of stores' files.

    Args:
        folder: on a local disk; made if it is missing.
        max_bytes: of all copies together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder.absolute(), max_bytes
        self._without_digest: set[Path] = set()
        self._has_told = False

    def path_of(self, url: str) -> Path:
        """Return where the copy of a file is, or will be; errors as those of `place_of`."""
        return self.folder / place_of(url)

    def fetch(self, url: str) -> None:
        """Bring a file into the cache, unless it is there or another process brings it.

        Raises:
            FileNotFoundError: the store does not have it.
            WrongBytesError (a ValueError): the store gives other bytes than it should.
            StoreError: the store, another process or the local disk fails.
        """
        path = self.path_of(url)
        progress, since = -1, time.monotonic()
        while not path.exists():
            with _in_words(path), host_lock(self._lock_of(path), _POLL_S) as is_held:
                if is_held:
                    if not path.exists():
                        self._fetch(url, path)
                    return
            now = size_of(_partial(path))
            if now != progress:
                progress, since = now, time.monotonic()
            elif time.monotonic() - since > _STILL_S:
                raise StoreError(
                    f"{plain(url)} is being fetched by another process of this host, which has not come further for "
                    f"{_STILL_S:.0f} s: end that process"
                )

    def _fetch(self, url: str, path: Path) -> None:
        """Fetch a file whose lock is held."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = None if path.parent in self._without_digest else digest_beside(url)
        if beside is None:
            self._without_digest.add(path.parent)  # so that it is not asked for beside every file
        began = time.monotonic()
        status = patiently(url, lambda: self._attempt(url, path, beside))
        partial = _partial(path)
        n_bytes = partial.stat().st_size
        flush(partial)
        os.utime(partial, ns=(time.time_ns(), status.changed_ns))
        os.replace(partial, path)
        _note(path).unlink(missing_ok=True)
        if not self._has_told:
            self._has_told = True
            digest = beside or status.digest
            checked = [*(["its size"] if status.n_bytes is not None else []), *([digest.source] if digest else [])]
            logger.info(
                "fetched %s (%.1f MB in %.1f s) into %s, verified by %s; further files are fetched without a word",
                plain(url),
                n_bytes / MB,
                time.monotonic() - began,
                self.folder,
                " and ".join(checked) or "nothing: its store tells neither size nor digest",
            )

    def _attempt(self, url: str, path: Path, beside: Digest | None) -> Status:
        """Fetch a file into its partial file, from where that ends, and verify it."""
        partial = _partial(path)
        # with the last byte once more: a range must not be empty
        body = opened(url, max(0, size_of(partial) - 1), _version_in(_note(path)))
        try:
            if body.first == 0:
                partial.unlink(missing_ok=True)  # before the note names another version than that of its bytes
            self._make_room(url, path, body.status)
            with partial.open("r+b" if partial.exists() else "wb", buffering=0) as file:
                file.truncate(body.first)
                file.seek(body.first)
                self._copy(url, body, file)
        except WrongBytesError:
            _forget(path)
            raise
        except OSError as error:
            if error.filename == str(partial):
                raise DiskError(error) from None
            raise
        finally:
            body.close()
        for digest in filter(None, (body.status.digest, beside)):
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, digest.algorithm).hexdigest()
            if found != digest.hexadecimal:
                _forget(path)
                raise WrongBytesError(
                    f"{plain(url)} has other bytes than it should ({digest.source}: {digest.hexadecimal}; fetched: "
                    f"{found}): it is damaged, or has changed"
                )
        return body.status

    def _copy(self, url: str, body: Body, file: BinaryIO) -> None:
        """Write a body to a file."""
        total, done = body.status.n_bytes, body.first
        judged_at = told_at = time.monotonic()
        done_then = done
        while block := within(errors.PATIENCE.stall_s, body.read):
            if done == 0 and block.lstrip()[:16].lower().startswith(_PAGES):
                raise WrongBytesError(f"{plain(url)} is a page of HTML or XML and no tar file: check the URL")
            left = memoryview(block)
            try:
                while left:  # a nearly full disk takes a part
                    left = left[file.write(left) :]
            except OSError as error:
                raise DiskError(error) from None
            done += len(block)
            now = time.monotonic()
            if (elapsed := now - judged_at) >= errors.PATIENCE.stall_s:
                if done - done_then < errors.PATIENCE.min_speed * elapsed:
                    raise TimeoutError(f"only {done - done_then:,} bytes in {elapsed:.0f} s")
                judged_at, done_then = now, done
            if now - told_at >= _PROGRESS_S and not self._has_told:
                told_at = now
                of = "" if total is None else f" of {total / MB:,.0f}"
                logger.info("fetching %s: %s%s MB", plain(url), f"{done / MB:,.0f}", of)
        if total is not None and done != total:
            raise OSError(f"its body ended at byte {done:,} of {total:,}")
        if (n_bytes := os.fstat(file.fileno()).st_size) != done:
            raise DiskError(OSError(f"it has {n_bytes:,} bytes there, and {done:,} were written"))

    # -------------------------------------------------------------------------------------------- room

    def _make_room(self, url: str, path: Path, status: Status) -> None:
        """Delete the copies that have been unused for longest until a file has its place, and keep that for it."""
        needed = status.n_bytes or 0
        if needed > self.max_bytes:
            raise DiskError(
                StoreError(
                    f"{plain(url)} has {needed / GB:,.2f} GB, and the cache {self.folder} may have "
                    f"{self.max_bytes / GB:,.2f}: give more --cache-gb"
                )
            )
        note = json.dumps({"version": status.version, "n_bytes": needed})
        until = time.monotonic() + _STILL_S
        while time.monotonic() < until:
            with host_lock(self.folder / _LOCKS / "room", _POLL_S) as is_held:
                if is_held and self._clear(needed, path):
                    try:
                        _note(path).write_text(note)
                    except OSError as error:
                        raise DiskError(error) from None
                    return
            time.sleep(_POLL_S)
        raise DiskError(
            StoreError(
                f"the cache {self.folder} ({self.max_bytes / GB:,.2f} GB) is full of files that are being fetched: "
                "give more --cache-gb"
            )
        )

    def _clear(self, needed: int, path: Path) -> bool:
        """Delete copies for a file of `needed` bytes; returns whether there is room for it now."""
        copies = [copy for copy in self._copies() if copy.path != path]
        copies.sort(key=lambda copy: (copy.path.suffix == _INDEX, copy.used_at))  # indexes last
        used = sum(copy.n_bytes for copy in copies)
        for copy in copies:
            if used + needed <= self.max_bytes:
                break
            if self._delete(copy):
                used -= copy.n_bytes
        return used + needed <= self.max_bytes

    def _delete(self, copy: _Copy) -> bool:
        """Delete a copy, unless a process is writing it; returns whether it is gone."""
        if not copy.is_whole:
            with host_lock(self._lock_of(copy.path), 0) as is_left_over:
                if is_left_over:
                    _forget(copy.path)
            return is_left_over
        upload = _OF_UPLOAD.search(copy.path.name)
        if upload is not None and is_there(int(upload[1])):
            return False
        copy.path.unlink(missing_ok=True)
        return True

    def _copies(self) -> Iterator[_Copy]:
        """Yield the copies, and files on their way to stores; a partial one counts with the size that it will have."""
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(folder) / name for name in names):
                with suppress(OSError, ValueError, KeyError):  # deleted, or renamed, just now
                    if not path.name.startswith(".") or _OF_UPLOAD.search(path.name):
                        status = path.stat()
                        yield _Copy(status.st_atime, path, status.st_size, True)
                    elif path.name.endswith(_NOTE):
                        whole = path.with_name(path.name[1 : -len(_NOTE)])
                        n_bytes = max(int(json.loads(path.read_text())["n_bytes"]), size_of(_partial(whole)))
                        yield _Copy(path.stat().st_mtime, whole, n_bytes, False)

    def _lock_of(self, path: Path) -> Path:
        name = hashlib.blake2b(os.fsencode(path.relative_to(self.folder)), digest_size=12).hexdigest()
        return self.folder / _LOCKS / name


def touch(path: Path) -> None:
    """Note that a copy is used now; its time of change stays."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Make an error of the local disk one of the store: no shard is to blame for it."""
    try:
        yield
    except (StoreError, FileNotFoundError):
        raise
    except OSError as error:
        raise StoreError(
            f"cannot keep {path}: {error.strerror or error}{full_disk_note(error, path)}; --cache gives another "
            "folder, --cache-gb less of it"
        ) from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}")


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}{_NOTE}")


def size_of(path: Path) -> int:
    """Return the size of a file, 0 if it is missing."""
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _version_in(note: Path) -> str | None:
    """Return the version that a partial file is of; None if it is not known."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        version = json.loads(note.read_text())["version"]
        return version if isinstance(version, str) else None
    return None


def _forget(path: Path) -> None:
    _partial(path).unlink(missing_ok=True)
    _note(path).unlink(missing_ok=True)
