"""Reads what Pillow does not read of PNG files: those with large texts and profiles, and transparent colours.

Source: Portable Network Graphics (PNG) Specification, third edition, 11.3.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from dvae.colour import MAX_PROFILE_BYTES
from storage.tar import MAX_PICTURE_BYTES

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = (b"XML:com.adobe.xmp\0\0", b"Raw profile type exif\0")
"""Beginnings of uncompressed texts that may tell which way a picture is up."""


class LeanPNG(NamedTuple):
    """A PNG without what Pillow refuses whole pictures for."""

    data: bytes
    """The file: all of it but texts and the colour profile."""
    profile: bytes | None
    """The colour profile, or its beginning if it is larger than MAX_PROFILE_BYTES; None if there is none."""


def lean_png(source: Path | bytes) -> LeanPNG | None:
    """Return a PNG without its texts and profile, whose size Pillow bounds; None if it has none, or is no PNG.

    Only the profile is decompressed, and of it no more than is used, so that the bound on memory holds.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            if file.read(len(_SIGNATURE)) != _SIGNATURE or source.stat().st_size > MAX_PICTURE_BYTES:
                return None
        source = source.read_bytes()
    if not source.startswith(_SIGNATURE):
        return None
    lean, profile = bytearray(_SIGNATURE), None
    for kind, chunk in _chunks(source):
        content = chunk[8:-4]
        if kind == b"iCCP":
            profile = _inflated(content.partition(b"\0")[2][1:])
        elif kind not in _TEXTS or (kind != b"zTXt" and content.startswith(_ORIENTATION)):
            lean += chunk
    return LeanPNG(bytes(lean), profile) if len(lean) < len(source) else None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and bytes of each chunk, the last one perhaps cut short."""
    start = len(_SIGNATURE)
    while start < len(data):
        length = int.from_bytes(data[start : start + 4])
        end = start + length + 12  # length, kind and checksum have 4 bytes each
        yield data[start + 4 : start + 8], data[start:end]
        start = end


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return b""


def scale_transparent_colour(image: Image.Image) -> None:
    """Scale the transparent colour of a picture that is not loaded yet to the 8 bits that its samples will have.

    Pillow scales only the samples of PNGs with greys of 2 or 4 bits, and colours of 16.
    """
    colour = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or colour is None or not image.tile:
        return
    match image.tile[0][3]:
        case "L;2":
            image.info["transparency"] = (colour & 3) * 85
        case "L;4":
            image.info["transparency"] = (colour & 15) * 17
        case "RGB;16B":
            image.info["transparency"] = tuple(sample >> 8 for sample in colour)
