"""Pictures: Pillow's formats and modes made on the fly, whole and damaged, with metadata, at extreme sizes."""

import functools
import struct
import zlib
from pathlib import Path

import numpy as np
from doors import Door, fuzz, require_kept
from hypothesis import given
from hypothesis import strategies as st
from odd import ODD_TEXTS, damaged
from odd_pictures import HEIGHT, LAB_PROFILE, PROFILE, WIDTH, corpus, drawn, exif, saved
from PIL import Image

from dvae.images import MIN_SIDE, dvae_augmentation, open_image, resize_and_crop, to_tensor

REFUSED = ("TGA", "ICO", "PCX", "SGI", "IM", "DDS", "MSP", "XBM", "PDF", "EPS", "ICNS", "SPIDER", "DIB", "BLP", "PALM")
"""Formats that Pillow writes and the product does not read."""


@functools.cache
def strangers() -> list[tuple[str, bytes]]:
    """Sound pictures of formats that are not read."""
    found = [(kind, saved(drawn(mode), kind)) for kind in REFUSED for mode in ("RGB", "L", "1")]
    return [(kind, data) for kind, data in found if data is not None]


def read(source: bytes | Path, name: str) -> Image.Image:
    """Open a picture and use it, as training does."""
    image = open_image(source, name)
    assert image.mode == "RGB"
    assert min(image.size) >= MIN_SIDE
    view = resize_and_crop(image, 16)
    assert dvae_augmentation(image, 16, np.random.default_rng(0)).size == view.size == (16, 16)
    assert to_tensor(view).shape == (3, 16, 16)
    return image


@fuzz(150)
@given(number=st.integers(0, 10_000))
def test_sound_pictures_of_all_modes(number: int, door: Door) -> None:
    name, data = corpus()[number % len(corpus())]

    def check() -> int:
        image = read(data, name)
        require_kept(sorted(image.size) == sorted((WIDTH, HEIGHT)), image.size)
        return 0

    door.knock(check)
    require_kept(door.counts["words"] == 0, f"{name}: refused")


@fuzz(2400)
@given(
    data=st.integers(0, 10_000).flatmap(lambda number: damaged(corpus()[number % len(corpus())][1], 5)),
    as_file=st.booleans(),
)
def test_damaged_pictures(data: bytes, as_file: bool, tmp_path: Path, door: Door) -> None:
    source: bytes | Path = data
    if as_file:
        source = tmp_path / "x.jpg"
        source.write_bytes(data)
    name = str(source) if isinstance(source, Path) else "x.jpg"
    door.knock(lambda: bool(read(source, name)) - 1, names=name)


@fuzz(100)
@given(data=st.integers(0, 10_000).flatmap(lambda number: damaged(strangers()[number % len(strangers())][1], 1)))
def test_other_formats(data: bytes, door: Door) -> None:
    door.knock(lambda: bool(read(data, "x.png")) - 1, names="x.png")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


SIDES = st.one_of(
    st.integers(8, 40),
    st.integers(8, 40),
    st.integers(8, 40),
    st.integers(0, 8),
    st.sampled_from((1, 7, 8, 100_000, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)),
)


@st.composite
def pngs(draw: st.DrawFn) -> bytes:
    """PNGs with right checksums: any size, depth and colour, chunks in any order with any content."""
    width, height = draw(SIDES), draw(SIDES)
    depth, colour = draw(st.sampled_from((8, 8, 16, 1, 2, 4, 3))), draw(st.sampled_from((0, 2, 3, 4, 6, 1)))
    chunks = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, draw(st.sampled_from((0, 0, 1, 2)))))
    ]
    n_bytes = min(height * (width * depth * 4 // 8 + 1), 1 << 22)
    pixels = zlib.compress(
        draw(st.sampled_from((b"\0", b"\xff"))) * draw(st.sampled_from((n_bytes, n_bytes, n_bytes // 2, 0))), 1
    )
    contents = {
        b"PLTE": st.binary(max_size=12).map(lambda data: data * 64),
        b"tRNS": st.binary(max_size=8),
        b"iCCP": st.sampled_from((PROFILE, LAB_PROFILE, b"", b"\0" * (6 << 20))).map(
            lambda p: b"p\0\0" + zlib.compress(p, 1)
        ),
        b"zTXt": st.sampled_from((b"x", bytes(70 << 20))).map(lambda text: b"key\0\0" + zlib.compress(text, 1)),
        b"tEXt": st.sampled_from(ODD_TEXTS).map(lambda text: b"key\0" + text.encode("utf-8", "replace") * 9),
        b"iTXt": st.binary(max_size=30),
        b"eXIf": st.one_of(st.just(exif(3)), st.binary(max_size=40), damaged(exif(8))),
        b"gAMA": st.binary(max_size=5),
        b"cHRM": st.binary(max_size=33),
        b"acTL": st.binary(min_size=8, max_size=8),
        b"fcTL": st.binary(min_size=26, max_size=26),
        b"bKGD": st.binary(max_size=6),
        b"sRGB": st.binary(max_size=2),
        b"pHYs": st.binary(max_size=9),
    }
    for name in draw(st.lists(st.sampled_from(sorted(contents)), max_size=3)):
        chunks.append(chunk(name, draw(contents[name])))
    chunks.append(chunk(b"IDAT", pixels))
    if draw(st.integers(0, 5)) == 0:
        chunks = [chunks[0], *draw(st.permutations(chunks[1:]))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


@fuzz(600)
@given(data=pngs())
def test_chunks_of_png(data: bytes, door: Door) -> None:
    door.knock(lambda: bool(read(data, "x.png")) - 1, names="x.png")


@fuzz(600)
@given(
    block=st.one_of(damaged(exif(5), 6), damaged(PROFILE, 4)),
    kind=st.sampled_from(("JPEG", "PNG", "WEBP", "TIFF", "AVIF")),
)
def test_metadata_of_pictures(block: bytes, kind: str, door: Door) -> None:
    """EXIF and profiles never cost the picture."""
    is_profile = b"acsp" in block[:64]
    data = saved(drawn("RGB"), kind, **{"icc_profile" if is_profile else "exif": block})
    if data is None:
        return

    def check() -> int:
        require_kept(sorted(read(data, "x").size) == sorted((WIDTH, HEIGHT)), "size")
        return 0

    door.knock(check, names="x")


@fuzz(50)
@given(
    size=st.sampled_from(((8, 60_000), (60_000, 8), (4000, 3000), (7, 100), (1, 1), (30_000, 9))),
    kind=st.sampled_from(("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")),
    mode=st.sampled_from(("1", "L", "RGB", "RGBA", "I;16")),
)
def test_extreme_sizes(size: tuple[int, int], kind: str, mode: str, door: Door) -> None:
    data = saved(Image.new(mode, size), kind)
    if data is not None:
        door.knock(lambda: bool(read(data, "x")) - 1, names="x")
