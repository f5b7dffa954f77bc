import io
import logging
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from dvae import colour
from dvae.images import open_image
from dvae.remarks import MAX_COUNTED, REMARKS, Remarks

ORANGE = (200, 80, 60)
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
"""Red, green and blue of sRGB as XYZ under the white D50, which profiles hold."""
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


@pytest.fixture(autouse=True)
def _no_remarks_of_other_tests(caplog: pytest.LogCaptureFixture) -> None:
    REMARKS.log_totals()
    caplog.clear()
    caplog.set_level(logging.INFO)


def profile(colours: tuple[tuple[float, ...], ...] = (), gamma: float = 2.2) -> bytes:
    """A profile of three primaries, or of grey without any, and a power curve (ICC.1:2001, 6)."""

    def numbers(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(80),
        b"cprt": b"text\0\0\0\0none",
        b"wtpt": b"XYZ \0\0\0\0" + numbers(0.9642, 1, 0.8249),
    }
    for letter, xyz in zip((b"r", b"g", b"b"), colours, strict=False):
        tags |= {letter + b"XYZ": b"XYZ \0\0\0\0" + numbers(*xyz), letter + b"TRC": curve}
    if not colours:
        tags[b"kTRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4xI4s4s4s12x4s",
        132 + len(table) - 4 + len(body),
        0x02200000,
        b"mntr",
        b"RGB " if colours else b"GRAY",
        b"XYZ ",
        b"acsp",
    )
    return (header.ljust(68, b"\0") + numbers(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str = "RGB", value: object = ORANGE) -> Image.Image:
    return Image.new(mode, (16, 16), value)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def colour_of(data: bytes, name: str = "cat") -> tuple[int, ...]:
    colours = np.asarray(open_image(data, name)).reshape(-1, 3)
    assert np.ptp(colours, axis=0).max() <= 2  # one colour, up to JPEG
    return tuple(colours[0].tolist())


def in_srgb(value: tuple[int, int, int], colours: tuple[tuple[float, ...], ...], gamma: float) -> np.ndarray:
    """What a viewer shows, computed from the definition."""
    xyz = np.array(colours).T @ (np.array(value) / 255) ** gamma
    linear = np.clip(np.linalg.solve(np.array(SRGB).T, xyz), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# colour profiles


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("colours", [DISPLAY_P3, SRGB[::-1]], ids=["wide", "red and blue swapped"])
def test_a_profile_is_converted_to_srgb(kind: str, colours: tuple[tuple[float, ...], ...]) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}, "AVIF": {"quality": 100}}.get(kind, {})
    read = colour_of(encoded(plain(), kind, icc_profile=profile(colours), **options))
    assert read == pytest.approx(in_srgb(ORANGE, colours, 2.2), abs=3)
    assert max(abs(a - b) for a, b in zip(read, ORANGE, strict=True)) > 10


def test_a_profile_of_srgb_changes_no_pixel() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for one in (None, srgb_profile()):
        assert np.array_equal(open_image(encoded(noise, icc_profile=one)), noise)


def test_what_was_converted_is_not_converted_again() -> None:
    opened = open_image(encoded(plain(), icc_profile=profile(DISPLAY_P3)))
    assert colour_of(encoded(opened)) == opened.getpixel((0, 0))


def test_a_picture_without_profile_never_meets_the_colour_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colour, "_transform", lambda *_: pytest.fail("asked for a transform"))
    assert colour_of(encoded(plain())) == ORANGE


@pytest.mark.parametrize(("mode", "value"), [("RGBA", (*ORANGE, 255)), ("P", 0)])
def test_alpha_and_palettes_have_profiles_too(mode: str, value: object) -> None:
    picture = plain(mode, value)
    if mode == "P":
        picture.putpalette(ORANGE)
    read = colour_of(encoded(picture, icc_profile=profile(DISPLAY_P3)))
    assert read == pytest.approx(in_srgb(ORANGE, DISPLAY_P3, 2.2), abs=2)


def test_a_transparent_picture_is_converted_before_it_lies_on_white() -> None:
    read = colour_of(encoded(plain("RGBA", (*ORANGE, 128)), icc_profile=profile(DISPLAY_P3)))
    assert read == pytest.approx(127 / 255 * 255 + 128 / 255 * in_srgb(ORANGE, DISPLAY_P3, 2.2), abs=2)


@pytest.mark.parametrize(("mode", "value"), [("L", 128), ("LA", (128, 255)), ("I;16", 128 * 257), ("1", 1)])
def test_grey_has_profiles_of_grey(mode: str, value: object) -> None:
    linear = 255 if mode == "1" else 188  # sRGB of 128/255
    assert colour_of(encoded(plain(mode, value), icc_profile=profile(gamma=1.0))) == (linear, linear, linear)


