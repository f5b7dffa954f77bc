"""Reads the members of tar files, so that none is lost silently and nothing is extracted.

`tarfile` stops without a word at a damaged header, and takes a file cut off between two members for a whole one. Here
all headers are read first, and any damage after the last good one is reported.
"""

import tarfile
from pathlib import Path
from typing import BinaryIO

LARGEST_PICTURE_BYTES = 512 << 20
"""Larger members are not read as pictures: they would fill the memory."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class DamagedTarError(ValueError):
    """A file without a readable member: empty, or no tar file. The message does not say what to do."""


def whole_members(path: Path) -> tuple[list[tarfile.TarInfo], str | None]:
    """Return the complete members of a tar file, and the damage after them, or None.

    Raises:
        DamagedTarError (a ValueError): empty, or no tar file.
        ValueError: compressed.
    """
    n_bytes = path.stat().st_size
    if n_bytes == 0:
        raise DamagedTarError(f"{path} is empty (0 bytes): expected a tar file")
    with path.open("rb") as file:
        start = file.read(8)
        for magic, compression in _COMPRESSED.items():
            if start.startswith(magic):
                raise ValueError(
                    f"{path} is compressed ({compression}): samples are read at random places, "
                    + ("so gunzip it first" if compression == "gzip" else "so decompress it first")
                )
        file.seek(0)
        members: list[tarfile.TarInfo] = []
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (file is closed by the with above)
        except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
            raise DamagedTarError(
                f"{path} is not a tar file ({error}): expected a shard of KEY.jpg and KEY.txt members"
            ) from error
        end = -1
        try:
            while (member := tar.next()) is not None:
                # A size below 0 sends tarfile backwards, for ever.
                if member.size < 0 or member.offset_data <= end:
                    return members, f"has a damaged header at byte {member.offset:,}"
                end = member.offset_data
                if member.isreg() and member.offset_data + member.size > n_bytes:
                    return members, "ends in the middle of a sample (truncated)"
                members.append(member)
        except (tarfile.TarError, ValueError, OverflowError, MemoryError):
            return members, _damage_after(file, tar.offset) or f"has a damaged header at byte {tar.offset:,}"
        return members, _damage_after(file, tar.offset)


def place_is_safe(member: tarfile.TarInfo) -> bool:
    """Return whether a member is a plain file, not sparse, whose name does not lead out of a folder."""
    parts = member.name.split("/")
    return member.isreg() and not member.issparse() and ".." not in parts and not member.name.startswith("/")


def _damage_after(file: BinaryIO, offset: int) -> str | None:
    """Return the damage where `tarfile` stopped reading, which it does silently at a damaged header."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "ends in the middle of a sample (truncated)"
    if any(block):
        return f"has a damaged header at byte {offset:,}"
    if any(file.read(1 << 20)):
        return f"continues after its end mark at byte {offset:,} (two tar files joined?)"
    return None
