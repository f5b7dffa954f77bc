"""Files that may be in a store, as paths: that of a store's file is where its copy is, or will be, in the cache.

`remote_files` gives such paths; whoever reads a file opens it by `open_file`, which fetches a copy that is missing. So
everything else, from names of shards to manifests, knows paths alone. Which path is whose is known to this process and
to those that it forks.
"""

import io
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, NamedTuple

from storage.disk import nearest_folder
from storage.stores.cache import GB, UPLOAD, Cache, size_of, touch
from storage.stores.errors import StoreError
from storage.stores.remote import Status, delete, names, put, start_of, status
from storage.stores.urls import is_remote, plain, url_of

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "DALLE_CACHE"
"""Environment variable with the folder for caches; by default the user's own, ~/.cache/dalle."""
_START_BYTES = 1 << 16
_AHEAD = 4  # files that are fetched at once
_REMEMBERED_S = 300.0  # for which a file that is missing or wrong is not fetched again
_STORE_REMEMBERED_S = 10.0  # the same for one whose store failed: so long that who waited for it hears of it


class FileStatus(NamedTuple):
    """Size and time of the last change of a file, local or not."""

    n_bytes: int
    changed_ns: int


class _Remote(NamedTuple):
    """A file of a store."""

    url: str
    cache: Cache
    told: Status | None
    """What the store told when it was listed."""


_remotes: dict[Path, _Remote] = {}
_failures: dict[Path, tuple[float, Exception]] = {}
_caches: dict[tuple[Path, float | None], Cache] = {}
_chosen: tuple[Path | None, float | None] | None = None
_ahead: dict[Path, threading.Thread] = {}
_is_gone = False  # a store did not answer: copies are used as they are


def use_cache(folder: Path | None = None, gigabytes: float | None = None) -> None:
    """Choose where copies of stores' files are kept from now on.

    Args:
        folder: on a local disk; None: as `CACHE_VARIABLE` says.
        gigabytes: size of all copies together, in 10⁹ bytes; None: half of what the disk has free for them.

    Raises:
        ValueError: the size is not above 0.
    """
    global _chosen
    if gigabytes is not None and not 0 < gigabytes < 1e9:
        raise ValueError(f"--cache-gb is {gigabytes:g}; expected a size above 0, such as 200")
    if folder is None and (own := cache_folder()) is not None:
        folder = own / "shards"
    _chosen = None if folder is None else folder.resolve(), gigabytes


def cache_folder() -> Path | None:
    """Return the folder for caches: as `CACHE_VARIABLE` says, or the user's own; None if the user has no home."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle"
    except RuntimeError:
        return None


def _cache() -> Cache:
    """Return the cache that was chosen; raises ValueError if there is no folder for it."""
    if _chosen is None:
        use_cache()
    assert _chosen is not None
    folder, gigabytes = _chosen
    if folder is None:
        raise ValueError(f"no folder for copies of stores' files, and no home: give --cache, or {CACHE_VARIABLE}")
    if (folder, gigabytes) not in _caches:
        n_bytes = gigabytes * GB if gigabytes is not None else _half_of_what_is_free(folder)
        _caches[folder, gigabytes] = Cache(folder, int(n_bytes))
    return _caches[folder, gigabytes]


def _half_of_what_is_free(folder: Path) -> float:
    """Return half of the bytes that a disk would have free without the copies in a folder."""
    n_kept = sum(map(size_of, folder.rglob("*.tar"))) if folder.exists() else 0
    return (shutil.disk_usage(nearest_folder(folder)).free + n_kept) / 2


def remote_file(url: str, told: Status | None = None) -> Path:
    """Return the path of a store's file; the store is not asked.

    Raises:
        ValueError: the URL names no file, or was given before with another user or signature.
    """
    cache = _cache()
    path = cache.path_of(url)
    known = _remotes.get(path)
    if known is not None and known.url != url:
        raise ValueError(f"{plain(url)} is given twice, in different ways: give it once")
    if told is not None:
        _drop_older_copy(path, told)
    _remotes[path] = _Remote(url, cache, told or (known.told if known else None))
    return path


def _drop_older_copy(path: Path, told: Status) -> None:
    """Delete a copy that is of another version of the file than its store has now."""
    with suppress(FileNotFoundError):
        copy = path.stat()
        is_as_large = told.n_bytes in (None, copy.st_size)
        if not is_as_large or (told.changed_ns and told.changed_ns != copy.st_mtime_ns):
            logger.info("%s is of before a change in its store: it is fetched again", path)
            path.unlink()


def is_remote_file(path: Path) -> bool:
    """Return whether a path is one that `remote_file` gave, of a store's file."""
    return path in _remotes


