"""The one home of pixels: opening, resizing and cropping, the paper's augmentations, the dVAE's pixel range.

Sources: Ramesh et al. 2021, Listing 1 and Listing 2 (augmentation) and A.3 (pixel map); CLIP (Radford et
    al. 2021), 2.4 (square crop).

Shapes: H, W height and width in pixels. Random choices take a numpy Generator, so that they are a function
    of its seed.
"""

import io
import logging
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dvae.colour import as_srgb
from dvae.png import lean_png, scale_transparent_colour
from dvae.remarks import REMARKS

FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
}
"""Formats that are read, by Pillow's names, whatever a file is called, and their usual endings. Pillow reads more, but
for EPS it starts Ghostscript, and most others are rare and little tested."""
MAX_PIXELS = 128_000_000
"""Larger pictures are refused before they are decoded."""
MIN_SIDE = 8
"""Pictures with a shorter side are refused: there is nothing to learn from them or to reconstruct."""
LOGIT_LAPLACE_EPS = 0.1
"""Pixels are mapped to [0.1, 0.9], away from the infinities of the logit at 0 and 1."""

_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    struct.error,
    zlib.error,
    Warning,
)
"""Errors of Pillow's decoders on damaged files; a warning is one where the user makes errors of them."""

# Pillow's own bound and its remarks on metadata would come as warnings with paths and source lines, several for a
# picture: what is lost is told in our words
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
for _category in (Image.DecompressionBombWarning, UserWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The inverse of each EXIF orientation (Exif 2.3, 4.6.4)."""


class PictureError(ValueError):
    """A picture that cannot be used."""

    def __init__(self, name: str, problem: str, details: str) -> None:
        super().__init__(f"{name} {problem}{details}")
        self.problem = problem
        """The same for all pictures with this problem, so that they can be counted: "is damaged"."""


def open_image(
    source: Path | bytes, name: str | None = None, *, max_pixels: int = MAX_PIXELS, keep_alpha: bool = False
) -> Image.Image:
    """Read a picture of one of the FORMATS as 8-bit RGB.

    A colour profile is converted to sRGB, transparency composited onto white, EXIF orientation applied, greyscale of
    more than 8 bits scaled by its range, and only the first frame of an animation read. Losses are remarked on.

    Args:
        source: a file, or the contents of one.
        name: of the picture in messages; by default the path.
        max_pixels: larger pictures are refused before they are decoded; at most MAX_PIXELS.
        keep_alpha: return RGBA, of the same colours and its alpha, if the picture has transparency.

    Returns:
        An RGB picture of at least MIN_SIDE pixels a side and at most max_pixels pixels.

    Raises:
        FileNotFoundError: there is no such file.
        PictureError (a ValueError): it is a folder, empty, not a picture, damaged, too large or too small.
        OSError: the file cannot be read, e.g. for lack of permission.
    """
    if isinstance(source, bytes):
        name = name or "the picture"
        is_empty = not source
    else:
        source = Path(source)
        name = name or str(source)
        if source.is_dir():
            raise PictureError(name, "is a folder", ": expected a picture file, such as a PNG or JPEG")
        if not source.exists():
            raise FileNotFoundError(f"no picture at {name}: expected a file; check the path")
        is_empty = source.stat().st_size == 0
    if is_empty:
        raise PictureError(name, "is empty", " (0 bytes): expected a picture; copy or download it again")
    try:
        return _decoded(source, name, max_pixels, keep_alpha)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        details = f" ({error}): expected at most {_megapixels(max_pixels)}; make it smaller first"
        raise PictureError(name, "is too large", details) from error
    except UnidentifiedImageError as error:
        details = ": expected a PNG, JPEG, WebP, GIF, TIFF or BMP file; convert or remove it"
        raise PictureError(name, "is not a picture", details) from error
    except PictureError:
        raise
    except _DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, not the decoder's
        details = f" ({error}): expected a whole picture; copy or download it again"
        raise PictureError(name, "is damaged", details) from error


def _decoded(source: Path | bytes, name: str, max_pixels: int, keep_alpha: bool) -> Image.Image:
    try:
        return _read(source, name, max_pixels, keep_alpha)
    except PictureError:
        raise
    except _DECODER_ERRORS:
        # for a large text or profile Pillow refuses the whole picture
        lean = lean_png(source)
        if lean is None:
            raise
    return _read(lean.data, name, max_pixels, keep_alpha, lean.profile)


def _read(
    source: Path | bytes, name: str, max_pixels: int, keep_alpha: bool, profile: bytes | None = None
) -> Image.Image:
    """Read a picture with Pillow; a colour profile that is given counts as its own."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file, formats=tuple(FORMATS)) as image:
        _require_size(image, name, max_pixels)
        scale_transparent_colour(image)
        if profile is not None:
            image.info["icc_profile"] = profile
        image.load()
        return _as_rgb(image, name, keep_alpha)


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:.0f} megapixels"


