import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle.data.endings import is_picture
from dvae import images
from dvae.images import (
    FORMATS,
    MAX_PIXELS,
    dvae_augmentation,
    map_pixels,
    open_image,
    resize_and_crop,
    square_crop,
    to_image,
    to_tensor,
    transformer_augmentation,
    unmap_pixels,
)
from dvae.remarks import REMARKS


@pytest.fixture(autouse=True)
def _no_remarks_of_other_tests() -> None:
    REMARKS.log_totals()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = 32, height: int = 16) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_rgb_is_read_as_it_is_from_a_file_and_from_bytes(tmp_path: Path) -> None:
    picture = gradient()
    picture.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.asarray(picture))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_tones(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    values = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (16, 1))
    grey = np.asarray(open_image(encoded(Image.fromarray(values), kind), "scan"))
    assert np.array_equal(grey[..., 0], np.rint(values / 257))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert [record.getMessage() for record in caplog.records if record.name.startswith("dvae.")] == [
        "scan has I;16 samples from 0 to 65535, which are reduced to 8 bits"
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.linspace(0, 1, 16, dtype=np.float32), (0, 255)),
        (np.linspace(0, 255, 16, dtype=np.float32), (0, 255)),
        (np.linspace(0, 65535, 16, dtype=np.float32), (0, 255)),
        (np.linspace(-3, 5, 16, dtype=np.float32), (0, 255)),
        (np.linspace(0, 65535, 16).astype(np.int32), (0, 255)),
        (np.linspace(-(10**6), 10**6, 16).astype(np.int32), (0, 255)),
        (np.full(16, 0.5, np.float32), (128, 128)),
        (np.full(16, -7.0, np.float32), (0, 0)),
        (np.array([np.nan, np.inf, 1.0, 0.0] * 4, np.float32), (0, 255)),
    ],
)
def test_grey_floats_and_integers_are_scaled_by_their_range(values: np.ndarray, expected: tuple[int, int]) -> None:
    grey = np.asarray(open_image(encoded(Image.fromarray(np.tile(values, (16, 1))), "TIFF")))
    assert (int(grey.min()), int(grey.max())) == expected


def test_cmyk_becomes_rgb() -> None:
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind in ("TIFF", "JPEG"):
        red = np.asarray(open_image(encoded(picture, kind))).reshape(-1, 3).mean(0)
        assert red[0] > 240
        assert red[1:].max() < 30


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "YCbCr" else "PNG"
    opened = open_image(encoded(gradient().convert(mode), kind))
    assert (opened.mode, opened.size) == ("RGB", (32, 16))


def test_transparency_is_composited_onto_white() -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    grey = Image.new("LA", (16, 16), (0, 128))
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for picture, options, expected in [
        (clear, {}, 255),
        (half, {}, 127),
        (grey, {}, 127),
        (palette, {"transparency": 0}, 255),
        (Image.new("RGB", (16, 16), (1, 2, 3)), {"transparency": (1, 2, 3)}, 255),
        (Image.new("L", (16, 16), 9), {"transparency": 9}, 255),
    ]:
        assert np.unique(np.asarray(open_image(encoded(picture, **options)))).tolist() == [expected]


def test_an_animation_gives_its_first_frame_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        caplog.clear()
        REMARKS.log_totals()  # and begin anew
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(red, kind, save_all=True, append_images=[blue, red], **options)
        assert open_image(data, "cat").getpixel((5, 5)) == (255, 0, 0)
        assert "cat is animated or has pages: only the first of its 3 frames is used" in caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int) -> None:
    upright = gradient()
    sideways = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = upright
    for turn in sideways:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        opened = open_image(encoded(stored, kind, exif=exif))
        assert np.array_equal(np.asarray(opened), np.asarray(upright))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unreadable_exif_does_not_refuse_a_picture() -> None:
    data = encoded(gradient(), "JPEG", exif=b"Exif\x00\x00" + b"MM\x00\x2a\xff\xff\xff\xff" + bytes(20))
    assert open_image(data).size == (32, 16)


def test_a_missing_file_a_folder_and_an_empty_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no picture at .*cat.png"):
        open_image(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"is a folder: expected a picture file"):
        open_image(tmp_path)
    (tmp_path / "cat.png").touch()
    with pytest.raises(ValueError, match=r"cat.png is empty \(0 bytes\)"):
        open_image(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"shard/000\.jpg is empty"):
        open_image(b"", "shard/000.jpg")


