"""Folders of pictures for `dalle-train shards`, small ones and one as people have them, and what its shards hold."""

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from dalle.data.reader import ShardData
from support.corrupt import encoded
from training.data.shards_report import ShardReport


def pictures_in(folder: Path, names: Iterable[str], *, captions: bool = False) -> Path:
    """Small JPEGs of these names, whatever their endings, perhaps each with a caption beside it."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.new("RGB", (16, 16), "red"), "JPEG"))
        if captions:
            path.with_suffix(".txt").write_text(f"caption of {path.stem}", "utf-8", "replace")
    return folder


def captions_in(report: ShardReport) -> dict[str, tuple[str, ...]]:
    data = ShardData.open(report.shards, captions=True)
    return {sample.key: sample.captions for sample in map(data.read, range(len(data)))}


# ------------------------------------------------------------------------------- as people have them

WRITTEN, DUPLICATE, CORRUPT, EMPTY_FILE, SMALL = (
    "written",
    "duplicate key",
    "corrupt image",
    "empty image file",
    "picture too small",
)
NO_CAPTION, BLANK, NOT_UTF8, BAD_JSON = (
    "no caption",
    "empty caption",
    "caption is not UTF-8",
    "caption is in JSON that cannot be read",
)
MISSING, MALFORMED, JOINED = "missing image", "malformed row", "joined"
LINK_OUT, BROKEN_LINK = "link out of the folder of pictures: --follow-links reads it", "link to no file"
HEIC = "format .heic is not read: save it as JPEG, for example with heif-convert"
RAW = "format .dng is not read: develop it to JPEG or TIFF"
SVG = "format .svg is not read: draw it as PNG"
OF_PICTURES = (CORRUPT, EMPTY_FILE, SMALL, HEIC, RAW, SVG, LINK_OUT, BROKEN_LINK)
"""Reasons that hold whatever the caption is."""
OTHER_FILES = ("Thumbs.db", "IMG_0001.MOV", "notes.docx", "spare.txt")

Encoder = Callable[[Image.Image, int], bytes]


class Named(NamedTuple):
    """A picture of a folder."""

    name: str
    caption: str
    """As a table would have it."""
    fate: str
    """Written, or why it is not."""


# ------------------------------------------------------------------------------------------------- sound pictures


def _turned(image: Image.Image, n: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = n % 8 + 1
    return encoded(image, "JPEG", exif=exif, quality=85)


def _with_profile(image: Image.Image, n: int) -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return encoded(image, "JPEG", icc_profile=profile if n % 3 else profile[: len(profile) // 2])


def _lab(image: Image.Image, _: int) -> bytes:
    spaces = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    return encoded(ImageCms.profileToProfile(image, *spaces, outputMode="LAB"), "TIFF")


def _deep(image: Image.Image, _: int) -> bytes:
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


def _clear(image: Image.Image, kind: str) -> bytes:
    palette = image.quantize(64)
    return encoded(palette, kind, transparency=0)


def _moving(image: Image.Image, _: int) -> bytes:
    return encoded(image, "WEBP", save_all=True, append_images=[image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])


ENCODERS: tuple[tuple[str, Encoder], ...] = (
    (".JPG", _turned),
    (".jpeg", _turned),
    (".JPEG", _with_profile),
    (".jpg", lambda image, _: encoded(image.convert("CMYK"), "JPEG")),
    (".png", lambda image, _: encoded(image.convert("RGBA"), "PNG")),
    (".png", lambda image, _: _clear(image, "PNG")),
    (".PNG", _deep),
    (".webp", lambda image, _: encoded(image, "WEBP")),
    (".webp", _moving),
    (".gif", lambda image, _: _clear(image, "GIF")),
    (".tif", lambda image, _: encoded(image, "TIFF", compression="tiff_lzw")),
    (".tiff", _lab),
    (".bmp", lambda image, _: encoded(image, "BMP")),
    (".jfif", lambda image, _: encoded(image.convert("L"), "JPEG")),
    (".png", lambda image, _: encoded(image, "JPEG")),  # saved from the web under another ending
)

NAMES = (
    *("IMG_{n:04}", "my holiday photo ({n})", "😀 party {n}", "Gru\u0308ße aus Köln {n}", "caf\udce9 {n}", "a.b.{n}"),
    *(
        "tab\there {n}",
        "line\nbreak {n}",
        "\x1b[31mred {n}",
        "2021/summer {n}",
        "-rf {n}",
        "100% {n} #1",
        "trailing {n} ",
    ),
    *(
        "{n}",
        "e\u0301te\u0301 {n}",
        'it\'s, "quoted" {n}',
        "写真 {n}",
        "back\\slash {n}",
        "v1.0.{n}",
        "x" * 150 + "{n}",
    ),
)

CAPTIONS: tuple[tuple[str, Callable[[str], bytes]], ...] = (
    (".txt", lambda text: text.encode()),
    (".txt", lambda text: f"{text}\r\n".encode()),
    (".txt", lambda text: f"{text}\nanother line\n\n".encode()),
    (".TXT", lambda text: text.encode("utf-8-sig")),
    (".txt", lambda text: text.encode("utf-16")),
    (".caption", lambda text: text.encode()),
    (".json", lambda text: json.dumps({"caption": text, "width": 9}).encode()),
    (".json", lambda text: json.dumps({"captions": [text, "another"]}).encode()),
    (".txt", lambda text: f"{text}\rof an old computer".encode()),
)


# ------------------------------------------------------------------------------------------------------ the folder


class Folder:
    """Writes a folder of pictures and their captions."""

    def __init__(self, path: Path, pictures: Iterable[tuple[Image.Image, str]]) -> None:
        self.path, self._pictures = path, itertools.cycle(pictures)
        self.made: list[Named] = []
        self.n_sound = self.n_odd = 0

    def write(self, name: str, data: bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def add(self, name: str, data: bytes, fate: str = WRITTEN, caption: str | bytes | None = "a caption") -> None:
        self.write(name, data)
        self.tell(name, fate, caption)

    def tell(self, name: str, fate: str, caption: str | bytes | None = "a caption") -> None:
        if caption is not None:
            text = caption.encode() if isinstance(caption, str) else caption
            self.write(f"{name.rpartition('.')[0]}.txt", text)
        self.made.append(Named(name, caption if isinstance(caption, str) else "", fate))

    def add_sound(self) -> None:
        image, text = next(self._pictures)
        n = self.n_sound = self.n_sound + 1
        stem = NAMES[n % len(NAMES)].format(n=n)
        ending, encode = ENCODERS[n % len(ENCODERS)]
        beside, as_bytes = CAPTIONS[n % len(CAPTIONS)]
        self.write(f"{stem}{beside}", as_bytes(text))
        self.write(f"{stem}{ending}", encode(image, n))
        self.made.append(Named(f"{stem}{ending}", text, WRITTEN))

    def add_odd(self) -> None:
        image, text = next(self._pictures)
        n, jpeg = self.n_odd, encoded(image, "JPEG")
        self.n_odd += 1
        match n % 22:
            case 0:
                self.add(f"IMG_{n}.HEIC", b"\0\0\0\x18ftypheic" + bytes(500), HEIC, text)
            case 1:
                self.add(f"cut {n}.jpg", jpeg[: len(jpeg) // 2], CORRUPT, text)
            case 2:
                self.add(f"empty {n}.JPG", b"", EMPTY_FILE, text)
            case 3:
                self.add(f"page {n}.jpg", b"<!DOCTYPE html><title>404 Not Found</title>", CORRUPT, text)
            case 4:
                self.add(f"text {n}.png", b"this is no picture\n", CORRUPT, text)
            case 5:
                self.add(f"alone {n}.jpg", jpeg, NO_CAPTION, None)
            case 6:
                self.add(f"blank {n}.jpg", jpeg, BLANK, " \r\n\n")
            case 7:
                self.add(f"nothing {n}.jpg", jpeg, BLANK, b"")
            case 8:
                self.add(f"windows {n}.jpg", jpeg, NOT_UTF8, "it\u2019s a caf\u00e9".encode("cp1252"))
            case 9:
                self.add(f"unmarked {n}.jpg", jpeg, NOT_UTF8, text.encode("utf-16-le"))
            case 10:
                self.write(f"broken {n}.json", b'{"caption": "a re')
                self.add(f"broken {n}.jpg", jpeg, BAD_JSON, None)
            case 11:
                self.write(f"other {n}.json", b'{"width": 9}')
                self.add(f"other {n}.jpg", jpeg, NO_CAPTION, None)
            case 12:
                self.add(f"twice {n}.jpg", jpeg, caption=text)
                self.add(f"twice {n} - Copy.jpg", jpeg, caption=text)
            case 13:  # the first by name
                self.add(f"edited {n}.jpg", jpeg, caption=text)
                self.add(f"edited {n}.png", encoded(image, "PNG"), DUPLICATE, text)
            case 14:
                self.add(f"case {n}.JPG", jpeg, caption=text)
                self.add(f"case {n}.jpg", jpeg, DUPLICATE, text)
            case 15:
                self.add(f"Case {n}.jpg", jpeg, caption=text)
                self.add(f"case {n}.jpg", encoded(image, "JPEG", quality=30), caption=text)
            case 16:
                self.add(f"icon {n}.png", encoded(image.resize((7, 30)), "PNG"), SMALL, text)
            case 17:
                self.add(f"raw {n}.DNG", b"II*\0" + bytes(400), RAW, text)
            case 18:
                self.add(f"logo {n}.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", SVG, text)
            case 19:
                outside = self.write(f"../outside/{n}.jpg", jpeg)
                (self.path / f"linked {n}.jpg").symlink_to(outside.resolve())
                self.tell(f"linked {n}.jpg", LINK_OUT, text)
            case 20:
                (self.path / f"lost {n}.jpg").symlink_to("nowhere.jpg")
                self.tell(f"lost {n}.jpg", BROKEN_LINK, text)
            case _:
                self.add(f"zero width {n}.jpg", jpeg, BLANK, "\u200b\u2060")


def write_folder(path: Path, pictures: Iterable[tuple[Image.Image, str]], n: int) -> list[Named]:
    """Write n pictures, three sound ones for each odd one, and what else lies about in such folders."""
    folder = Folder(path, pictures)
    while len(folder.made) < n:
        if folder.n_sound > 3 * folder.n_odd and len(folder.made) < n - 1:  # it may be two
            folder.add_odd()
        else:
            folder.add_sound()
    for name in (*OTHER_FILES, ".DS_Store", "._IMG_0001.JPG"):
        folder.write(name, b"something")
    return folder.made


# ------------------------------------------------------------------------------------------------------- a table


def write_table(folder: Path, made: Iterable[Named], n: int) -> Counter[str]:
    """Write captions.csv with n rows about a folder's pictures beside it; returns what is to become of the rows."""
    fates: Counter[str] = Counter()
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\r\n")
    rows.writerow(("file", "caption", "width"))
    pictures = itertools.cycle(made)

    def row(file: str, caption: str, fate: str) -> None:
        rows.writerow((file, caption, 9))
        fates[fate] += 1

    for i in itertools.count():
        one = next(pictures)
        is_plain = one.fate == WRITTEN and re.fullmatch(r"IMG_\d+\.\w+", one.name) is not None
        fate = (
            one.fate
            if one.fate in (*OF_PICTURES, DUPLICATE)
            else WRITTEN
            if one.caption.strip(" \r\n\u200b\u2060")
            else BLANK
        )
        if fates.total() >= n:
            break
        if not one.name.isascii() and "\udce9" in one.name:
            row(one.name.replace("\udce9", "\ufffd"), one.caption, MISSING)
        elif one.name.startswith("2021/"):
            row(one.name.replace("/", "\\"), one.caption, fate)
        elif is_plain and i % 2:
            text.write(f'{one.name},"a quote that never closes {i},9\r\n')
            fates[WRITTEN] += 1
        else:
            row(
                one.name,
                f'{one.caption}, "quoted",\twith a tab\nand a line' if i % 5 == 0 and fate == WRITTEN else one.caption,
                fate,
            )
        if fates.total() >= n:
            break
        match i % 40:
            case 7:
                row(f"gone {i}.jpg", one.caption, MISSING)
            case 13:
                text.write(f"unquoted {i}.jpg,one, two, three,9\r\n")
                fates["more fields than the header"] += 1
            case 21:
                row(f"https://example.com/{i}.jpg", one.caption, "URL, not a file: download it first")
            case 25:
                row("  ", f"no name {i}", MALFORMED)
            case 33 if is_plain or (fate == WRITTEN and one.name.isascii() and "/" not in one.name):
                row(one.name, f"another caption {i}", JOINED)
    (folder / "captions.csv").write_text(text.getvalue(), "utf-8", newline="")
    return fates
