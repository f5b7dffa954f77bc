"""Makes 8-bit sRGB of a decoded picture of any mode: colour profiles, transparency, greyscale of more than 8 bits.

A picture without a colour profile is taken as sRGB, which web pages do as well.

Sources: ICC.1:2010; IEC 61966-2-1 (sRGB).
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from dvae.remarks import REMARKS

MAX_PROFILE_BYTES = 4 << 20
"""Larger profiles are ignored; those of printers, the largest, have 0.5 to 3 MB."""
_SAME_COLOUR = 2
"""A profile that changes no sample by more, of 255, is sRGB up to rounding: pixels stay as they are."""
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's modes of the colour spaces that profiles are for."""
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}
"""Premultiplied alpha, which Pillow converts only to its own straight form."""


def as_srgb(image: Image.Image, name: str, *, keep_alpha: bool = False) -> Image.Image:
    """Return a loaded picture as 8-bit RGB in sRGB, in memory of its own, on white where it is transparent.

    A profile that cannot be used is ignored, with a remark.

    Args:
        image: of any mode.
        name: of the picture, for remarks.
        keep_alpha: return RGBA, of these colours and its alpha, if the picture has transparency.

    Raises:
        ValueError: Pillow cannot convert its mode.
    """
    has_profile, profile = "icc_profile" in image.info, image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, name)
    elif image.mode in _STRAIGHT:
        image = image.convert(_STRAIGHT[image.mode])
    transform = _transform(profile, image.mode, name) if has_profile or image.mode == "LAB" else None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if transform is not None:
            colours = _converted(rgba, transform)
            colours.putalpha(rgba.getchannel("A"))
            rgba = colours
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
        if keep_alpha:
            rgb.putalpha(rgba.getchannel("A"))
    else:
        rgb = _converted(image, transform)
    rgb.info.pop("icc_profile", None)  # or a copy that is saved would be converted again
    return rgb


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    """Return a picture as RGB in memory of its own; alpha is dropped."""
    if transform is None:
        return image.convert("RGB")
    if transform.input_mode == "RGB":
        return transform.apply_in_place(image.convert("RGB"))
    mode = transform.input_mode
    return transform.apply(image if image.mode == mode else image.convert(mode))


def _transform(profile: bytes | None, mode: str, name: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way to sRGB; None if pixels stay as they are, with a remark if that is for want of a sound profile."""
    own = {"1": "L", "LA": "L"}.get(mode, mode)
    try:
        if mode == "LAB":
            return _lab_to_srgb()
        if not profile:
            raise ValueError("it is cut short")
        transform = _to_srgb(profile)
        if transform is not None and transform.input_mode != (own if own in ("L", "CMYK") else "RGB"):
            raise ValueError(f"it is for {transform.input_mode} and the picture is {mode}")
    except (OSError, ValueError, TypeError, ImportError) as error:
        kind = "a colour profile that cannot be used"
        REMARKS.add(name, f"has {kind} ({error}): it is read as sRGB", f"have {kind}: they are read as sRGB")
        return None
    return transform


@lru_cache(maxsize=8)
def _to_srgb(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a profile's colours to sRGB; None if it changes none of them.

    Raises:
        ValueError, OSError: it is too large, damaged, or for something else than RGB, grey or CMYK.
        ImportError: Pillow was built without LittleCMS.
    """
    if len(profile) > MAX_PROFILE_BYTES:
        raise ValueError(f"it is larger than {MAX_PROFILE_BYTES:,} bytes")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space
    if space not in _MODES:
        raise ValueError(f"it is for {space.strip()}")
    transform = ImageCms.ImageCmsTransform(source, _srgb(), _MODES[space], "RGB")
    if space == "CMYK":
        return transform
    samples = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(samples, samples, samples), axis=-1).reshape(len(samples), -1, 3)
    colours = Image.fromarray(grid if space == "RGB " else np.repeat(samples[None, :, None], 3, axis=2))
    changed = np.asarray(_converted(colours, transform), dtype=np.int16) - np.asarray(colours, dtype=np.int16)
    return transform if int(np.abs(changed).max()) > _SAME_COLOUR else None


@lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    return ImageCms.ImageCmsTransform(lab, _srgb(), "LAB", "RGB")


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale greyscale of 16 or 32 bits or floats to 8 bits; Pillow's own conversion would clip at 255.

    16-bit and integer samples range from 0 to 65535; floats to 1, 255 or 65535, the first that holds them. Any others
    are stretched from their minimum to their maximum. A transparent grey (of PNG) becomes alpha.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    ceilings = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    ceiling = next((c for c in ceilings if low >= 0 and high <= c), None)
    start, span = (0.0, ceiling) if ceiling is not None else (low, (high - low) or 1.0)
    REMARKS.add(
        name,
        f"has {image.mode} samples from {low:g} to {high:g}, which are reduced to 8 bits",
        "have samples of more than 8 bits, which are reduced to 8",
    )
    grey = np.rint((values - start) * (255.0 / span)).astype(np.uint8)
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return Image.fromarray(grey)
    return Image.fromarray(np.dstack([grey, np.where(values == clear, 0, 255).astype(np.uint8)]))
