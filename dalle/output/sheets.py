"""Shows pictures: contact sheets, originals beside reconstructions, PNG metadata, safe file names.

Pictures come in as PIL images and text as strings. Text is drawn in Pillow's own font, which has little more than
ASCII: accents are left out and other characters become boxes, so captions are kept in the metadata as well.
"""

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from storage.atomic import replace_file
from storage.drawn import MARK
from storage.text import lines_of

MIN_CELL, MAX_CELL = 128, 256
"""Side in pixels of a picture's place on a sheet: smaller pictures are enlarged, larger ones reduced."""
MAX_PAIR_CELL = 1024
"""The same for `side_by_side`, which shows details and so keeps larger pictures as they are."""
MARGIN, GAP, FRAME = 16, 12, 4
LABEL_SIZE, HEADING_SIZE, TITLE_SIZE = 13, 17, 22
MAX_LABEL_LINES, MAX_HEADING_LINES = 4, 3
# Text is measured a character at a time, and of 10,000 characters only the beginning can be shown anyway.
MAX_DRAWN_CHARACTERS = 600
ELLIPSIS = "..."
BACKGROUND, INK, FAINT_INK = "#ffffff", "#1a1a1a", "#5c5c5c"

_SHEET = "sheet"  # in the info of a sheet, for `save_png`

HASH_DIGITS = 8
MIN_SLUG_LENGTH = HASH_DIGITS + 4
# Names that Windows reserves, whatever the extension.
RESERVED_NAMES = {"con", "prn", "aux", "nul"} | {f"{port}{i}" for port in ("com", "lpt") for i in range(10)}


class Section(NamedTuple):
    """A part of a contact sheet."""

    heading: str
    """Drawn above the pictures, for example their caption; may be empty."""
    images: Sequence[Image.Image]
    """The pictures, of any size."""
    labels: Sequence[str]
    """The text under each picture, one per picture; may be empty strings."""
    marks: Sequence[str] | None = None
    """Colours of the frame around each picture and of its label, as Pillow names them; None draws no frames."""


def contact_sheet(
    sections: Sequence[Section | tuple[str, Sequence[Image.Image], Sequence[str]]],
    *,
    title: str = "",
    columns: int = 8,
    largest_cell: int = MAX_CELL,
) -> Image.Image:
    """Draw pictures in rows with a label under each; all get places of the same size.

    Args:
        sections: `Section`s, or plain tuples of their first three fields; each has its own heading and grid.
        title: drawn at the top; may be empty.
        columns: pictures per row, at most.
        largest_cell: side in pixels of a place at most; `MAX_PAIR_CELL` where details count.

    Raises:
        ValueError: no pictures at all, another number of labels than pictures, or columns below 1.
    """
    return _sheet(sections, title=title, columns=columns, max_cell=largest_cell)


