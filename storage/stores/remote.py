"""Files in object stores and on the web: their sizes and digests, their names, their bytes, and writing them.

fsspec and the libraries behind it are imported here alone, and when they are needed. Every call has a bounded time;
objects of fsspec are made anew for every use, so that they never outlive a fork.
"""

import base64
import binascii
import email.utils
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from storage.stores import errors
from storage.stores.errors import RefusedError, StoreError, patiently, within
from storage.stores.urls import EXTRAS, has_magic, plain, scheme_of, url_of

BLOCK = 8 << 20
"""Bytes of an object store's file that are asked for at once."""
_MAX_DIGEST_FILE = 4096
_CONNECT_S = 20.0


class Digest(NamedTuple):
    """The digest that a file's bytes must have."""

    algorithm: str
    """A name of hashlib's."""
    hexadecimal: str
    source: str
    """Where it is from, for people: "MD5 of its store"."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a store tells of a file."""

    n_bytes: int | None
    """Its size; None where the store does not tell."""
    changed_ns: int
    """Time of its last change, in ns, to the second; where the store does not tell, one that its version stands for, or
    0."""
    version: str | None = None
    """Changes when the file does; None where the store does not tell."""
    digest: Digest | None = None
    """Of its bytes, where the store tells one."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """The bytes of a file from some byte on."""

    status: Status
    first: int
    """The byte that it begins with: the one that was asked for, or 0 where the store knows no ranges."""
    read: Callable[[], bytes]
    """Returns the next bytes, b"" at the end."""
    close: Callable[[], object]


def filesystem(url: str) -> Any:
    """Return fsspec's file system for a URL, with bounded times and without attempts of its own where it can be told.

    Raises:
        ImportError: the library for this kind of store is not installed.
    """
    import fsspec

    kind, options = EXTRAS[scheme_of(url)], dict[str, Any]()
    if kind == "http":
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=errors.PATIENCE.stall_s)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": {"Accept-Encoding": "identity"}}
    elif kind == "s3":
        times = {"connect_timeout": _CONNECT_S, "read_timeout": errors.PATIENCE.stall_s, "retries": {"max_attempts": 1}}
        options = {"config_kwargs": times}
    return fsspec.filesystem(scheme_of(url), use_listings_cache=False, skip_instance_cache=True, **options)


def status(url: str) -> Status:
    """Return what a store tells of a file, without reading it.

    Raises:
        FileNotFoundError: it is not there.
        StoreError: the store cannot be asked.
    """
    return patiently(url, lambda: within(errors.PATIENCE.stall_s, lambda: _status_of(filesystem(url).info(url))))


def names(pattern: str) -> list[tuple[str, Status]]:
    """Return the files below a folder, or those that a pattern stands for, sorted by their URLs, without hidden ones.

    Raises:
        StoreError: the store cannot be asked, or lists nothing.
    """

    def attempt() -> list[tuple[str, Status]]:
        fs = filesystem(pattern)
        found = fs.glob(pattern, detail=True) if has_magic(pattern) else fs.find(pattern, detail=True)
        files = {fs.unstrip_protocol(name): info for name, info in found.items() if info.get("type") != "directory"}
        return [(url_of(name), _status_of(info)) for name, info in sorted(files.items()) if "/." not in name]

    try:
        return patiently(pattern, lambda: within(10 * errors.PATIENCE.stall_s, attempt), verb="listed")
    except FileNotFoundError:
        return []


def opened(url: str, first: int, version: str | None) -> Body:
    """Open a file for reading from a byte on; raises what the libraries raise.

    Args:
        url: of the file.
        first: byte to begin with; only the file's beginning is sure to be given.
        version: of the file that the bytes before `first` are of; of any other, all bytes are given.
    """
    opening = _of_web if EXTRAS[scheme_of(url)] == "http" else _of_store
    return within(errors.PATIENCE.stall_s, lambda: opening(url, first, version))


def _of_web(url: str, first: int, version: str | None) -> Body:
    headers = {"Accept-Encoding": "identity"}
    if first and version is not None:
        headers |= {"Range": f"bytes={first}-", "If-Range": version}
    file = filesystem(url).open(url, "rb", block_size=0, size=1, headers=headers)  # block_size 0: one plain GET
    response = file.r
    if response.status != 206:
        first = 0
    told = {name.lower(): value for name, value in response.headers.items()}
    length = told.get("content-length")
    is_whole = told.get("content-encoding", "identity") == "identity" and length is not None
    n_bytes = first + int(length or 0) if is_whole else None
    found = _status_of({**{name.title(): value for name, value in told.items()}, "size": n_bytes})
    return Body(status=found, first=first, read=lambda: file.read(BLOCK), close=file.close)


def _of_store(url: str, first: int, version: str | None) -> Body:
    fs = filesystem(url)
    found = _status_of(fs.info(url))
    if version is None or found.version != version:
        first = 0
    if found.digest is not None and found.digest.algorithm == "md5" and not _etag_is_md5(fs, url):
        found = Status(n_bytes=found.n_bytes, changed_ns=found.changed_ns, version=found.version)
    file = fs.open(url, "rb", block_size=BLOCK, cache_type="none")
    file.seek(first)
    return Body(status=found, first=first, read=lambda: file.read(BLOCK), close=file.close)


def _etag_is_md5(fs: Any, url: str) -> bool:
    """Return whether S3 did not encrypt a file with a key of its owner's, which makes its ETag something else."""
    if EXTRAS[scheme_of(url)] != "s3":
        return True
    bucket, _, key = url.partition("://")[2].partition("/")
    head = fs.call_s3("head_object", Bucket=bucket, Key=key)
    return "SSECustomerAlgorithm" not in head and not head.get("ServerSideEncryption", "").startswith("aws:kms")


