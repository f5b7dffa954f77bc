"""Inputs for the doors: odd pictures."""

import functools
import io
import struct
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw
from PIL.PngImagePlugin import PngInfo

from dvae.images import FORMATS

MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
    "La",
    "RGBa",
)

WIDTH, HEIGHT = 19, 13

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "JPEG": (
        {"quality": 90},
        {"progressive": True},
        {"subsampling": 0},
        {"comment": b"x" * 99},
        {"restart_marker_rows": 1},
    ),
    "PNG": ({}, {"compress_level": 0}, {"bits": 2}, {"dpi": (300, 300)}),
    "WEBP": ({}, {"lossless": True}, {"quality": 10}),
    "TIFF": tuple({"compression": name} for name in ("raw", "tiff_lzw", "jpeg", "packbits", "tiff_deflate", "group4")),
    "GIF": ({}, {"interlace": 1}, {"transparency": 0}),
    "JPEG2000": ({}, {"irreversible": True}, {"tile_size": (8, 8)}, {"num_resolutions": 2}),
    "AVIF": ({"quality": 30}, {"quality": 100, "subsampling": "4:4:4"}),
}


def drawn(mode: str) -> Image.Image:
    image = Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB")
    ImageDraw.Draw(image).rectangle((2, 2, 9, 5), fill=(250, 40, 3))
    match mode:
        case "I;16" | "I;16B":
            return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257).convert(mode)
        case "LAB":
            profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
            return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
        case "La" | "RGBa":
            return image.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
        case "PA":
            return image.convert("P").convert("PA")
        case "RGBX":
            return image.convert("RGBX")
    return image.convert(mode)


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[ExifTags.Base.Orientation], found[ExifTags.Base.Make] = orientation, "Camera"
    found.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
    return found.tobytes()


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


LAB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def metadata(kind: str) -> list[dict[str, Any]]:
    """Options that add metadata to a file."""
    extra: list[dict[str, Any]] = [
        {"exif": exif(6)},
        {"exif": b"Exif\0\0II*\0" + b"\xff" * 30},
        {"icc_profile": PROFILE},
    ]
    extra += [{"icc_profile": PROFILE[:200]}, {"icc_profile": LAB_PROFILE}, {"icc_profile": b"x" * 70_000}]
    if kind == "PNG":
        texts = PngInfo()
        texts.add_text("caption", "a" * 3000, zip=True)
        texts.add_itxt("é", "日本" * 99)
        texts.add(b"gAMA", struct.pack(">I", 0))
        extra.append({"pnginfo": texts})
    return extra


def saved(image: Image.Image, kind: str, **options: Any) -> bytes | None:
    file = io.BytesIO()
    try:
        image.save(file, kind, **options)
    except Exception:  # Pillow does not write this mode so
        return None
    return file.getvalue()


@functools.cache
def corpus() -> list[tuple[str, bytes]]:
    """Sound pictures of all formats, modes and options, with their names."""
    found = []
    for kind in FORMATS:
        for mode in MODES:
            for options in (
                *OPTIONS.get(kind, ({},)),
                *(metadata(kind) if mode in ("RGB", "L", "RGBA", "CMYK") else ()),
            ):
                data = saved(drawn(mode), kind, **options)
                if data is not None:
                    found.append((f"{kind} {mode} {sorted(options)}", data))
    frames = [drawn("RGB"), drawn("RGB").rotate(90), drawn("L").convert("RGB")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        if data is not None:
            found.append((f"{kind} of three frames", data))
    return found
