"""Pictures on their way out and in: encoded with what made them, uploads and masks opened, results kept for a while.

A picture's metadata are those of `dalle generate`, and an XMP packet that calls it made by a trained algorithm (IPTC
Digital Source Type, https://cv.iptc.org/newscodes/digitalsourcetype/).
"""

import io
import json
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dalle.editing.regions import Region, transparent
from dalle.server.api.errors import wrong
from dalle.server.api.requests import FORMATS, OutputFormat
from dalle.server.queueing.batch import Varying
from dvae.images import open_image, resize_and_crop, to_image, to_tensor

MAX_UPLOAD_PIXELS = 16_000_000
"""Of a picture that is sent: decoded, it takes 48 MB."""
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)
GREY = 0.5
"""Of rows that are not known yet."""
ID = re.compile(r"[0-9a-f]{32}")


def encode(
    pixels: Tensor, *, side: int, output_format: OutputFormat, compression: int, texts: Mapping[str, Any] | None
) -> bytes:
    """Return a picture as a file.

    Args:
        pixels: float32 (3, H, H) in [0, 1].
        side: of the file's picture; another than H is made with LANCZOS.
        output_format: of the file.
        compression: quality of JPEG and WebP, 0 … 100.
        texts: what is told of it, in a PNG as text chunks, else as XMP's description; None for nothing.
    """
    image = to_image(pixels)
    if image.width != side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if output_format == "png":
        chunks = PngInfo()
        for name, value in (texts or {}).items():
            text = value if isinstance(value, str) else json.dumps(value)
            text = text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
            chunks.add_text(name, text) if text.isascii() else chunks.add_itxt(name, text)
        chunks.add_itxt("XML:com.adobe.xmp", XMP)
        image.save(file, format="PNG", pnginfo=chunks)
        return file.getvalue()
    options: dict[str, Any] = {"quality": compression, "xmp": XMP.encode()}
    if texts and output_format == "jpeg":
        options["comment"] = json.dumps(dict(texts), ensure_ascii=False).encode("utf-8", "replace")[:65_000]
    elif texts:
        exif = Image.Exif()
        exif[0x010E] = json.dumps(dict(texts), ensure_ascii=True)  # ImageDescription
        options["exif"] = exif.tobytes()
    image.save(file, format=FORMATS[output_format], **options)
    return file.getvalue()


def unfinished(top: Tensor, side: int, row: int) -> Tensor:
    """Return a whole picture of which the top is known: grey below, and the top's last two rows of tokens faded out.

    Their pixels still change by what comes below: on the demonstration by up to 0.5, those above by up to 0.04.

    Args:
        top: float32 (3, h, W) in [0, 1].
        side: H of the whole.
        row: pixels of a row of tokens.
    """
    whole = torch.full((3, side, top.shape[2]), GREY)
    whole[:, : top.shape[1]] = top
    if top.shape[1] < side:
        n_faded = min(2 * row, top.shape[1])
        last = slice(top.shape[1] - n_faded, top.shape[1])
        weight_h1 = torch.linspace(1, 0, n_faded + 2)[1:-1, None]
        whole[:, last] = GREY + weight_h1 * (whole[:, last] - GREY)
    return whole


