"""Making shards: captioned pictures in; tar files in WebDataset's format and a report out.

1. A source is listed: a folder of pictures with .txt captions beside them, a CSV, TSV or JSONL table, or
   COCO's caption annotations.
2. Every picture is read, decoded once to see that it can be, and kept as the bytes it was when they are JPEG,
   PNG or WebP.
3. `write_shards` writes KEY.jpg (or .png, .webp), KEY.txt (one caption a line) and KEY.json in the order of
   the source: the same source gives the same bytes.

Nothing in a source is executed or downloaded, no link is followed out of its folder, and a key is never a
path that leads anywhere: see `safe_key`.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from dvae.images import PICTURE_EXTENSIONS, open_image
from training.data.filters import EMPTY, REFUSALS, ShardFilter

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = (
    *("image", "file", "filepath", "path", "image_path", "file_name"),
    *("filename", "file_path", "image_name", "image_file", "img", "img_path"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "description", "comment")
_STORED_EXTENSIONS = ("jpg", "png", "webp")
_LONGEST_KEY_BYTES = 90  # a USTAR name has 100
_NAMED_IN_REPORT = 5
_LARGEST_FIELD = 1 << 24  # characters in a cell of a table


_Row = tuple[str, Any, Any, Mapping[str, Any]]  # name in the report, image, caption or captions, for KEY.json
_SampleTuple = tuple[str, bytes, str, Sequence[str], Mapping[str, Any]]  # a RawSample's fields


class RawSample(NamedTuple):
    """What a shard holds of one picture."""

    key: str
    """Its name; `safe_key` is applied to it."""
    image_bytes: bytes
    """The encoded picture."""
    extension: str
    """jpg, png or webp: what the bytes are."""
    captions: Sequence[str]
    """Line breaks and repeated spaces in them become one space; none makes a sample without KEY.txt."""
    extra: Mapping[str, Any]
    """What KEY.json holds besides "key" and "captions"."""


# ------------------------------------------------------------------------------------------------------ writing


def safe_key(name: str) -> str:
    """Return a key that is the name where possible: word characters, "-" and single "/" between them.

    Everything else, dots included because a dot ends a key, becomes "_"; ".." and leading slashes vanish. A
    name that was changed gets eight hex digits of its hash, so that different names stay different.
    """
    name = unicodedata.normalize("NFC", name)
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..")]
    clean = "/".join(re.sub(r"[^\w-]", "_", part) for part in parts)
    if clean and clean == name and len(clean.encode()) <= _LONGEST_KEY_BYTES:
        return clean
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    short = clean.encode()[: _LONGEST_KEY_BYTES - 9].decode(errors="ignore").strip("/")
    return f"{short}-{digest}" if short else digest


def _record(sample: RawSample, key: str) -> dict[str, Any]:
    """Return a sample in the form webdataset writes."""
    if sample.extension not in _STORED_EXTENSIONS:
        known = ", ".join(_STORED_EXTENSIONS)
        raise ValueError(f"{key}: extension {sample.extension!r}, expected one of {known}")
    captions = [" ".join(caption.split()) for caption in sample.captions]
    about = {**sample.extra, "key": key, "captions": captions}
    record: dict[str, Any] = {"__key__": key, sample.extension: sample.image_bytes}
    record["json"] = json.dumps(about, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")
    if captions:
        record["txt"] = "\n".join(captions).encode("utf-8", "replace")
    return record


def write_shards(
    samples: Iterable[_SampleTuple],
    out_dir: Path,
    prefix: str,
    samples_per_shard: int = 1000,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write samples as OUT_DIR/PREFIX-000000.tar, …: byte for byte the same for the same samples.

    The shards get their names when the last one is complete; an error or an interruption leaves none.

    Args:
        samples: (key, image_bytes, extension, captions, extra), as in `RawSample`.
        out_dir: made if it is missing.
        prefix: letters, digits, "-", "_" and ".".
        samples_per_shard: of all shards but the last.
        overwrite: replace the PREFIX-*.tar that are there.

    Returns:
        The paths, in order.

    Raises:
        ValueError: no samples, a key that comes twice, shards that are there already, or a wrong argument.
        OSError: the disk is full, for example.
    """
    if not re.fullmatch(r"\w[\w.-]*", prefix):
        raise ValueError(f"prefix {prefix!r}: expected letters, digits, '-', '_' and '.'")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    old = _shards_there(out_dir, prefix)
    if old and not overwrite:
        raise ValueError(_already_there(old))
    out_dir.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=out_dir))  # readers skip hidden folders
    try:
        made = _write_all(samples, making, prefix, samples_per_shard)
        for shard in old:
            shard.unlink()
        return [path.rename(out_dir / path.name) for path in made]
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _shards_there(out_dir: Path, prefix: str) -> list[Path]:
    name = re.compile(re.escape(prefix) + r"-\d{6,}\.tar")
    return sorted(path for path in out_dir.glob("*.tar") if name.fullmatch(path.name))