def test_orientation_and_profile_go_together() -> None:
    picture = Image.new("RGB", (16, 32), ORANGE)
    picture.paste((255, 255, 255), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(encoded(picture, exif=exif, icc_profile=profile(DISPLAY_P3)))
    assert (opened.size, opened.getpixel((31, 0))) == ((32, 16), (255, 255, 255))
    assert opened.getpixel((0, 0)) == pytest.approx(in_srgb(ORANGE, DISPLAY_P3, 2.2), abs=2)


def test_lab_is_read_as_its_colours() -> None:
    lab = ImageCms.profileToProfile(
        plain(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert colour_of(encoded(lab, "TIFF")) == pytest.approx(ORANGE, abs=4)


@pytest.mark.parametrize(
    ("own", "mode", "reason"),
    [
        (b"no profile" * 30, "RGB", "cannot open profile"),
        (profile(DISPLAY_P3)[:150], "RGB", "cannot open profile"),
        (profile(DISPLAY_P3), "L", "it is for RGB and the picture is L"),
        (profile(DISPLAY_P3), "CMYK", "it is for RGB and the picture is CMYK"),
        (profile(), "RGB", "it is for L and the picture is RGB"),
        (profile(DISPLAY_P3) + bytes(colour.MAX_PROFILE_BYTES), "RGB", "it is larger than"),
    ],
)
def test_a_profile_that_cannot_be_used_is_told(
    own: bytes, mode: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    without, having = (encoded(plain().convert(mode), "TIFF", icc_profile=one) for one in (None, own))
    assert colour_of(having) == colour_of(without)
    assert f"cat has a colour profile that cannot be used ({reason}" in caplog.text


def test_a_damaged_profile_chunk_is_told(caplog: pytest.LogCaptureFixture) -> None:
    data = encoded(plain())
    assert colour_of(data[:33] + png_chunk(b"iCCP", b"x\0\0not compressed") + data[33:]) == ORANGE
    assert "cat has a colour profile that cannot be used (it is cut short)" in caplog.text


# metadata


def png_text(**options: object) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    getattr(info, str(options.pop("how")))("workflow", "x" * 3_000_000, **options)
    return info


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("how", ["add_text", "add_itxt"])
@pytest.mark.parametrize("zip", [False, True])
def test_a_png_with_a_large_text_is_read(how: str, zip: bool, from_file: bool, tmp_path: Path) -> None:
    data = encoded(plain(), pnginfo=png_text(how=how, zip=zip))
    (tmp_path / "a.png").write_bytes(data)
    assert open_image(tmp_path / "a.png" if from_file else data).getpixel((0, 0)) == ORANGE


def test_texts_after_the_pixels_and_many_of_them_are_no_hindrance() -> None:
    data, info = encoded(plain()), PngImagePlugin.PngInfo()
    after = png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2_000_000)))
    assert colour_of(data[:-12] + after + data[-12:]) == ORANGE
    for n in range(70):
        info.add_text(f"text {n}", "x" * 1_000_000, zip=True)
    assert colour_of(encoded(plain(), pnginfo=info)) == ORANGE


def test_a_large_profile_is_used_beside_a_large_text_with_the_exif(caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    large = profile(DISPLAY_P3) + bytes(2_000_000)
    data = encoded(
        Image.new("RGB", (16, 32), ORANGE), icc_profile=large, exif=exif, pnginfo=png_text(how="add_text", zip=True)
    )
    opened = open_image(data)
    assert opened.size == (32, 16)
    assert opened.getpixel((0, 0)) == pytest.approx(in_srgb(ORANGE, DISPLAY_P3, 2.2), abs=2)
    assert colour_of(encoded(plain(), icc_profile=bytes(2_000_000)), "zeros") == ORANGE
    assert "zeros has a colour profile that cannot be used" in caplog.text


def test_a_damaged_picture_with_a_large_text_is_still_damaged() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, pnginfo=png_text(how="add_text", zip=True))
    with pytest.raises(ValueError, match=r"^cat is damaged"):
        open_image(data[:-2000], "cat")


@pytest.mark.parametrize("depth", [1, 2, 4, 16])
def test_a_transparent_grey_is_white_whatever_its_depth(depth: int) -> None:
    clear, dark = 1, 0
    row = np.array([clear, dark] * 8, dtype=">u2")
    bits = row.tobytes() if depth == 16 else np.packbits((row[:, None] >> np.arange(depth)[::-1]) & 1).tobytes()
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 16, 16, depth, 0, 0, 0, 0),
        b"tRNS": struct.pack(">H", clear),
        b"IDAT": zlib.compress((b"\0" + bits) * 16),
        b"IEND": b"",
    }
    opened = open_image(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks.items()))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == ((255, 255, 255), (0, 0, 0))


# remarks and warnings


def test_remarks_of_a_kind_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    remarks = Remarks()
    for _ in range(3):  # epochs
        for n in range(234):
            remarks.add(f"{n}.gif", "moves", "move")
    remarks.add("x.gif", "is blue", "are blue")
    remarks.log_totals()
    remarks.log_totals()
    assert [record.getMessage() for record in caplog.records] == [
        "0.gif moves",
        "10 pictures so far move",
        "100 pictures so far move",
        "x.gif is blue",
        "234 pictures in all move",
    ]


def test_remarks_have_a_bound(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert MAX_COUNTED >= 1000
    monkeypatch.setattr("dvae.remarks.MAX_COUNTED", 5)
    remarks = Remarks()
    for n in range(99):
        remarks.add(f"{n}.gif", "moves", "move")
    remarks.log_totals()
    assert caplog.messages[-1] == "5 pictures in all move"


@pytest.mark.slow
def test_large_pictures_and_odd_metadata_give_no_warning_of_pillows(tmp_path: Path) -> None:
    for name, side in (("large", 9_500), ("huge", 11_500)):  # Pillow's own bound is 89 megapixels
        data = encoded(plain("L", 9))
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        (tmp_path / f"{name}.png").write_bytes(data[:8] + header + data[33:])
    exif = b"Exif\x00\x00" + b"MM\x00\x2a\xff\xff\xff\xff" + bytes(20)
    plain().save(tmp_path / "odd.jpg", exif=exif)
    program = """
import sys
from pathlib import Path
from dvae.images import open_image
for name in ("large.png", "huge.png", "odd.jpg"):
    try:
        print(open_image(Path(sys.argv[1], name), name).size)
    except ValueError as error:
        print(str(error).partition(" (")[0])
"""
    strict = ["-W", "error::RuntimeWarning", "-W", "error::UserWarning"]
    command = [sys.executable, *strict, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines() == ["large.png is damaged", "huge.png is too large", "(16, 16)"]
    assert done.stderr == ""