def side_by_side(
    originals: Sequence[Image.Image],
    reconstructions: Sequence[Image.Image],
    labels: Sequence[str],
    *,
    title: str = "original | reconstruction",
    pairs_per_row: int = 2,
) -> Image.Image:
    """Draw each original with its reconstruction to the right; the label stands under the reconstruction.

    Raises:
        ValueError: the three differ in length, or are empty.
    """
    if len(originals) != len(reconstructions):
        raise ValueError(f"{len(originals)} originals and {len(reconstructions)} reconstructions: give pairs")
    images = [image for pair in zip(originals, reconstructions, strict=True) for image in pair]
    texts = [text for label in labels for text in ("original", label)]
    columns = 2 * max(1, min(pairs_per_row, len(originals)))
    return _sheet([Section("", images, texts)], title=title, columns=columns, max_cell=MAX_PAIR_CELL)


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG with text chunks, whole or not at all; a sheet also has the mark of sheets.

    Args:
        image: the picture.
        path: the file; its folder must exist; an older file is replaced.
        metadata: keyword -> text, read back by `Image.open(path).text`; beyond ASCII it is UTF-8 (iTXt).

    Raises:
        ValueError: a keyword that PNG does not allow.
        OSError: the file cannot be written.
    """
    chunks = PngInfo()
    if _SHEET in image.info:
        chunks.add(MARK, b"")
    for keyword, text in (metadata or {}).items():
        if not (0 < len(keyword) < 80 and keyword.isascii() and keyword.isprintable()):
            raise ValueError(f"{keyword!r} cannot be a PNG keyword: expected 1 to 79 printable ASCII characters")
        text = _unicode(text).replace("\0", "\N{REPLACEMENT CHARACTER}")  # PNG ends texts with a zero byte
        if text.isascii():
            chunks.add_text(keyword, text)
        else:
            chunks.add_itxt(keyword, text)
    replace_file(path, lambda partial: image.save(partial, format="PNG", pnginfo=chunks))


def slug(text: str, max_length: int = 60) -> str:
    """Return a file name for any text: lower-case ASCII letters, digits and dashes; never empty.

    Lower-case words with single spaces between them stay as they are. If anything else of the text is lost (capitals,
    punctuation, other scripts, length), eight digits of its SHA-256 follow, so different texts have different names.

    Args:
        text: anything, also a path or an emoji.
        max_length: characters of the result at most, itself at least 12.

    Raises:
        ValueError: max_length is too small for the digits.
    """
    if max_length < MIN_SLUG_LENGTH:
        raise ValueError(f"max_length is {max_length}; it must be at least {MIN_SLUG_LENGTH}")
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", ascii_text)
    name = "-".join(words)
    # a last word that looks like the digits could be mistaken for those of another text
    looks_hashed = bool(words) and re.fullmatch(rf"[0-9a-f]{{{HASH_DIGITS}}}", words[-1]) is not None
    is_lossless = " ".join(words) == text and 0 < len(name) <= max_length
    if is_lossless and not looks_hashed and name not in RESERVED_NAMES:
        return name
    digits = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS]
    kept = name[: max_length - HASH_DIGITS - 1].strip("-") or "text"
    return f"{kept[: max_length - HASH_DIGITS - 1]}-{digits}"


def _sheet(
    parts: Sequence[Section | tuple[str, Sequence[Image.Image], Sequence[str]]],
    *,
    title: str,
    columns: int,
    max_cell: int,
) -> Image.Image:
    sections = [Section(*part) for part in parts]
    _check_sections(sections, columns)
    sections = [section for section in sections if section.images]
    columns = min(columns, max(len(section.images) for section in sections))
    largest = max(max(image.size) for section in sections for image in section.images)
    cell = min(max(largest, MIN_CELL), max_cell)
    width = 2 * MARGIN + columns * cell + (columns - 1) * GAP

    blocks = [_grid(section, columns=columns, cell=cell, width=width) for section in sections]
    if title:
        blocks.insert(0, _text_block(title, width, size=TITLE_SIZE, max_lines=MAX_HEADING_LINES))
    height = 2 * MARGIN + sum(block.height for block in blocks) + GAP * (len(blocks) - 1)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    sheet.info[_SHEET] = True
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height + GAP
    return sheet


def _check_sections(sections: Sequence[Section], columns: int) -> None:
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")
    if not any(len(section.images) for section in sections):
        raise ValueError("no pictures for the contact sheet: give at least one")
    for section in sections:
        if len(section.images) != len(section.labels):
            raise ValueError(
                f"{len(section.images)} pictures and {len(section.labels)} labels: give one label per picture"
            )
        if section.marks is not None and len(section.marks) != len(section.images):
            raise ValueError(
                f"{len(section.images)} pictures and {len(section.marks)} marks: give one mark per picture"
            )


def _grid(section: Section, *, columns: int, cell: int, width: int) -> Image.Image:
    """Draw a section as wide as the sheet: heading, then rows of pictures and labels."""
    font = ImageFont.load_default(LABEL_SIZE)
    labels = [_wrap(label, font, cell, MAX_LABEL_LINES) for label in section.labels]
    label_height = max(len(lines) for lines in labels) * _line_height(LABEL_SIZE)
    row_height = cell + 4 + label_height + GAP
    n_rows = math.ceil(len(section.images) / columns)
    top = 0 if section.marks is None else FRAME
    heading = None
    if section.heading:
        heading = _text_block(section.heading, width, size=HEADING_SIZE, max_lines=MAX_HEADING_LINES)
        top += heading.height + 6
    block = Image.new("RGB", (width, top + n_rows * row_height), BACKGROUND)
    if heading is not None:
        block.paste(heading, (0, 0))
    draw = ImageDraw.Draw(block)
    for i, (image, lines) in enumerate(zip(section.images, labels, strict=True)):
        row, column = divmod(i, columns)
        left, upper = MARGIN + column * (cell + GAP), top + row * row_height
        picture = _fitted(image, cell)
        block.paste(picture, (left + (cell - picture.width) // 2, upper + (cell - picture.height) // 2))
        mark = None if section.marks is None else section.marks[i]
        if mark is not None:
            frame = (left - FRAME, upper - FRAME, left + cell + FRAME - 1, upper + cell + FRAME - 1)
            draw.rectangle(frame, outline=mark, width=FRAME)
        _draw_lines(draw, lines, (left, upper + cell + 4), font, LABEL_SIZE, mark or FAINT_INK)
    return block


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """Enlarge or reduce a picture until its longer side fills the cell."""
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.convert("RGB")
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _text_block(text: str, width: int, *, size: int, max_lines: int) -> Image.Image:
    font = ImageFont.load_default(size)
    lines = _wrap(text, font, width - 2 * MARGIN, max_lines)
    block = Image.new("RGB", (width, len(lines) * _line_height(size)), BACKGROUND)
    _draw_lines(ImageDraw.Draw(block), lines, (MARGIN, 0), font, size, INK)
    return block


Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def _draw_lines(
    draw: ImageDraw.ImageDraw, lines: list[str], corner: tuple[int, int], font: Font, size: int, ink: str
) -> None:
    left, top = corner
    for i, line in enumerate(lines):
        draw.text((left, top + i * _line_height(size)), line, fill=ink, font=font)


def _line_height(size: int) -> int:
    return math.ceil(1.3 * size)


def _wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Split a text into lines of at most `width` pixels; long words are broken, the last line may end in dots.

    Newlines in the text are kept.
    """
    shortened = _drawable(text[:MAX_DRAWN_CHARACTERS])
    lines = [line for part in lines_of(shortened) for line in _wrap_line(part, font, width)] or [""]
    if len(lines) > max_lines or len(text) > MAX_DRAWN_CHARACTERS:
        lines = lines[:max_lines]
        last = lines[-1]
        while last and font.getlength(last + ELLIPSIS) > width:
            last = last[:-1]
        lines[-1] = last + ELLIPSIS
    return lines


def _wrap_line(text: str, font: Font, width: int) -> list[str]:
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        while font.getlength(line) > width and len(line) > 1:
            n_fitting = _n_fitting(line, font, width)
            lines.append(line[:n_fitting])
            line = line[n_fitting:]
    return [*lines, line] if line else lines


def _n_fitting(word: str, font: Font, width: int) -> int:
    """Return how many characters of a word fit; at least one, so that wrapping always ends."""
    n = 1
    while n < len(word) and font.getlength(word[: n + 1]) <= width:
        n += 1
    return n


def _drawable(text: str) -> str:
    """Return the text with accents removed."""
    return "".join(c for c in unicodedata.normalize("NFKD", _unicode(text)) if not unicodedata.combining(c))


def _unicode(text: str) -> str:
    """Return the text without halves of surrogate pairs, which arguments may hold but no file can."""
    return text.encode("utf-8", "replace").decode("utf-8")
