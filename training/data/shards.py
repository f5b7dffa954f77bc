"""Making shards: captioned pictures in; tar files in WebDataset's format and a report out.

1. `list_source` (`sources/listing.py`) lists the pictures.
2. Every picture is read, decoded once to see that it can be, and kept as the bytes it was when they are JPEG,
   PNG or WebP.
3. `write_shards` writes KEY.jpg (or .png, .webp), KEY.txt (one caption a line) and KEY.json in the order of
   the source: the same source gives the same bytes.

A key never leads out of a folder: see `safe_key`.
"""

import hashlib
import io
import itertools
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
from pathlib import Path
from typing import Any, NamedTuple

from dalle.output.text import counted
from dvae.images import PictureError, open_image
from storage.tar import MAX_PICTURE_BYTES, write_tar
from training.data.filters import EMPTY, REFUSALS, ShardFilter
from training.data.shards_report import ShardReport, Tally, listed, write_report
from training.data.sources.listing import list_source
from training.data.sources.pictures import Listing, SourcePicture

logger = logging.getLogger(__name__)

MAX_SAMPLES = 1_000_000_000
"""Of a shard, at most."""
_STORED_EXTENSIONS = ("jpg", "png", "webp")
_MAX_KEY_BYTES = 90  # a USTAR name has 100
NOT_TEXT = "caption is no text"
_REFUSALS = {
    "is empty": "empty image file",
    "is too small": "picture too small",
    "is too large": "picture too large",
}
"""Problems of pictures as the report calls them; all others are "corrupt image"."""

_SampleTuple = tuple[str, bytes, str, Sequence[str], Mapping[str, Any]]  # a RawSample's fields


class RawSample(NamedTuple):
    """One picture with its captions, as a shard holds it."""

    key: str
    """Its name; `safe_key` is applied to it."""
    image_bytes: bytes
    """The encoded picture."""
    extension: str
    """Format of the bytes: jpg, png or webp."""
    captions: Sequence[str]
    """Line breaks and repeated spaces in them become one space; none makes a sample without KEY.txt."""
    extra: Mapping[str, Any]
    """Content of KEY.json besides "key" and "captions"."""


# ------------------------------------------------------------------------------------------------------ writing


def safe_key(name: str) -> str:
    """Return a key that is the name where possible: word characters, "-" and single "/" between them.

    Everything else, dots included because a dot ends a key, becomes "_"; ".." and leading slashes vanish. A
    name that was changed gets eight hex digits of its hash, so that different names stay different.
    """
    name = unicodedata.normalize("NFC", name)
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..")]
    clean = "/".join(re.sub(r"[^\w-]", "_", part) for part in parts)
    if clean and clean == name and len(clean.encode()) <= _MAX_KEY_BYTES:
        return clean
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    short = clean.encode()[: _MAX_KEY_BYTES - 9].decode(errors="ignore").strip("/")
    return f"{short}-{digest}" if short else digest


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
        OSError: the disk is full, for example; names the folder.
    """
    if not re.fullmatch(r"\w[\w.-]*", prefix):
        raise ValueError(f"prefix {prefix!r}: expected letters, digits, '-', '_' and '.'")
    _require_size(samples_per_shard)
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
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(out_dir)) from error  # its own name is of no use
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _require_size(samples_per_shard: int) -> None:
    if not 1 <= samples_per_shard <= MAX_SAMPLES:
        raise ValueError(f"samples_per_shard must be 1 to {MAX_SAMPLES:,}, got {samples_per_shard:,}")


def _shards_there(out_dir: Path, prefix: str) -> list[Path]:
    name = re.compile(re.escape(prefix) + r"-\d{6,}\.tar")
    return sorted(path for path in out_dir.glob("*.tar") if name.fullmatch(path.name))


def _already_there(shards: Sequence[Path]) -> str:
    return f"{shards[0]} is there already: write to another folder, or delete the shards of that name first"


def _write_all(samples: Iterable[_SampleTuple], folder: Path, prefix: str, samples_per_shard: int) -> list[Path]:
    """Write complete shards into a folder and return their paths."""
    made: list[Path] = []
    contents = _contents(samples)
    for first in contents:  # of each shard
        of_one_shard = itertools.chain([first], itertools.islice(contents, samples_per_shard - 1))
        made.append(folder / f"{prefix}-{len(made):06}.tar")
        write_tar(made[-1], itertools.chain.from_iterable(of_one_shard))
    if not made:
        raise ValueError("there are no samples to write")
    return made


def _contents(samples: Iterable[_SampleTuple]) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the members of each sample, names and bytes, in the order of their names."""
    keys: set[str] = set()
    for sample in map(RawSample._make, samples):
        key = safe_key(sample.key)
        if key in keys:
            raise ValueError(f"two samples have the key {key!r}: expected different keys")
        keys.add(key)
        if sample.extension not in _STORED_EXTENSIONS:
            known = ", ".join(_STORED_EXTENSIONS)
            raise ValueError(f"{key}: extension {sample.extension!r}, expected one of {known}")
        captions = [" ".join(caption.replace("\0", " ").split()) for caption in sample.captions]
        about = {**sample.extra, "key": key, "captions": captions}
        fields = {
            sample.extension: sample.image_bytes,
            "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace"),
        }
        if captions:
            fields["txt"] = "\n".join(captions).encode("utf-8", "replace")
        yield [(f"{key}.{field}", fields[field]) for field in sorted(fields)]


