"""Pictures of which nothing can be made, of many kinds, and unusual ones that are fine: for tests of dirty data."""

import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

Maker = Callable[[np.random.Generator], bytes]


def noise(rng: np.random.Generator, mode: str = "RGB") -> Image.Image:
    """A picture of 40 to 90 pixels a side in which nothing can be compressed away."""
    height, width = rng.integers(40, 90, 2)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cut(data: bytes, rng: np.random.Generator, low: float = 0.3, high: float = 0.7) -> bytes:
    """The beginning of a file."""
    return data[: int(len(data) * rng.uniform(low, high))]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header says this size, and which holds hardly any pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def _png_bad_checksum(rng: np.random.Generator) -> bytes:
    data = bytearray(encoded(noise(rng), "PNG"))
    data[29] ^= 1 << int(rng.integers(8))  # the checksum of the header chunk
    return bytes(data)


def _jpeg_wrong_magic(rng: np.random.Generator) -> bytes:
    return rng.bytes(2).replace(b"\xff", b"\0") + encoded(noise(rng), "JPEG")[2:]


def _gif_bad_frame(rng: np.random.Generator) -> bytes:
    frames = [noise(rng, "L").resize((48, 48)) for _ in range(2)]
    return cut(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), rng, 0.2, 0.35)


def _svg(rng: np.random.Generator) -> bytes:
    side = int(rng.integers(10, 99))
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}"><rect/></svg>'.encode()


CORRUPT: dict[str, Maker] = {
    "JPEG cut in its pixels": lambda rng: cut(encoded(noise(rng), "JPEG"), rng, 0.4, 0.8),
    "JPEG cut in its header": lambda rng: encoded(noise(rng), "JPEG")[: int(rng.integers(4, 160))],
    "JPEG without its magic": _jpeg_wrong_magic,
    "zero bytes": lambda rng: bytes(int(rng.integers(1, 5000))),
    "random bytes": lambda rng: b"\0" + rng.bytes(int(rng.integers(100, 5000))),
    "text": lambda rng: b"this is not the picture that you are looking for\n" * int(rng.integers(1, 50)),
    "HTML error page": lambda rng: b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>" + rng.bytes(1),
    "PNG with a wrong checksum": _png_bad_checksum,
    "PNG cut in its pixels": lambda rng: cut(encoded(noise(rng), "PNG"), rng),
    "PNG of a huge size": lambda rng: png_of_size(int(rng.integers(100_000, 2**31 - 1)), 100_000),
    "PNG of no size": lambda rng: png_of_size(0, int(rng.integers(0, 2))),
    "one pixel": lambda rng: encoded(Image.new("RGB", (1, 1)), "GIF"),
    "GIF with a bad frame": _gif_bad_frame,
    "SVG": _svg,
    "TIFF cut": lambda rng: cut(encoded(noise(rng), "TIFF"), rng),
    "WebP cut": lambda rng: cut(encoded(noise(rng), "WEBP"), rng),
    "BMP cut": lambda rng: cut(encoded(noise(rng), "BMP"), rng),
    "PDF": lambda rng: b"%PDF-1.7\n" + rng.bytes(300),
}
"""What makes a picture of each kind. None is empty: an empty member is no picture at all."""


def corrupt_pictures(seed: int) -> Iterator[tuple[str, bytes]]:
    """Kinds and bytes, for ever: all kinds in turn, no two pictures alike but for single pixels and empty sizes."""
    rng = np.random.default_rng(seed)
    for kind, make in itertools.cycle(CORRUPT.items()):
        yield kind, make(rng)


def _deep(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 1 << 16, (40, 50), dtype=np.uint16))


UNUSUAL: dict[str, Maker] = {
    "CMYK": lambda rng: encoded(noise(rng, "CMYK"), "JPEG"),
    "16 bits": lambda rng: encoded(_deep(rng), "PNG"),
    "grey": lambda rng: encoded(noise(rng, "L"), "JPEG"),
    "transparent": lambda rng: encoded(noise(rng, "RGBA"), "PNG"),
    "palette": lambda rng: encoded(noise(rng).convert("P"), "GIF"),
    "progressive": lambda rng: encoded(noise(rng), "JPEG", progressive=True),
    "WebP": lambda rng: encoded(noise(rng), "WEBP"),
    "TIFF": lambda rng: encoded(noise(rng), "TIFF"),
    "BMP": lambda rng: encoded(noise(rng), "BMP"),
}
"""Pictures that are fine."""