def _already_there(shards: Sequence[Path]) -> str:
    return f"{shards[0]} is there already: write to another folder, or delete the shards of that name first"


def _write_all(
    samples: Iterable[_SampleTuple],
    folder: Path,
    prefix: str,
    samples_per_shard: int,
) -> list[Path]:
    """Write complete shards into a folder and return their paths."""
    from webdataset import ShardWriter  # seconds of import that only writing needs

    made: list[Path] = []
    files: list[IO[bytes]] = []

    def open_shard(number: str) -> IO[bytes]:
        made.append(folder / f"{prefix}-{number}.tar")
        files.append(made[-1].open("wb"))
        return files[-1]

    def close_shard(number: str) -> None:
        file = files.pop()
        file.flush()
        os.fsync(file.fileno())
        file.close()

    keys: set[str] = set()
    writer = None
    try:
        for sample in map(RawSample._make, samples):
            key = safe_key(sample.key)
            if key in keys:
                raise ValueError(f"two samples have the key {key!r}: expected different keys")
            keys.add(key)
            record = _record(sample, key)
            if writer is None:  # it opens its first shard at once
                writer = ShardWriter(
                    "%06d",
                    maxcount=samples_per_shard,
                    maxsize=float("inf"),
                    opener=open_shard,  # its own would run a name such as "pipe:…" in a shell
                    post=close_shard,
                    verbose=0,
                    encoder=False,
                    mtime=0,
                    user="",
                    group="",
                    mode=0o644,
                )
            writer.write(record)
        if writer is None:
            raise ValueError("there are no samples to write")
        writer.close()
    except BaseException:
        # Its stream would be written to when it is collected, after the file is closed. A full disk fails again.
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.finish()
        raise
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                file.close()
    return made


# ------------------------------------------------------------------------------------------------------ sources


class _SkippedError(Exception):
    """A sample that is left out; the message is the reason, as the report counts it."""


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A picture and its captions as a source lists them, not yet opened."""

    name: str
    """Its path within the folder of pictures, or what to call it in the report."""
    path: Path | None = None
    """The file; None if it is skipped."""
    captions: tuple[str, ...] = ()
    """As they are in the source."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """For KEY.json."""
    skip: str | None = None
    """Why it is skipped, if that is known already."""


def _list_folder(folder: Path) -> list[_Candidate]:
    """Return the pictures of a folder and all below it, with the captions in the .txt files beside them."""
    candidates: list[_Candidate] = []
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders):
            linked = Path(parent, name)
            if linked.is_symlink():
                candidates.append(_Candidate(name=str(linked.relative_to(folder)), skip="link to a folder"))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or Path(name).suffix.lower() not in PICTURE_EXTENSIONS:
                continue
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            try:
                located = _locate(relative, [folder])
                captions = _captions_beside(path, folder)
            except _SkippedError as skip:
                candidates.append(_Candidate(name=relative, skip=str(skip)))
            else:
                candidates.append(_Candidate(name=relative, path=located, captions=captions))
    if not candidates:
        shards = sorted(folder.rglob("*.tar"))
        hint = f"; {shards[0].name} looks like a shard: shards are used as they are" if shards else ""
        raise ValueError(f"no pictures in the folder {folder}: expected *.jpg, *.png, … with *.txt beside them{hint}")
    return candidates


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
    """Return the regular file of that name in the first of the folders that has it; none outside them."""
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


def _from_rows(rows: Iterable[_Row], roots: Sequence[Path]) -> list[_Candidate]:
    """Return a candidate per picture; the captions of rows about the same picture are put together.

    Args:
        rows: the table; an image that is no text, or blank, is a malformed row.
        roots: where pictures may be.
    """
    candidates: dict[str, _Candidate] = {}
    for row_name, image, caption, extra in rows:
        if not isinstance(image, str) or not image.strip():
            candidates[f"\0{row_name}"] = _Candidate(name=row_name, skip="malformed row")
            continue
        image = image.strip()
        found = caption if isinstance(caption, list) else [caption]
        captions = tuple(text for text in found if isinstance(text, str))
        known = candidates.get(image)
        if known is not None:
            captions = tuple(dict.fromkeys((*known.captions, *captions)))
            candidates[image] = _Candidate(
                name=known.name, path=known.path, captions=captions, extra=known.extra, skip=known.skip
            )
        elif re.match(r"[a-z][a-z0-9+.-]+://", image, re.IGNORECASE):
            candidates[image] = _Candidate(name=image, skip="URL, not a file: download it first")
        else:
            try:
                path = _locate(image, roots)
            except _SkippedError as skip:
                candidates[image] = _Candidate(name=image, skip=str(skip))
            else:
                name = _name_within(image, roots)
                candidates[image] = _Candidate(name=name, path=path, captions=captions, extra=extra)
    return list(candidates.values())


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
    limit = csv.field_size_limit(_LARGEST_FIELD)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        image, caption = _columns(path, list(reader.fieldnames or ()))
        for row in reader:
            yield f"line {reader.line_num}", row[image], row[caption], {}
    except csv.Error as error:
        raise ValueError(f"{path} is not a readable {delimiter!r}-separated table: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path, records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any, Any, Mapping[str, Any]]]:
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


def _list_json(path: Path, roots: list[Path], images: Path | None) -> list[_Candidate]:
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


def _list_source(source: Path, images: Path | None) -> list[_Candidate]:
    """Return what a source lists, in its order."""
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


# ---------------------------------------------------------------------------------------------- source to shards


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What became of a source."""

    source: str
    """The folder or file."""
    shards: tuple[Path, ...]
    """What was written, in order."""
    n_samples: int
    """Pictures written."""
    n_captions: int
    """Captions written."""
    skipped: Mapping[str, int]
    """Pictures left out, by reason, the most frequent first."""
    captions_left_out: Mapping[str, int]
    """Captions left out of the pictures that were written, by reason."""
    examples: Mapping[str, tuple[str, ...]]
    """The first few names for each reason."""

    @property
    def n_skipped(self) -> int:
        """Pictures left out."""
        return sum(self.skipped.values())

    def table(self) -> str:
        """Return the report as lines of text."""
        note = f"pictures, {self.n_captions:,} captions, {len(self.shards):,} shards"
        rows = [("written", self.n_samples, note), ("skipped", self.n_skipped, "pictures")]
        for reason, count in self.skipped.items():
            more = ", …" if count > len(self.examples[reason]) else ""
            names = " ".join(", ".join(self.examples[reason]).split())
            rows.append((f"  {reason}", count, names + more))
        if self.captions_left_out:
            note = "captions of pictures that were written"
            rows.append(("left out", sum(self.captions_left_out.values()), note))
            rows += [(f"  {reason}", count, "") for reason, count in self.captions_left_out.items()]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:<{width}}  {count:>9,}  {note}".rstrip() for name, count, note in rows)