def remote_files(pattern: str) -> list[Path]:
    """Return the paths of the files below a store's folder, or of a pattern with wildcards, sorted.

    Raises:
        StoreError: the store cannot be asked.
    """
    return [remote_file(url, told) for url, told in names(url_of(pattern))]


def lasting_name(path: Path) -> str:
    """Return the name of a file that holds on every host: a store's URL without what may be secret, or the path."""
    return plain(_remotes[path].url) if path in _remotes else str(path)


def open_file(path: Path, buffering: int = 0) -> BinaryIO:
    """Open a file for reading, as `Path.open` does; a store's is fetched first if there is no copy.

    Raises:
        FileNotFoundError: there is none.
        WrongBytesError (a ValueError): the store gives other bytes than it should.
        StoreError (an OSError): the store is gone, too slow or forbids it; the next file will fail too.
        OSError: it cannot be opened.
    """
    while True:
        try:
            file: BinaryIO = path.open("rb", buffering=buffering)
        except (FileNotFoundError, NotADirectoryError):
            if path not in _remotes:
                raise
            fetch(path)  # and once more if it was deleted before it could be opened
        else:
            if path in _remotes:
                touch(path)
            return file


def file_status(path: Path) -> FileStatus:
    """Return size and time of change of a file; of a store's, what its store tells, once in this process.

    A copy of another version is deleted. While the store is gone, copies are used as they are.

    Raises:
        FileNotFoundError: there is none.
        StoreError: the store cannot be asked.
    """
    global _is_gone
    remote = _remotes.get(path)
    if remote is None:
        local = path.stat()
        return FileStatus(local.st_size, local.st_mtime_ns)
    told = remote.told
    if (told is None or told.n_bytes is None) and not (_is_gone and path.exists()):
        try:
            told = status(remote.url)
            _drop_older_copy(path, told)
            _remotes[path] = remote._replace(told=told)
        except StoreError as error:
            if not path.exists():
                raise
            _is_gone = True
            logger.warning("%s; copies of shards are used as they are", error)
    if told is not None and told.n_bytes is not None:
        return FileStatus(told.n_bytes, told.changed_ns)
    with open_file(path) as file:
        found = os.fstat(file.fileno())
        return FileStatus(found.st_size, found.st_mtime_ns)


def exists(path: Path) -> bool:
    """Return whether there is a file, local or in its store; errors as those of `file_status`."""
    try:
        file_status(path)
    except FileNotFoundError:
        return False
    return True


def fetch(path: Path) -> None:
    """Bring a store's file into the cache unless it is there; a file that failed a moment ago fails at once.

    Raises:
        Errors of `open_file`.
    """
    until, failure = _failures.get(path, (0.0, None))
    if failure is not None and time.monotonic() < until:
        raise failure.with_traceback(None)
    remote = _remotes[path]
    try:
        remote.cache.fetch(remote.url)
    except (OSError, ValueError) as error:
        seconds = _STORE_REMEMBERED_S if isinstance(error, StoreError) else _REMEMBERED_S
        _failures[path] = (time.monotonic() + seconds, error)
        raise


def open_start(path: Path) -> BinaryIO:
    """Open the beginning of a file, at least; of a store's file no copy is made. Errors as those of `open_file`."""
    if path not in _remotes or path.exists():
        return open_file(path)
    return io.BytesIO(start_of(_remotes[path].url, _START_BYTES))


def prefetch(paths: Iterable[Path]) -> None:
    """Begin to fetch the first few of some stores' files in the background; whoever opens one waits for it.

    Those of earlier calls that are still being fetched count among the few; errors are told when a file is opened.
    """
    for path in [path for path, thread in _ahead.items() if not thread.is_alive()]:
        del _ahead[path]
    for path in paths:
        if len(_ahead) >= _AHEAD:
            return
        if path in _remotes and path not in _ahead and not path.exists():
            _ahead[path] = threading.Thread(target=_fetch_quietly, args=(path,), daemon=True, name="fetch")
            _ahead[path].start()


def warn_if_more_than_cache(paths: Iterable[Path]) -> None:
    """Warn if the stores' files among some paths, as far as their sizes are known, are more than the cache may hold."""
    remotes = [_remotes[path] for path in paths if path in _remotes]
    n_bytes = sum(remote.told.n_bytes or 0 for remote in remotes if remote.told is not None)
    if remotes and n_bytes > remotes[0].cache.max_bytes:
        logger.warning(
            "the shards in stores have %.2f GB, and --cache-gb is %.2f: they are fetched again in every epoch, and "
            "again and again where samples come from all of them",
            n_bytes / GB,
            remotes[0].cache.max_bytes / GB,
        )


