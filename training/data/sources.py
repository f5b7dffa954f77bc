"""Sources of captioned pictures: folders with .txt captions, CSV, TSV and JSONL tables, COCO's annotations.

Nothing in a source is executed or downloaded, and no link is followed out of its folder.
"""

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle.data.endings import is_picture

IMAGE_COLUMNS = (
    *("image", "file", "filepath", "path", "image_path", "file_name"),
    *("filename", "file_path", "image_name", "image_file", "img", "img_path"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "description", "comment")
_MAX_FIELD = 1 << 24  # characters in a cell of a table

_Row = tuple[str, Any, Any, Mapping[str, Any]]  # name in the report, image, caption or captions, for KEY.json


class _SkippedError(Exception):
    """A sample that is left out; the message is the reason that the report counts."""


@dataclass(frozen=True, kw_only=True)
class SourcePicture:
    """A picture and its captions as a source lists them, not yet opened."""

    name: str
    """Its path within the folder of pictures, or its row: its name in the report."""
    path: Path | None = None
    """The file; None if it is skipped."""
    captions: tuple[str, ...] = ()
    """As they are in the source."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """For KEY.json."""
    skip: str | None = None
    """A reason to skip it; None if none is known yet."""


def list_source(source: Path, images: Path | None) -> list[SourcePicture]:
    """Return the pictures of a folder or table, in its order.

    Args:
        source: folder of pictures with .txt captions beside them, or a .csv, .tsv, .jsonl or COCO .json file.
        images: folder of the pictures that a table names; None looks beside the table and in "images" beside it.

    Raises:
        FileNotFoundError: no such source or folder of pictures.
        ValueError: the source cannot be understood, or has no pictures.
    """
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"no folder of pictures {images}")
    if source.is_dir():
        if images is not None:
            raise ValueError(f"{source} is a folder with captions beside its pictures: leave --images out")
        return _list_folder(source)
    if not source.exists():
        raise FileNotFoundError(
            f"no {source}: expected a folder of pictures, or a .csv, .tsv, .jsonl or COCO .json file"
        )
    absolute = Path(os.path.abspath(source))
    roots = [absolute.parent, absolute.parent / "images"] if images is None else [Path(os.path.abspath(images))]
    match absolute.suffix.lower():
        case ".csv" | ".tsv":
            return _from_rows(_table_rows(absolute), roots)
        case ".jsonl" | ".ndjson":
            return _from_rows(_json_rows(absolute, _json_lines(absolute)), roots)
        case ".json":
            return _list_json(absolute, roots, images)
        case ".tar":
            raise ValueError(f"{source} is a shard already: shards, img2dataset's included, are used as they are")
        case suffix:
            raise ValueError(
                f"{source} is a file of type {suffix or 'none'}: expected a folder of pictures, or a .csv, .tsv, "
                ".jsonl or COCO .json file"
            )


def _list_folder(folder: Path) -> list[SourcePicture]:
    """Return the pictures of a folder and all below it, with the captions in the .txt files beside them."""
    pictures: list[SourcePicture] = []
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders):
            linked = Path(parent, name)
            if linked.is_symlink():
                pictures.append(SourcePicture(name=str(linked.relative_to(folder)), skip="link to a folder"))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not is_picture(name):
                continue
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            try:
                located = _locate(relative, [folder])
                captions = _captions_beside(path, folder)
            except _SkippedError as skip:
                pictures.append(SourcePicture(name=relative, skip=str(skip)))
            else:
                pictures.append(SourcePicture(name=relative, path=located, captions=captions))
    if not pictures:
        shards = sorted(folder.rglob("*.tar"))
        hint = f"; {shards[0].name} looks like a shard: shards are used as they are" if shards else ""
        raise ValueError(f"no pictures in the folder {folder}: expected *.jpg, *.png, … with *.txt beside them{hint}")
    return pictures


def _captions_beside(picture: Path, folder: Path) -> tuple[str, ...]:
    text = picture.with_suffix(".txt")
    if not text.exists():
        return ()
    try:
        lines = _locate(text.relative_to(folder).as_posix(), [folder]).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise _SkippedError("caption is not UTF-8") from None
    except OSError:
        raise _SkippedError("unreadable file") from None
    return tuple(lines) or ("",)


def _locate(name: str, roots: Sequence[Path]) -> Path:
    """Return the regular file of that name in the first of the folders that has it.

    Raises:
        _SkippedError: there is none, or it lies outside the folders.
    """
    for root in roots:
        try:
            path = (root / name).resolve()
            if not path.is_file():
                continue
        except (OSError, ValueError):  # too long, or with a NUL
            continue
        if not any(path.is_relative_to(inside.resolve()) for inside in roots):
            raise _SkippedError("outside the folder of pictures")
        return path
    raise _SkippedError("missing image")


def _from_rows(rows: Iterable[_Row], roots: Sequence[Path]) -> list[SourcePicture]:
    """Return a candidate per picture; the captions of rows about the same picture are put together.

    Args:
        rows: the table; an image that is no text, or blank, is a malformed row.
        roots: where pictures may be.
    """
    pictures: dict[str, SourcePicture] = {}
    for row_name, image, caption, extra in rows:
        if not isinstance(image, str) or not image.strip():
            pictures[f"\0{row_name}"] = SourcePicture(name=row_name, skip="malformed row")
            continue
        image = image.strip()
        found = caption if isinstance(caption, list) else [caption]
        captions = tuple(text for text in found if isinstance(text, str))
        known = pictures.get(image)
        if known is not None:
            captions = tuple(dict.fromkeys((*known.captions, *captions)))
            pictures[image] = dataclasses.replace(known, captions=captions)
        elif re.match(r"[a-z][a-z0-9+.-]+://", image, re.IGNORECASE):
            pictures[image] = SourcePicture(name=image, skip="URL, not a file: download it first")
        else:
            try:
                path = _locate(image, roots)
            except _SkippedError as skip:
                pictures[image] = SourcePicture(name=image, skip=str(skip))
            else:
                name = _name_within(image, roots)
                pictures[image] = SourcePicture(name=name, path=path, captions=captions, extra=extra)
    return list(pictures.values())


def _name_within(image: str, roots: Sequence[Path]) -> str:
    """Return a path that may be absolute relative to the folder of pictures it is in."""
    for root in roots:
        path = Path(os.path.normpath(root / image))
        if path.is_relative_to(root) and path.exists():
            return path.relative_to(root).as_posix()
    return image


def _column(columns: Iterable[str], known: Sequence[str]) -> str | None:
    """Return the column that is called one of the known names, the first of those, whatever its case."""
    by_name = {column.strip().lower(): column for column in columns}
    return next((by_name[name] for name in known if name in by_name), None)


def _columns(path: Path, columns: Sequence[str]) -> tuple[str, str]:
    image, caption = _column(columns, IMAGE_COLUMNS), _column(columns, CAPTION_COLUMNS)
    if image is None or caption is None:
        wanted, names = ("image", IMAGE_COLUMNS) if image is None else ("caption", CAPTION_COLUMNS)
        raise ValueError(
            f"{path} has no {wanted} column among {', '.join(map(repr, columns)) or 'none'}: "
            f"expected one called {', '.join(names)}"
        )
    return image, caption


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it, for example with iconv") from error


def _table_rows(path: Path) -> Iterator[_Row]:
    """Yield the rows of a CSV or TSV table with a header."""
    text = _read_text(path)
    header = text.partition("\n")[0]
    delimiters = "\t" if path.suffix.lower() == ".tsv" else ",;\t|"
    delimiter = max(delimiters, key=header.count)
    limit = csv.field_size_limit(_MAX_FIELD)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        image, caption = _columns(path, list(reader.fieldnames or ()))
        for row in reader:
            yield f"line {reader.line_num}", row[image], row[caption], {}
    except csv.Error as error:
        raise ValueError(f"{path} is not a readable {delimiter!r}-separated table: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path, records: Iterable[tuple[str, Any]]) -> Iterator[_Row]:
    """Yield rows from (name, object) records; a record that is no object becomes a malformed row."""
    names: tuple[str, str] | None = None
    for name, record in records:
        if not isinstance(record, dict):
            yield name, None, None, {}
            continue
        names = names or _columns(path, list(record))
        yield name, record.get(names[0]), record.get(names[1]), {}


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                yield f"line {number}", None


def _coco_rows(path: Path, data: Mapping[str, Any]) -> Iterator[_Row]:
    """Yield a row per picture of COCO's caption annotations (https://cocodataset.org/#format-data)."""
    captions: dict[Any, list[str]] = {}
    try:
        for annotation in data["annotations"]:
            if "caption" in annotation:
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        if not captions:
            raise ValueError(
                f"the annotations of {path} have no captions (boxes?): expected a file such as captions_val2017.json"
            )
        for image in data["images"]:
            number = image["id"]
            yield f"image {number}", image["file_name"], captions.get(number, []), {"coco_id": number}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not COCO's caption format ({error!r}): expected images with id and file_name, "
            "and annotations with image_id and caption"
        ) from error


def _list_json(path: Path, roots: list[Path], images: Path | None) -> list[SourcePicture]:
    try:
        data = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); a file with one object a line is called .jsonl") from error
    if isinstance(data, list):
        return _from_rows(_json_rows(path, ((f"record {i}", record) for i, record in enumerate(data))), roots)
    if isinstance(data, dict) and {"images", "annotations"} <= data.keys():
        if images is None:  # COCO unpacks to annotations/captions_val2017.json and, beside annotations/, val2017/
            roots = [*roots, path.parent.parent / path.stem.rpartition("_")[2]]
        return _from_rows(_coco_rows(path, data), roots)
    found = ", ".join(map(repr, list(data)[:10])) if isinstance(data, dict) else type(data).__name__
    raise ValueError(f"{path} holds {found}: expected COCO's images and annotations, or a list of objects")