class _Tally:
    """Counts while shards are being written."""

    def __init__(self) -> None:
        self.n_samples = 0
        self.n_captions = 0
        self.skipped: Counter[str] = Counter()
        self.captions_left_out: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def skip(self, reason: str, name: str) -> None:
        self.skipped[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < _NAMED_IN_REPORT:
            names.append(name.encode("utf-8", "replace").decode())

    def report(self, source: Path, shards: Sequence[Path]) -> ShardReport:
        return ShardReport(
            source=str(source),
            shards=tuple(shards),
            n_samples=self.n_samples,
            n_captions=self.n_captions,
            skipped=dict(self.skipped.most_common()),
            captions_left_out=dict(self.captions_left_out.most_common()),
            examples={reason: tuple(names) for reason, names in self.examples.items()},
        )


def _stored_extension(data: bytes) -> str | None:
    """Return jpg, png or webp from the first bytes, whatever the file is called; None for other formats."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _refusal(message: str) -> str:
    """Return the reason for the report from what `open_image` says."""
    for size in ("small", "large"):
        if f"is too {size}" in message:
            return f"picture too {size}"
    return "corrupt image"


class _Inspected(NamedTuple):
    """What became of a picture."""

    sample: RawSample | None
    """What to write; None if it is left out."""
    reason: str
    """Why it is left out."""
    captions_left_out: Counter[str]
    """How many of its captions are left out, by reason, if the picture is kept."""


def _left_out(reason: str) -> _Inspected:
    return _Inspected(None, reason, Counter())


def _inspect(candidate: _Candidate, keep: ShardFilter, check: bool) -> _Inspected:
    """Read, check and where needed re-encode a picture."""
    if candidate.skip is not None:
        return _left_out(candidate.skip)
    assert candidate.path is not None
    captions, captions_left_out = keep.kept(candidate.captions)
    if not captions and keep.need_captions:
        # of several captions, the reason of the one that came nearest to being kept
        reasons = [reason for reason in REFUSALS if captions_left_out[reason]]
        return _left_out(reasons[-1] if reasons else "no caption")
    try:
        data = candidate.path.read_bytes()
    except OSError:
        return _left_out("unreadable file")
    extension = _stored_extension(data)
    if check or extension is None:
        try:
            image = open_image(data, candidate.name)
        except (ValueError, OSError) as error:
            return _left_out(_refusal(str(error).removeprefix(candidate.name)) if data else "empty image file")
        if min(image.size) < keep.min_side:
            return _left_out("picture too small")
        if keep.max_aspect_ratio is not None and max(image.size) > keep.max_aspect_ratio * min(image.size):
            return _left_out("picture too elongated")
        if extension is None:
            png = io.BytesIO()
            image.save(png, format="PNG")
            data, extension = png.getvalue(), "png"
    del captions_left_out[EMPTY]  # blank lines are nobody's loss
    key = candidate.name[: len(candidate.name) - len(Path(candidate.name).suffix)]
    sample = RawSample(key, data, extension, captions, {"source": candidate.name, **candidate.extra})
    return _Inspected(sample, "", captions_left_out)


def _inspect_all(
    candidates: Sequence[_Candidate],
    keep: ShardFilter,
    check: bool,
    tally: _Tally,
    progress: Callable[[int, int], None] | None,
) -> Iterator[RawSample]:
    """Yield the pictures to write, in order, several being decoded at once; counts the others."""
    n_threads = min(8, os.cpu_count() or 1)
    keys: set[str] = set()
    with ThreadPoolExecutor(n_threads) as pool:
        for first in range(0, len(candidates), 4 * n_threads):
            chunk = candidates[first : first + 4 * n_threads]
            for candidate, found in zip(chunk, pool.map(lambda c: _inspect(c, keep, check), chunk), strict=True):
                if found.sample is None:
                    tally.skip(found.reason, candidate.name)
                elif (key := safe_key(found.sample.key)) in keys:
                    tally.skip("duplicate key", candidate.name)
                else:
                    keys.add(key)
                    tally.n_samples += 1
                    tally.n_captions += len(found.sample.captions)
                    tally.captions_left_out.update(found.captions_left_out)
                    yield found.sample
            if progress is not None:
                progress(first + len(chunk), len(candidates))
    if tally.n_samples == 0:
        reasons = "; ".join(
            f"{count:,} × {reason} ({', '.join(tally.examples[reason])})"
            for reason, count in tally.skipped.most_common()
        )
        nothing = reasons or "the source lists none"
        raise ValueError(f"none of {len(candidates):,} pictures can be used: {nothing}")


def make_shards(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    samples_per_shard: int = 1000,
    prefix: str | None = None,
    keep: ShardFilter | None = None,
    check: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ShardReport:
    """Make shards of a folder of pictures, a CSV, TSV or JSONL table, or COCO's caption annotations.

    Pictures of a table are looked for in `images`, or else beside the table and in the folder "images" beside
    it; for COCO also in the folder the annotations are called after (captions_val2017.json: ../val2017).

    Args:
        source: the folder or file.
        out: folder for PREFIX-000000.tar, … and report.json; made if it is missing.
        images: folder of the pictures a table names.
        samples_per_shard: of all shards but the last.
        prefix: of the shards' names; None takes the source's name.
        keep: which pictures; None keeps all that can be decoded and have a caption.
        check: decode every picture; without, those that cannot be decoded are found in training only.
        overwrite: replace shards of the same prefix that are there.
        progress: called with (pictures done, pictures).

    Returns:
        What was written and what was skipped, by reason; also in OUT/report.json.

    Raises:
        FileNotFoundError: no such source or folder of pictures.
        ValueError: the source cannot be understood, nothing in it can be used, or there are such shards
            already.
    """
    keep = keep or ShardFilter()
    if not check and (keep.min_side > 1 or keep.max_aspect_ratio is not None):
        raise ValueError("min_side and max_aspect_ratio need check: without it no picture is opened")
    prefix = prefix if prefix is not None else safe_key(source.absolute().stem).lstrip("-")
    there = _shards_there(out, prefix)
    if there and not overwrite:  # before hours of work
        raise ValueError(_already_there(there))
    tally = _Tally()
    candidates = _list_source(source, images)
    samples = _inspect_all(candidates, keep, check, tally, progress)
    shards = write_shards(samples, out, prefix, samples_per_shard, overwrite=overwrite)
    report = tally.report(source, shards)
    _write_report(report, out)
    if report.n_skipped:
        logger.warning("%s: %d of %d pictures were skipped", source, report.n_skipped, len(candidates))
    return report


def _write_report(report: ShardReport, out: Path) -> None:
    """Write OUT/report.json; it names shards with their checksums instead of paths."""
    shards = []
    for path in report.shards:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    text = json.dumps({**asdict(report), "shards": shards}, ensure_ascii=False, indent=2)
    partial = out / ".report.json.part"
    partial.write_text(text + "\n", "utf-8")
    partial.replace(out / "report.json")
