"""Rows of tables and JSON to pictures: which column is which, where the files are, several rows of one picture."""

import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dalle.data.endings import not_read
from storage.text import lines_of, read_text
from training.data.sources.pictures import Listing, SkippedError, SourcePicture, locate

IMAGE_COLUMNS = (
    *("image", "file", "filepath", "path", "image_path", "file_name"),
    *("filename", "file_path", "image_name", "image_file", "img", "img_path"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "title", "sentence", "description", "comment")
MALFORMED = "malformed row"
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class Row(NamedTuple):
    """A row of a table as it stands."""

    name: str
    """Its place in the source: its name in the report."""
    image: Any
    """The name of a picture; anything but a text that is not blank makes a malformed row."""
    captions: Any
    """A text or a list of texts."""
    extra: Mapping[str, Any] = {}
    """For KEY.json."""
    skip: str | None = None
    """A reason to skip it; None if none is known."""


def is_url(image: str) -> bool:
    """Return whether the name of a picture is an address."""
    return _URL.match(image) is not None


def list_rows(rows: Iterable[Row], roots: Sequence[Path], *, follow_links: bool) -> Listing:
    """Return a picture for each image that rows are about, in order; the captions of its rows are put together.

    Args:
        rows: of the table.
        roots: where pictures may be.
        follow_links: whether a link among the pictures may lead out of these folders.
    """
    pictures: dict[str | int, SourcePicture] = {}
    for row in rows:
        is_named = isinstance(row.image, str) and row.image.strip() != ""
        if row.skip is not None or not is_named:
            pictures[len(pictures)] = SourcePicture(name=row.name, skip=row.skip or MALFORMED)
            continue
        image = row.image.strip()
        found = row.captions if isinstance(row.captions, list) else [row.captions]
        captions = [text for text in found if isinstance(text, str)]
        n_not_text = sum(text is not None and not isinstance(text, str) for text in found)
        known = pictures.get(image) or _picture(image, row.extra, roots, follow_links)
        pictures[image] = dataclasses.replace(
            known,
            captions=tuple(dict.fromkeys((*known.captions, *captions))),
            n_rows=known.n_rows + (image in pictures),
            n_not_text=known.n_not_text + n_not_text,
        )
    return Listing(pictures=list(pictures.values()))


def _picture(image: str, extra: Mapping[str, Any], roots: Sequence[Path], follow_links: bool) -> SourcePicture:
    """Return a picture without its captions: the file of that name, or of the same name spelled in another way."""
    if is_url(image):
        return SourcePicture(name=image, skip="URL, not a file: download it first")
    refusals: list[str] = []
    slashes = image.replace("\\", "/")  # of Windows
    for name in dict.fromkeys(
        (image, slashes, unicodedata.normalize("NFC", slashes), unicodedata.normalize("NFD", slashes))
    ):
        try:
            path = locate(name, roots, follow_links=follow_links)
        except SkippedError as skip:
            refusals.append(str(skip))
        else:
            return SourcePicture(name=_name_within(name, roots), path=path, extra=extra, skip=not_read(image))
    return SourcePicture(name=image, skip=next((one for one in refusals if one != "missing image"), "missing image"))


def _name_within(image: str, roots: Sequence[Path]) -> str:
    """Return a path that may be absolute relative to the folder of pictures it is in."""
    for root in roots:
        path = Path(os.path.normpath(root / image))
        if path.is_relative_to(root) and path.exists():
            return path.relative_to(root).as_posix()
    return image


# ------------------------------------------------------------------------------------------------------- columns


def columns(path: Path, names: Sequence[str]) -> tuple[str, str]:
    """Return which columns are the picture and the caption: those of known names, the first of these, in any case.

    Raises:
        ValueError: there is none.
    """
    found = []
    for wanted, known in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        name = _column(names, known)
        if name is None:
            raise ValueError(
                f"{path} has no {wanted} column among {', '.join(repr(name[:40]) for name in names[:20]) or 'none'}: "
                f"expected one called {', '.join(known)}"
            )
        found.append(name)
    return found[0], found[1]


def _column(names: Iterable[str], known: Sequence[str]) -> str | None:
    by_name = {_plain(name): name for name in names}
    return next((by_name[name] for name in known if name in by_name), None)


def _plain(name: str) -> str:
    return name.strip().lower()


# ---------------------------------------------------------------------------------------------------------- JSON


def json_rows(path: Path, records: Iterable[tuple[str, Any]]) -> Iterator[Row]:
    """Yield rows of (name, object) records; a record that is no object becomes a malformed row.

    Raises:
        ValueError: no record has a picture, or none has a caption.
    """
    records = list(records)
    names = list(dict.fromkeys(name for _, record in records if isinstance(record, dict) for name in record))
    if not records:
        return
    columns(path, names)
    for row_name, record in records:
        if isinstance(record, dict):
            image, caption = _column(record, IMAGE_COLUMNS), _column(record, CAPTION_COLUMNS)
            yield Row(row_name, record[image] if image else None, record[caption] if caption else None)
        else:
            yield Row(row_name, None, None)


def json_line_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object a line; a line that is none becomes a malformed row."""

    def records() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(lines_of(read_text(path)), start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError):
                    yield f"line {number}", None

    return json_rows(path, records())


def json_file_rows(path: Path) -> tuple[Iterator[Row], Path | None]:
    """Read a JSON file: a list of objects, or COCO's caption annotations.

    Returns:
        The rows, and the folder that COCO's pictures unpack to; None for a list.

    Raises:
        ValueError: it holds something else.
    """
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); a file with one object a line is called .jsonl") from error
    if isinstance(data, list):
        return json_rows(path, ((f"record {i}", record) for i, record in enumerate(data))), None
    if isinstance(data, dict) and {"images", "annotations"} <= data.keys():
        # annotations/captions_val2017.json and, beside annotations/, val2017/
        return _coco_rows(path, data), path.parent.parent / path.stem.rpartition("_")[2]
    found = ", ".join(map(repr, list(data)[:10])) if isinstance(data, dict) else type(data).__name__
    raise ValueError(f"{path} holds {found}: expected COCO's images and annotations, or a list of objects")


def _coco_rows(path: Path, data: Mapping[str, Any]) -> Iterator[Row]:
    """Yield a row per picture of COCO's caption annotations (https://cocodataset.org/#format-data)."""
    captions: dict[Any, list[Any]] = {}
    try:
        for annotation in data["annotations"]:
            if "caption" in annotation:
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        if not captions:
            raise ValueError(
                f"the annotations of {path} have no captions (boxes?): expected a file such as captions_val2017.json"
            )
        listed = set()
        for image in data["images"]:
            number = image["id"]
            listed.add(number)
            yield Row(f"image {number}", image["file_name"], captions.get(number, []), {"coco_id": number})
        for number in (number for number in captions if number not in listed):
            yield Row(f"image {number}", None, None, skip="captions of a picture that is not among the images")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not COCO's caption format ({error!r}): expected images with id and file_name, "
            "and annotations with image_id and caption"
        ) from error