def sheet(tops: Tensor, columns: int) -> bytes:
    """Return equal pictures beside and below each other as one file, PNG if small, else JPEG."""
    n, _, height, width = tops.shape
    rows = -(-n // columns)
    sprite = torch.full((3, rows * height, columns * width), GREY)
    for i, top in enumerate(tops):
        y, x = divmod(i, columns)
        sprite[:, y * height : (y + 1) * height, x * width : (x + 1) * width] = top
    image, file = to_image(sprite), io.BytesIO()
    if n * height * width <= 16 * 48 * 48:
        image.save(file, format="PNG")
    else:
        image.save(file, format="JPEG", quality=80)
    return file.getvalue()


def open_upload(data: bytes, name: str = "image", *, keep_alpha: bool = False) -> Image.Image:
    """Open a picture that was sent, whatever it is called: upright, in RGB, or RGBA as `open_image` has it.

    Raises:
        APIError: it is no picture, damaged, or has more than `MAX_UPLOAD_PIXELS`.
    """
    try:
        return open_image(data, f"the {name}", max_pixels=MAX_UPLOAD_PIXELS, keep_alpha=keep_alpha)
    except ValueError as error:
        raise wrong(name, str(error), "invalid_image") from error


def varying(data: bytes, strength: float, *, side: int) -> Varying:
    """Return a picture that was sent, as a bundle sees it, of which variations are drawn."""
    return Varying(image=resize_and_crop(open_upload(data), side), strength=strength)


def region_of(data: bytes, mask: bytes | None, keep_rows: int | None, *, side: int, grid: int) -> Region:
    """Return what is drawn anew of a picture that was sent.

    Args:
        data: the picture's file.
        mask: a file of the same proportions, fully transparent where the picture is drawn anew. Without it and
            `keep_rows`, the picture's own transparency says so.
        keep_rows: rows of tokens at the top that are kept.
        side: of the bundle's pictures in pixels.
        grid: rows of tokens.

    Raises:
        APIError: one is no picture, nothing in the mask is transparent where the bundle sees the picture, or both
            have other proportions.
    """
    if keep_rows is not None and mask is not None:
        raise wrong("keep_rows", "keep_rows and mask both say what is kept: send one of them")
    image = open_upload(data, keep_alpha=True)
    if keep_rows is not None:
        is_new = torch.zeros(side, side, dtype=torch.bool)
        is_new[keep_rows * side // grid :] = True
        return Region(pixels=to_tensor(resize_and_crop(image.convert("RGB"), side)), is_new=is_new)
    is_new_hw = transparent(image if mask is None else open_upload(mask, "mask", keep_alpha=True))
    if is_new_hw is None and mask is None:
        hint = "send a mask, transparent where it is to be drawn anew, or make these parts of the image transparent"
        raise wrong("mask", f"there is no mask: {hint}; or send keep_rows, the rows of tokens to keep", "missing")
    if is_new_hw is None:
        hint = "make transparent (alpha 0) what is to be drawn anew"
        raise wrong("mask", f"the mask has nothing transparent: {hint}", "invalid_mask")
    try:
        region = Region.of(image.convert("RGB"), is_new_hw, side)
    except ValueError as error:
        raise wrong("mask", str(error), "invalid_mask") from error
    if not region.is_new.any():
        where = "is transparent only outside of the middle square, which is all that the model sees"
        raise wrong("image" if mask is None else "mask", f"the mask {where}", "invalid_mask")
    return region


@dataclass(frozen=True)
class Kept:
    """A picture that is kept for those who know its id."""

    data: bytes
    media_type: str
    expires_at: float


class Results:
    """Pictures in memory under ids that cannot be guessed; the oldest go when there are too many, all after a time.

    Args:
        max_bytes: of all together.
        keep_s: seconds that each is kept.
    """

    def __init__(self, max_bytes: int, keep_s: float = 3600) -> None:
        self._max_bytes, self._keep_s = max_bytes, keep_s
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self.n_bytes = 0
        """Held now."""

    def add(self, data: bytes, media_type: str) -> str:
        """Keep a picture; returns its id, 128 random bits in hexadecimal digits."""
        name = secrets.token_hex(16)
        with self._lock:
            self._kept[name] = Kept(data, media_type, time.monotonic() + self._keep_s)
            self.n_bytes += len(data)
            self._forget()
        return name

    def get(self, name: str) -> Kept | None:
        """Return a picture, or None if it is not there (any more)."""
        if not ID.fullmatch(name):
            return None
        with self._lock:
            self._forget()
            return self._kept.get(name)

    def _forget(self) -> None:
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if self.n_bytes <= self._max_bytes and oldest.expires_at >= time.monotonic():
                return
            self.n_bytes -= len(self._kept.popitem(last=False)[1].data)