def _fetch_quietly(path: Path) -> None:
    with suppress(OSError, ValueError):
        fetch(path)


# ------------------------------------------------------------------------------------------------ writing


def below(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, be it on disk or, as a URL, in a store."""
    return remote_file(f"{url_of(folder).rstrip('/')}/{name}") if is_remote(folder) else folder / name


def make_folder(folder: Path) -> None:
    """Make a folder on the disk, if it is missing; a store has none."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def files_in(folder: Path, ending: str) -> list[Path]:
    """Return the files with an ending in a folder, be it on disk or, as a URL, in a store, sorted.

    Raises:
        StoreError: the store cannot be asked.
    """
    if not is_remote(folder):
        return sorted(folder.glob(f"*{ending}"))
    depth = len(_cache().path_of(f"{url_of(folder)}/x").parts)
    found = remote_files(f"{url_of(folder).rstrip('/')}/")
    return [path for path in found if path.name.endswith(ending) and len(path.parts) == depth]


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file on the disk; if its path is of a store's file, put it there.

    Raises:
        StoreError, ValueError: the store cannot be written to.
        OSError: the disk cannot.
    """
    remote = _remotes.get(path)
    if remote is None:
        write(path)
        return
    local = path.with_name(f".{path.name}.{os.getpid()}{UPLOAD}")
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(local)
        put(local, remote.url)
    finally:
        local.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    _remotes[path] = remote._replace(told=None)
    _failures.pop(path, None)


def delete_file(path: Path) -> None:
    """Delete a file; of a store's, its copy too. Errors as those of `write_file`."""
    if path in _remotes:
        with suppress(FileNotFoundError):
            delete(_remotes[path].url)
        _remotes[path] = _remotes[path]._replace(told=None)
    path.unlink(missing_ok=True)


def local_folder(folder: Path, patterns: Sequence[str], made: str = "") -> Path:
    """Return a folder; for one of a store, given as a URL, a folder on the disk with the same files.

    Args:
        folder: on the disk, or a store's.
        patterns: of the files' paths in it, such as "shards/*.index"; no others are fetched.
        made: pattern of files that stay on the disk though the store does not have them; others are deleted.

    Raises:
        StoreError: the store cannot be used.
    """
    if not is_remote(folder):
        return folder
    cache = _folders()
    local, there, here = _both(cache, folder, patterns)
    for path in here:
        if path not in there and not fnmatchcase(path.relative_to(local).as_posix(), made):
            path.unlink(missing_ok=True)
    for path, (url, told) in there.items():
        _drop_older_copy(path, told)
        cache.fetch(url)
    return local


def upload_folder(folder: Path, patterns: Sequence[str]) -> None:
    """Write what is new in `local_folder(folder, patterns)` to the store; does nothing for a folder on the disk.

    Files of these patterns that are not on the disk are deleted in the store.

    Raises:
        StoreError, ValueError: the store cannot be written to.
    """
    if not is_remote(folder):
        return
    local, there, here = _both(_folders(), folder, patterns)
    for path in here:
        found, told = path.stat(), there[path][1] if path in there else None
        if told is None or (told.n_bytes, told.changed_ns) != (found.st_size, found.st_mtime_ns):
            put(path, f"{url_of(folder).rstrip('/')}/{path.relative_to(local).as_posix()}")
    for path, (url, _) in there.items():
        if not path.exists():
            delete(url)


def _both(
    cache: Cache, folder: Path, patterns: Sequence[str]
) -> tuple[Path, dict[Path, tuple[str, Status]], list[Path]]:
    """Return where a store's folder is on the disk, its files of some patterns (URL, status), and those of the disk."""
    root = f"{url_of(folder).rstrip('/')}/"
    local = cache.path_of(f"{root}x").parent
    there = {cache.path_of(url): (url, told) for url, told in names(root)}
    here = [path for path in sorted(local.rglob("*")) if path.is_file() and not path.name.startswith(".")]

    def is_meant(path: Path) -> bool:
        return any(fnmatchcase(path.relative_to(local).as_posix(), pattern) for pattern in patterns)

    return local, {path: one for path, one in there.items() if is_meant(path)}, list(filter(is_meant, here))


def _folders() -> Cache:
    """Return the cache of whole folders, such as manifests: small, and not to be parted."""
    return Cache(_cache().folder / ".folders", 1 << 62)