def _stored_extension(data: bytes) -> str | None:
    """Return jpg, png or webp from the first bytes, whatever the file is called; None for other formats."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


class _Inspected(NamedTuple):
    """A picture after it was looked at."""

    sample: RawSample | None
    """The sample to write; None if it is left out."""
    reason: str
    """Reason to leave it out; empty if it is kept."""
    captions_left_out: Counter[str]
    """Number of its captions left out, by reason, if the picture is kept."""


def _left_out(reason: str) -> _Inspected:
    return _Inspected(None, reason, Counter())


def _inspect(picture: SourcePicture, keep: ShardFilter) -> _Inspected:
    """Read, check and where needed re-encode a picture."""
    if picture.skip is not None:
        return _left_out(picture.skip)
    assert picture.path is not None
    captions, captions_left_out = keep.kept(picture.captions)
    if not captions and keep.need_captions:
        # of several captions, the reason of the one that came nearest to being kept
        reasons = [reason for reason in REFUSALS if captions_left_out[reason]]
        return _left_out(reasons[-1] if reasons else NOT_TEXT if picture.n_not_text else "no caption")
    try:
        if picture.path.stat().st_size > MAX_PICTURE_BYTES:
            return _left_out("picture too large")
        data = picture.path.read_bytes()
    except OSError:
        return _left_out("unreadable file")
    extension = _stored_extension(data)
    if keep.check or extension is None:
        try:
            image = open_image(data, picture.name)
        except (PictureError, OSError) as error:
            return _left_out(_REFUSALS.get(getattr(error, "problem", ""), "corrupt image"))
        if min(image.size) < keep.min_side:
            return _left_out("picture too small")
        if keep.max_aspect_ratio is not None and max(image.size) > keep.max_aspect_ratio * min(image.size):
            return _left_out("picture too elongated")
        if extension is None:
            png = io.BytesIO()
            image.save(png, format="PNG")
            data, extension = png.getvalue(), "png"
    del captions_left_out[EMPTY]  # blank lines are nobody's loss
    captions_left_out += Counter({NOT_TEXT: picture.n_not_text})
    key = picture.name[: len(picture.name) - len(Path(picture.name).suffix)]
    sample = RawSample(key, data, extension, captions, {"source": picture.name, **picture.extra})
    return _Inspected(sample, "", captions_left_out)


def _inspect_all(
    source: Path,
    listing: Listing,
    keep: ShardFilter,
    tally: Tally,
    progress: Callable[[int, int], None] | None,
) -> Iterator[RawSample]:
    """Yield the pictures to write, in order, several being decoded at once; counts the others."""
    pictures = listing.pictures
    n_threads = min(8, os.cpu_count() or 1)
    keys: set[str] = set()
    with ThreadPoolExecutor(n_threads) as pool:
        for first in range(0, len(pictures), 4 * n_threads):
            chunk = pictures[first : first + 4 * n_threads]
            for picture, found in zip(chunk, pool.map(lambda one: _inspect(one, keep), chunk), strict=True):
                if found.sample is None:
                    tally.skip(found.reason, picture.name)
                elif (key := safe_key(found.sample.key)) in keys:
                    tally.skip("duplicate key", picture.name)
                else:
                    keys.add(key)
                    tally.n_samples += 1
                    tally.n_captions += len(found.sample.captions)
                    tally.captions_left_out.update(found.captions_left_out)
                    yield found.sample
            if progress is not None:
                progress(first + len(chunk), len(pictures))
    if tally.n_samples == 0:
        reasons = "; ".join(
            f"{count:,} × {reason} ({', '.join(tally.examples[reason])})"
            for reason, count in tally.skipped.most_common()
        )
        tables = [str(path) for path in listing.tables if tally.skipped["no caption"]]
        hint = f"; {listed(tables)} may hold the captions: give the table itself" if tables else ""
        raise ValueError(f"none of {counted(len(pictures), 'picture')} in {source} can be used: {reasons}{hint}")


def make_shards(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    samples_per_shard: int = 1000,
    keep: ShardFilter | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ShardReport:
    """Make shards of a folder of pictures, a CSV, TSV or JSONL table, or COCO's caption annotations.

    Pictures of a table are looked for in `images`, or else beside the table and in the folder "images" beside
    it; for COCO also in the folder the annotations are called after (captions_val2017.json: ../val2017).

    Args:
        source: the folder or file.
        out: folder for PREFIX-000000.tar, … and report.json, PREFIX being the source's name; made if it is missing.
            Where report.json is that of another source, this one's is PREFIX-report.json.
        images: folder of the pictures a table names.
        samples_per_shard: of all shards but the last.
        keep: selects pictures; None keeps all that can be decoded and have a caption.
        overwrite: replace shards of the same prefix that are there.
        follow_links: whether links may lead out of the folder of pictures.
        progress: called with (pictures done, pictures).

    Returns:
        The shards, and the numbers of pictures written and skipped, by reason; also in the report's file.

    Raises:
        FileNotFoundError: no such source or folder of pictures.
        ValueError: the source cannot be understood, nothing in it can be used, or there are such shards
            already.
    """
    _require_size(samples_per_shard)  # before hours of work
    prefix = safe_key(source.absolute().stem).lstrip("-").replace("/", "_")
    there = _shards_there(out, prefix)
    if there and not overwrite:
        raise ValueError(_already_there(there))
    tally = Tally()
    listing = list_source(source, images, follow_links=follow_links)
    samples = _inspect_all(source, listing, keep or ShardFilter(), tally, progress)
    shards = write_shards(samples, out, prefix, samples_per_shard, overwrite=overwrite)
    report = tally.report(source, listing, shards)
    write_report(report, out, prefix)
    if report.n_skipped:
        logger.warning("%s: skipped %d of %s", source, report.n_skipped, counted(len(listing.pictures), "picture"))
    return report
