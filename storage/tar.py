"""Tar files: every member found or its loss noticed, nothing extracted, one writer.

`tarfile` stops without a word at a damaged header, and takes a file cut off between two members for a whole one. Here
all headers are read first, and the damage after the last good one is found.
"""

import errno
import os
import shutil
import tarfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from storage.atomic import replace_file
from storage.stores.files import open_file, open_start

MAX_PICTURE_BYTES = 512 << 20
"""Larger members are not read as pictures: one would fill the memory."""

COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""Usual endings of compressed tar files."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MAX_NAME_BYTES = 1 << 20
"""Longest header of a name and the like; `tarfile` reads those that are declared longer, or below 0, into memory."""
_OF_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *(b"x", b"g", b"X"))
"""Types of headers that hold a name, or pax's records, for the next one."""


class DamagedTarError(ValueError):
    """A file of which no member can be read: empty, or no tar file. The message names it and gives no advice."""


class _Header(tarfile.TarInfo):
    """A header whose numbers are possible."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read 512 bytes.

        Raises:
            HeaderError: it is no header, or its size is impossible.
        """
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _OF_NAMES and info.size > MAX_NAME_BYTES):
            raise tarfile.HeaderError("impossible size")
        return info


class Member(NamedTuple):
    """One member of a tar file."""

    name: str
    """Path in the tar, as stored."""
    offset: int
    """Byte of the file at which its content begins."""
    size: int
    """Bytes of its content."""
    is_folder: bool
    is_safe: bool
    """Whether it is a plain file, stored as it is, whose name does not lead out of a folder."""


def whole_members(path: Path) -> tuple[list[Member], str | None]:
    """Return the members of a tar file that are there in full, and the damage after them, None if it is whole.

    Raises:
        DamagedTarError (a ValueError): empty, or no tar file.
        ValueError: compressed.
    """
    with open_file(path, -1) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes == 0:
            raise DamagedTarError(f"{path} is empty (0 bytes): expected a tar file")
        _refuse_if_compressed(path, file.read(8))
        file.seek(0)
        tar = _opened(path, file)
        members: list[Member] = []
        end = -1
        try:
            while (info := tar.next()) is not None:
                # A size below 0 sends tarfile backwards, for ever.
                if info.size < 0 or info.offset_data <= end:
                    return members, f"has a damaged header at byte {info.offset:,}"
                end = info.offset_data
                if info.isreg() and info.offset_data + info.size > n_bytes:
                    return members, "ends in the middle of a sample (truncated)"
                members.append(_member(info))
        except Exception as error:  # tarfile raises anything for headers that hold anything
            _raise_if_of_system(error)
            return members, _damage_after(file, tar.offset, n_bytes) or f"has a damaged header at byte {tar.offset:,}"
        return members, _damage_after(file, tar.offset, n_bytes)


def refuse_compressed(path: Path) -> None:
    """Check that a file is not compressed, whatever it is called.

    Raises:
        ValueError: it is; says what to do.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        _refuse_if_compressed(path, file.read(8))


def first_member(path: Path) -> Member | None:
    """Return the first member of a tar file, reading nothing else; None if it has no members.

    Raises:
        DamagedTarError (a ValueError): no tar file.
    """
    with open_start(path) as file:
        info = _opened(path, file).next()
    return None if info is None else _member(info)


def copy_members(path: Path, names: Collection[str], folder: Path) -> None:
    """Copy plain files of a tar file, compressed or not, into a folder, by the last parts of their names.

    Args:
        path: the tar file; it is read once, from its start to its end.
        names: last parts of names; all others are passed over.
        folder: is there, and has none of them.

    Raises:
        FileNotFoundError: one is missing in it.
        ValueError: it is no tar file, damaged, or has a name twice.
        OSError: it cannot be read, or a file cannot be written.
    """
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as tar:
            for info in tar:
                name = info.name.rpartition("/")[2]
                content = tar.extractfile(info) if name in names and info.isreg() else None
                if content is not None:
                    with (folder / name).open("xb") as file:
                        shutil.copyfileobj(content, file, 1 << 20)
    except FileExistsError as error:
        raise ValueError(f"{path} has {Path(error.filename).name} twice: expected it once") from error
    except Exception as error:  # tarfile raises anything for headers that hold anything
        _raise_if_of_system(error)
        raise ValueError(f"{path} is no whole tar file ({error}): download it again") from error
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise FileNotFoundError(f"{path} holds no {', '.join(missing)}: it is another tar file, or cut off")


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) pairs as a tar file, whole or not at all: the same pairs give the same bytes.

    Args:
        path: the file; its folder is there.
        members: in order; a name is KEY.FIELD, as in WebDataset's format.

    Raises:
        OSError: it cannot be written.
    """
    from webdataset import TarWriter  # seconds of import that only writing needs

    def write(partial: Path) -> None:
        # opened here: its own way of opening would run a name such as "pipe:…" in a shell
        with partial.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
            for name, content in members:
                key, _, field = name.rpartition(".")
                tar.write({"__key__": key, field: content})

    replace_file(path, write)


def _opened(path: Path, file: BinaryIO) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", tarinfo=_Header)
    except Exception as error:  # see above
        _raise_if_of_system(error)
        raise DamagedTarError(
            f"{path} is not a tar file ({error}): expected a shard of KEY.jpg and KEY.txt members"
        ) from error


def _raise_if_of_system(error: Exception) -> None:
    """Raise an error again that is of the disk, not of what the file says: EINVAL is for a place before its start."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error


def _refuse_if_compressed(path: Path, start: bytes) -> None:
    for magic, compression in _COMPRESSED.items():
        if start.startswith(magic):
            verb = "gunzip" if compression == "gzip" else "decompress"
            raise ValueError(
                f"{path} is compressed ({compression}): samples are read at random places, so {verb} it first"
            )


def _member(info: tarfile.TarInfo) -> Member:
    is_inside = ".." not in info.name.split("/") and not info.name.startswith("/")
    return Member(
        name=info.name,
        offset=info.offset_data,
        size=info.size,
        is_folder=info.isdir(),
        is_safe=info.isreg() and not info.issparse() and is_inside,
    )


def _damage_after(file: BinaryIO, offset: int, n_bytes: int) -> str | None:
    """Return the damage where `tarfile` stopped reading, which it does silently at a damaged header."""
    file.seek(min(max(offset, 0), n_bytes))
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "ends in the middle of a sample (truncated)"
    if any(block):
        return f"has a damaged header at byte {offset:,}"
    if any(file.read(1 << 20)):
        return f"continues after its end mark at byte {offset:,} (two tar files joined?)"
    return None