def _require_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        details = f" ({width}×{height} pixels): expected at most {_megapixels(max_pixels)}; make it smaller first"
        raise PictureError(name, "is too large", details)
    if min(width, height) < MIN_SIDE:
        details = f" ({width}×{height} pixels): expected {MIN_SIDE}×{MIN_SIDE} or more; use a larger picture"
        raise PictureError(name, "is too small", details)


def _as_rgb(image: Image.Image, name: str, keep_alpha: bool) -> Image.Image:
    """Return a loaded picture as upright RGB, or RGBA, in memory of its own."""
    n_frames = getattr(image, "n_frames", 1)
    # a camera's MPO holds one picture and its previews
    if n_frames > 1 and image.format != "MPO":
        REMARKS.add(
            name,
            f"is animated or has pages: only the first of its {n_frames} frames is used",
            "are animated or have pages: only the first frame of each is used",
            logging.WARNING,
        )
        image.seek(0)
    upright = _UPRIGHT.get(_orientation(image, name))
    rgb = as_srgb(image, name, keep_alpha=keep_alpha)
    return rgb if upright is None else rgb.transpose(upright)


def _orientation(image: Image.Image, name: str) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DECODER_ERRORS as error:
        kind = "EXIF data that cannot be read"
        REMARKS.add(
            name, f"has {kind} ({error}): it is taken to be upright", f"have {kind}: they are taken to be upright"
        )
        return 1
    return value if isinstance(value, int) else 1


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB picture as (3,H,W) float32 in [0, 1]."""
    if image.mode != "RGB":
        raise ValueError(f"to_tensor was given a picture of mode {image.mode}, expected RGB: read it with open_image")
    pixels_HWC = torch.from_numpy(np.array(image))
    return pixels_HWC.permute(2, 0, 1).contiguous().float() / 255.0


def to_image(pixels: Tensor) -> Image.Image:
    """Return (3,H,W) floats as an RGB picture: clamped to [0, 1], rounded to the nearest of 256 values.

    Raises:
        ValueError: another shape, or integer pixels.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"to_image was given {pixels.dtype} of shape {tuple(pixels.shape)}, expected floats of shape (3, H, W)"
        )
    scaled = (pixels.detach().float().clamp(0, 1) * 255.0).round().to(torch.uint8)
    return Image.fromarray(scaled.permute(1, 2, 0).contiguous().cpu().numpy())


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` with LANCZOS and crop the central size×size: the view of inference.

    Source: the notebook of openai/DALL-E at 5be4b23. Deviation: it refuses pictures smaller than `size`;
    here they are enlarged.
    """
    _require_side(size)
    short = min(image.size)
    # a strip of 8×100000 pixels, enlarged before it is cropped, would fill the memory
    width, height = (min(side, 4 * short) for side in image.size)
    image = _crop(image, (image.width - width) // 2, (image.height - height) // 2, width, height)
    scale = size / short
    resized = image.resize((round(scale * width), round(scale * height)), Image.Resampling.LANCZOS)
    return _crop(resized, (resized.width - size) // 2, (resized.height - size) // 2, size, size)


def dvae_augmentation(image: Image.Image, size: int, rng: np.random.Generator, *, flip: bool = True) -> Image.Image:
    """Crop a random square, shrink it to 9/8 … 12/8 of `size`, crop size×size at random, and mirror at random.

    Source: Listing 1, with size 256 and bounds 288 and 384. Deviation: it fails on pictures smaller than `size`; here
    they are enlarged to `size`.

    Args:
        image: RGB.
        size: side of the result in pixels.
        rng: every choice comes from it.
        flip: mirror half of the pictures, as the paper does; False if captions say left and right.
    """
    _require_side(size)
    side = min(image.size)
    left = int(rng.integers(0, image.width - side, endpoint=True))
    top = int(rng.integers(0, image.height - side, endpoint=True))
    low, high = (max(size, min(side, eighths * size // 8)) for eighths in (9, 12))
    view = _random_view(_crop(image, left, top, side, side), low, high, size, rng)
    if flip and rng.random() < 0.5:
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view


def transformer_augmentation(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Crop a nearly centred square, shrink it to 8/8 … 9/8 of `size`, and crop size×size at random; no mirroring.

    Source: Listing 2, with size 256 and bounds 256 and 288, so that text in a picture stays legible. Deviation: it
    fails on pictures smaller than `size`; here they are enlarged to `size`.
    """
    _require_side(size)
    side = min(image.size)
    left, top = (_near_centre(length - side, rng) for length in image.size)
    return _random_view(_crop(image, left, top, side, side), size, max(size, min(side, 9 * size // 8)), size, rng)


def square_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Crop a random square as large as the picture allows and resize it to size×size with BICUBIC.

    Source: CLIP, 2.4, whose only augmentation is a random square crop from resized pictures; cropping first
    gives the same views.
    """
    _require_side(size)
    side = min(image.size)
    left = int(rng.integers(0, image.width - side, endpoint=True))
    top = int(rng.integers(0, image.height - side, endpoint=True))
    return _crop(image, left, top, side, side).resize((size, size), Image.Resampling.BICUBIC)


def map_pixels(x: Tensor) -> Tensor:
    """Map [0, 1] to [0.1, 0.9], the open interval that the logit-Laplace likelihood needs (A.3)."""
    return (1.0 - 2.0 * LOGIT_LAPLACE_EPS) * x + LOGIT_LAPLACE_EPS


def unmap_pixels(x: Tensor) -> Tensor:
    """Undo `map_pixels`; values outside its range are clamped to [0, 1]."""
    return ((x - LOGIT_LAPLACE_EPS) / (1.0 - 2.0 * LOGIT_LAPLACE_EPS)).clamp(0.0, 1.0)


def _require_side(size: int) -> None:
    if size < 1:
        raise ValueError(f"size ({size}) must be at least 1 pixel")


def _near_centre(slack: int, rng: np.random.Generator) -> int:
    """Return an offset between 3/8 and 5/8 of the slack, as Listing 2 draws it."""
    low = 3 * slack // 8
    return int(rng.integers(low, max(low + 1, 5 * slack // 8)))


def _random_view(square: Image.Image, low: int, high: int, size: int, rng: np.random.Generator) -> Image.Image:
    """Resize a square to a random side in low … high, both included, and crop size×size at random."""
    side = int(rng.integers(low, high, endpoint=True))
    # the listings' AREA is the box filter, which only shrinks: enlarged with it, a picture would turn into blocks
    filter = Image.Resampling.BOX if side <= square.width else Image.Resampling.LANCZOS
    resized = square.resize((side, side), filter)
    left, top = (int(offset) for offset in rng.integers(0, side - size, endpoint=True, size=2))
    return _crop(resized, left, top, size, size)


def _crop(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))