def _status_of(info: dict[str, Any]) -> Status:
    """Return what a library's answer tells; every store has names of its own."""
    names = ("ETag", "Etag", "etag", "blob_id", "Last-Modified")
    version = next((str(info[name]) for name in names if info.get(name)), None)
    times = (info.get(name) for name in ("LastModified", "last_modified", "mtime", "updated", "Last-Modified"))
    size = info.get("size")
    return Status(
        n_bytes=None if size is None else int(size),
        changed_ns=next((ns for ns in map(_ns_of, times) if ns is not None), _ns_instead(version)),
        version=version,
        digest=_digest_of(info),
    )


def _ns_of(time: object) -> int | None:
    """Return a time in ns, to the second: listings and headers differ in what is below."""
    if isinstance(time, str):
        try:
            time = email.utils.parsedate_to_datetime(time) if "," in time else datetime.fromisoformat(time)
        except ValueError:
            return None
    return int(time.timestamp()) * 10**9 if isinstance(time, datetime) else None


def _ns_instead(version: str | None) -> int:
    """Return a time of the years 1970 to 2001 that another version has not, but for one in 10⁹; 0 for None."""
    if version is None:
        return 0
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest()) % 10**9 * 10**9


def _digest_of(info: dict[str, Any]) -> Digest | None:
    """Return the digest in a library's answer: SHA-256 of Hugging Face, MD5 of Google, Azure, S3 and some servers."""
    lfs = info.get("lfs") or {}
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    if sha256:
        return Digest("sha256", str(sha256).lower(), "SHA-256 of its store")
    settings = info.get("content_settings") or {}
    in_base64 = info.get("md5Hash") or info.get("Content-Md5")
    raw = settings.get("content_md5") if isinstance(settings, dict) else getattr(settings, "content_md5", None)
    if isinstance(in_base64, str):
        try:
            raw = base64.b64decode(in_base64, validate=True)
        except binascii.Error:
            raw = None
    if isinstance(raw, bytes | bytearray) and len(raw) == 16:
        return Digest("md5", raw.hex(), "MD5 of its store")
    # other servers make ETags of other things
    is_of_s3 = "StorageClass" in info or "X-Amz-Request-Id" in info
    etag = str(info.get("ETag") or info.get("Etag") or "").strip('"')
    is_encrypted = str(info.get("X-Amz-Server-Side-Encryption", "")).startswith("aws:kms")
    if is_of_s3 and not is_encrypted and re.fullmatch("[0-9a-fA-F]{32}", etag):
        return Digest("md5", etag.lower(), "MD5 of its store")
    return None


def digest_beside(url: str) -> Digest | None:
    """Return the SHA-256 in the file URL.sha256, as `sha256sum` writes it; None if there is none that can be read.

    Raises:
        StoreError: the store fails, so that it is not known.
    """
    base, mark, query = url.partition("?") if EXTRAS[scheme_of(url)] == "http" else (url, "", "")
    try:
        start = start_of(f"{base}.sha256{mark}{query}", _MAX_DIGEST_FILE)
    except (FileNotFoundError, RefusedError):  # some stores forbid what is missing
        return None
    match = re.match(rb"([0-9a-fA-F]{64})\b", start)
    return None if match is None else Digest("sha256", match.group(1).decode().lower(), "SHA-256 beside it")


def start_of(url: str, n_bytes: int) -> bytes:
    """Return the first bytes of a file, perhaps more of them than asked for; errors as those of `status`."""
    return patiently(
        url, lambda: within(errors.PATIENCE.stall_s, lambda: bytes(filesystem(url).cat_file(url, start=0, end=n_bytes)))
    )


def delete(url: str) -> None:
    """Delete a file of a store; errors as those of `status`."""
    patiently(url, lambda: within(errors.PATIENCE.stall_s, lambda: filesystem(url).rm_file(url)), verb="deleted")


def put(path: Path, url: str) -> None:
    """Write a file to a store, which shows it when it is whole.

    Raises:
        StoreError: the store cannot be written to.
        ValueError: it is a web server.
    """
    if EXTRAS[scheme_of(url)] == "http":
        raise ValueError(f"{plain(url)} cannot be written to: give a folder, or a URL such as s3://bucket/folder")

    def attempt() -> None:
        fs = filesystem(url)
        n_bytes = path.stat().st_size
        patience_s = errors.PATIENCE.stall_s + n_bytes / errors.PATIENCE.min_speed
        within(patience_s, lambda: fs.put_file(str(path), url))
        n_there = within(errors.PATIENCE.stall_s, lambda: fs.info(url))["size"]
        if n_there != n_bytes:
            raise OSError(f"it has {n_there:,} bytes there, and should have {n_bytes:,}")

    try:
        patiently(url, attempt, verb="written")
    except FileNotFoundError:
        raise StoreError(f"{plain(url)} cannot be written: there is no such bucket or folder") from None