def test_what_is_not_a_picture_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"notes.txt is not a picture: expected a PNG, JPEG"):
        open_image(b"hello" * 100, "notes.txt")


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO"])
def test_other_formats_are_refused_whatever_the_file_is_called(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a picture started a program")

    monkeypatch.setattr("subprocess.Popen", started)  # EPS: Ghostscript
    monkeypatch.setattr("subprocess.check_call", started)
    (tmp_path / "x.jpg").write_bytes(encoded(gradient(), kind))
    for source in (tmp_path / "x.jpg", (tmp_path / "x.jpg").read_bytes()):
        with pytest.raises(ValueError, match=r"x\.jpg is not a picture: expected a PNG, JPEG"):
            open_image(source, "x.jpg")


@pytest.mark.parametrize(("kind", "extension"), [(kind, name) for kind, names in FORMATS.items() for name in names])
def test_every_format_is_read_from_files_with_its_extensions(kind: str, extension: str, tmp_path: Path) -> None:
    (tmp_path / f"x{extension}").write_bytes(encoded(gradient(), kind))
    assert open_image(tmp_path / f"x{extension}").size == (32, 16)
    assert is_picture(f"x{extension.upper()}")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_picture_cut_short_is_refused_by_name(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, kind)
    for length in (len(whole) // 2, len(whole) // 8):
        with pytest.raises(ValueError, match=r"^cat (is damaged|is not a picture)"):
            open_image(whole[:length], "cat")


def test_errors_of_decoders_of_any_kind_are_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 1, 3, 0, 0, 0))
    without_palette = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(16))) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=r"^cat is damaged"):
        open_image(without_palette, "cat")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to decode frame 0")  # as libavif's

    monkeypatch.setattr(images, "as_srgb", fail)
    with pytest.raises(ValueError, match=r"^cat is damaged \(Failed to decode frame 0\)"):
        open_image(encoded(gradient(), "PNG"), "cat")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_never_escape_as_another_error() -> None:
    rng = np.random.default_rng(1)
    wholes = [encoded(gradient(), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP")]
    for whole in wholes:
        for _ in range(40):
            data = bytearray(whole)
            for position in rng.integers(0, len(data), 4):
                data[position] = rng.integers(256)
            message = "cat is readable"
            try:
                open_image(bytes(data), "cat")
            except ValueError as error:
                message = str(error)
            assert message.startswith("cat is ")


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (12_000, 12_000), (MAX_PIXELS // 8 + 1, 8)])
@pytest.mark.filterwarnings("error")
def test_a_huge_picture_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with pytest.raises(ValueError, match=r"big is too large \(.*expected at most 128 megapixels"):
        open_image(png_header(width, height), "big")


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_a_tiny_picture_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"dot is too small \({size[0]}×{size[1]} pixels\): expected 8×8 or more"):
        open_image(encoded(Image.new("RGB", size)), "dot")
    assert open_image(encoded(Image.new("RGB", (8, 8)))).size == (8, 8)


def test_tensors_and_pictures_are_inverse_and_rounded() -> None:
    picture = gradient()
    pixels = to_tensor(picture)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.float32, (3, 16, 32))
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)
    assert np.array_equal(np.asarray(to_image(pixels)), np.asarray(picture))
    values = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 2.0]).expand(3, 1, 4)
    assert np.asarray(to_image(values))[0, :, 0].tolist() == [0, 0, 1, 255]
    with pytest.raises(ValueError, match=r"expected floats of shape \(3, H, W\)"):
        to_image(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="mode L, expected RGB"):
        to_tensor(picture.convert("L"))


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 400), st.integers(8, 400), st.sampled_from([8, 24, 64]), st.integers(0, 99))
def test_every_way_to_a_square_gives_the_size_and_leaves_the_picture(w: int, h: int, size: int, seed: int) -> None:
    picture = Image.effect_noise((w, h), 40).convert("RGB")
    before = picture.tobytes()
    for augment in (dvae_augmentation, transformer_augmentation, square_crop):
        result = augment(picture, size, np.random.default_rng(seed))
        assert (result.size, result.mode) == ((size, size), "RGB")
        assert result.tobytes() == augment(picture, size, np.random.default_rng(seed)).tobytes()
    assert resize_and_crop(picture, size).size == (size, size)
    assert picture.tobytes() == before


def test_resize_and_crop_keeps_the_centre() -> None:
    picture = Image.new("RGB", (90, 30), "red")
    picture.paste("blue", (30, 0, 60, 30))
    assert resize_and_crop(picture, 30).getpixel((15, 15)) == (0, 0, 255)
    assert np.asarray(resize_and_crop(picture, 30)).tobytes() == picture.crop((30, 0, 60, 30)).tobytes()


def test_a_long_strip_does_not_fill_the_memory() -> None:
    strip = Image.new("RGB", (200_000, 8), "green")
    for result in (
        resize_and_crop(strip, 256),
        dvae_augmentation(strip, 256, np.random.default_rng(0)),
        transformer_augmentation(strip, 256, np.random.default_rng(0)),
        square_crop(strip, 256, np.random.default_rng(0)),
    ):
        assert result.size == (256, 256)


def drawn_views(monkeypatch: pytest.MonkeyPatch, augment: object, width: int, height: int, size: int) -> set[tuple]:
    """Every (crop of the picture, side it was resized to) over 400 seeds."""
    views, crops = set(), []
    crop, view = images._crop, images._random_view

    def recording_crop(image: Image.Image, *box: int) -> Image.Image:
        crops.append(box)
        return crop(image, *box)

    def recording_view(square: Image.Image, low: int, high: int, size: int, rng: np.random.Generator) -> Image.Image:
        views.add((crops[-1], low, high))
        return view(square, low, high, size, rng)

    monkeypatch.setattr(images, "_crop", recording_crop)
    monkeypatch.setattr(images, "_random_view", recording_view)
    picture = Image.new("RGB", (width, height))
    for seed in range(400):
        augment(picture, size, np.random.default_rng(seed))
    return views


@pytest.mark.parametrize(
    ("side", "bounds"), [(500, (288, 384)), (300, (288, 300)), (270, (270, 270)), (100, (256, 256))]
)
def test_listing_1_crops_anywhere_and_resizes_to_9_to_12_eighths(
    monkeypatch: pytest.MonkeyPatch, side: int, bounds: tuple[int, int]
) -> None:
    views = drawn_views(monkeypatch, dvae_augmentation, side + 5, side, 256)
    assert {(low, high) for _, low, high in views} == {bounds}
    assert {crop for crop, _, _ in views} == {(left, 0, side, side) for left in range(6)}


@pytest.mark.parametrize(
    ("side", "bounds"), [(500, (256, 288)), (270, (256, 270)), (256, (256, 256)), (100, (256, 256))]
)
def test_listing_2_crops_near_the_centre_and_resizes_to_8_to_9_eighths(
    monkeypatch: pytest.MonkeyPatch, side: int, bounds: tuple[int, int]
) -> None:
    views = drawn_views(monkeypatch, transformer_augmentation, side + 40, side, 256)
    assert {(low, high) for _, low, high in views} == {bounds}
    # offsets 3·40//8 … max(3·40//8 + 1, 5·40//8) - 1, both included
    assert {crop for crop, _, _ in views} == {(left, 0, side, side) for left in range(15, 25)}


def test_the_resized_side_takes_both_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = set()
    resize = Image.Image.resize

    def recording(self: Image.Image, size: tuple[int, int], *options: object) -> Image.Image:
        sides.add((size, options))
        return resize(self, size, *options)

    monkeypatch.setattr(Image.Image, "resize", recording)
    for seed in range(300):
        dvae_augmentation(Image.new("RGB", (64, 64)), 16, np.random.default_rng(seed))
    assert sides == {((side, side), (Image.Resampling.BOX,)) for side in range(18, 25)}


def test_only_the_dvae_sees_mirrored_pictures_and_half_of_the_time() -> None:
    picture = Image.new("RGB", (64, 64), "black")
    picture.paste("white", (0, 0, 32, 64))

    def mirrored(augment: object, **options: object) -> int:
        views = [augment(picture, 32, np.random.default_rng(seed), **options) for seed in range(200)]
        return sum(view.getpixel((0, 16))[0] < view.getpixel((31, 16))[0] for view in views)

    assert 70 < mirrored(dvae_augmentation) < 130
    assert mirrored(dvae_augmentation, flip=False) == 0
    assert mirrored(transformer_augmentation) == 0


def test_pixels_are_mapped_away_from_0_and_1_and_back() -> None:
    x = torch.linspace(0, 1, 11)
    assert torch.allclose(map_pixels(x)[[0, 5, 10]], torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(unmap_pixels(map_pixels(x)), x, atol=1e-6)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
