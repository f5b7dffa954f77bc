"""Which samples a shard has: names to paths, and one pass over a tar's headers.

1. `expand_shards`: names, folders, globs and brace ranges to paths of tar files.
2. `index_shard`: one pass over a tar's headers to the place of every picture and caption in it.
3. `captions_of`: the captions in a member's bytes.

The format is WebDataset's (https://github.com/webdataset/webdataset): members of a tar that share a key (the
path up to the first dot of the base name) are one sample. webdataset's own reader is avoided on purpose: it
runs `pipe:` URLs in a shell, unpickles members by their extension, drops the rest of a shard whose bytes are
damaged without a word, and gives each worker whole shards, so that what is trained on depends on the number
of workers. Here headers are read once with `tarfile`, and nothing is ever extracted or unpickled.

Shards that `dalle-train encode` made hold image tokens in place of pictures: see `dalle/data/image_tokens.py`.
"""

import dataclasses
import glob
import itertools
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dalle.data.image_tokens import TOKENS_FIELD, Description, description_in
from dvae.images import PICTURE_EXTENSIONS
from storage.tar import DamagedTarError, place_is_safe, whole_members

logger = logging.getLogger(__name__)

IMAGE_FIELDS = (*sorted(extension[1:] for extension in PICTURE_EXTENSIONS), "img")
TEXT_FIELDS = ("txt", "cap", "text", "caption")
LARGEST_TEXT_BYTES = 16 << 20
"""Larger members are not read as captions."""
_CAPTION_KINDS = dict.fromkeys(TEXT_FIELDS, 1) | {"json": 2}
_PICTURE_KINDS = dict.fromkeys(IMAGE_FIELDS, 0) | _CAPTION_KINDS
_TOKEN_KINDS = {TOKENS_FIELD: 0} | _CAPTION_KINDS
_LARGEST_BRACE_RANGE = 1_000_000


class DamagedShardError(ValueError):
    """A shard that cannot be read to its end; the message says which and what to do."""


# --------------------------------------------------------------------------------------------- names to paths


def _expand_braces(pattern: str) -> list[str]:
    """Return the names that `{000..009}` and `{a,b}` stand for; a pattern without braces is its own name."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, listed = match.groups()
    if listed is not None:
        middles: Iterable[str] = listed.split(",")
    else:
        count = int(last) - int(first) + 1
        if not 1 <= count <= _LARGEST_BRACE_RANGE:
            raise ValueError(
                f"the range {match.group()} of {pattern} has {max(count, 0):,} members, "
                f"expected 1 to {_LARGEST_BRACE_RANGE:,}"
            )
        middles = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], _expand_braces(pattern[match.end() :])
    return [before + middle + rest for middle in middles for rest in after]


def _shards_in(folder: Path) -> list[Path]:
    """Return every tar below a folder, sorted; hidden names are left out: they are being written."""
    files = [
        path for path in sorted(folder.rglob("*")) if not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    shards = [path for path in files if path.suffix == ".tar" and path.is_file()]
    if not shards:
        compressed = [path.name for path in files if path.name.endswith((".tar.gz", ".tgz"))]
        hint = (
            f"; {compressed[0]} is compressed: gunzip it first"
            if compressed
            else "; make some with `dalle-train shards`"
        )
        raise FileNotFoundError(f"no shards in the folder {folder}: expected *.tar in it or below it{hint}")
    return shards


def _expand_name(name: str, pattern: str, skip_missing: bool) -> list[Path]:
    try:
        return _shards_called(name, pattern)
    except FileNotFoundError:
        if skip_missing:
            return []
        raise


def _shards_called(name: str, pattern: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return _shards_in(path)
    if path.exists():
        return [path]
    found = [Path(match) for match in sorted(glob.glob(name, recursive=True))] if glob.has_magic(name) else []
    if not found:
        asked = "" if name == pattern else f" (one of {pattern})"
        raise FileNotFoundError(
            f"no shard {name}{asked}: expected a .tar file, a folder of them, or a pattern that matches some"
        )
    return [shard for match in found for shard in (_shards_in(match) if match.is_dir() else [match])]


def expand_shards(patterns: Sequence[str | Path], *, skip_missing: bool = False) -> list[Path]:
    """Return the tar files that names, folders (searched recursively), globs and brace ranges stand for.

    Args:
        patterns: e.g. `["pictures/", "more/train-{000000..000009}.tar", "other/*.tar"]`.
        skip_missing: leave out what is not there, for callers that know from a manifest what should be.

    Returns:
        Existing paths in the order given (sorted within a folder or a glob), each once.

    Raises:
        FileNotFoundError: a pattern matches nothing, or a folder holds no shards.
        ValueError: nothing was given; a URL, a pipe or a compressed tar.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    if not patterns:
        raise ValueError(
            "no shards were given: expected .tar files, folders of them, or patterns such as train-{000000..000009}.tar"
        )
    shards: dict[Path, Path] = {}
    for pattern in map(str, patterns):
        # One slash after the colon is enough: Path("http://x") has lost the other.
        if re.match(r"\s*(pipe:|[a-z][a-z0-9+.-]+:/)", pattern, re.IGNORECASE):
            raise ValueError(
                f"{pattern!r} is a URL or a command: shards are read from local files only, never downloaded "
                "and never through a shell; download them first"
            )
        names = [pattern] if Path(pattern).exists() else _expand_braces(pattern)
        for shard in itertools.chain.from_iterable(_expand_name(name, pattern, skip_missing) for name in names):
            if shard.name.endswith((".tar.gz", ".tgz")):
                raise ValueError(f"{shard} is compressed: samples are read at random places, so gunzip it first")
            shards.setdefault(shard.resolve(), shard)
    return list(shards.values())


# -------------------------------------------------------------------------------------------------- one shard


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where the samples of one shard are.

    Places are (offset, size) in bytes from the start of the file; size 0 means that there is none.
    """

    path: Path
    """The tar file."""
    n_bytes: int
    """Its size."""
    tokens: Description | None
    """What it says of its image tokens, if it holds those in place of pictures."""
    keys: tuple[str, ...]
    """One per sample, n of them."""
    image_names: tuple[str, ...]
    """Member names of the pictures, or of their tokens; "" where a sample has none."""
    image: NDArray[np.int64]
    """(n, 2) places of the pictures, or of their tokens."""
    text: NDArray[np.int64]
    """(n, 2) places of the captions."""
    json: NDArray[np.int64]
    """(n, 2) places of the JSON members."""
    n_ignored: int
    """Links, devices, sparse members and names that lead out of a folder: never looked at."""
    n_duplicates: int
    """Members whose sample had such a member already: the first one counts."""
    damage: str | None
    """What is wrong with the file after these samples; None if nothing is."""
    checksums: NDArray[np.uint64] | None = None
    """(n, 3) of the picture (or its tokens), the caption and the JSON member, if a manifest knows them."""
    lost: NDArray[np.bool_] | None = None
    """(n,) samples that a manifest knows and that are not there any more; None if all are."""

    @property
    def places(self) -> NDArray[np.int64]:
        """(n, 3, 2) places of pictures, captions and JSON members."""
        return np.stack([self.image, self.text, self.json], axis=1)

    def chosen(self, rows: NDArray[np.int64]) -> "ShardIndex":
        """Return the index of some of the samples."""
        return dataclasses.replace(
            self,
            keys=tuple(self.keys[i] for i in rows),
            image_names=tuple(self.image_names[i] for i in rows),
            image=self.image[rows],
            text=self.text[rows],
            json=self.json[rows],
            checksums=None if self.checksums is None else self.checksums[rows],
            lost=None if self.lost is None else self.lost[rows],
        )


def _key_and_field(name: str) -> tuple[str, str] | None:
    """Return ("a.b/c", "d.jpg") for "a.b/c.d.jpg"; None without key or field, as in macOS's "._c.jpg"."""
    match = re.fullmatch(r"(?:\./)*((?:.*/)?[^./][^./]*)\.([^/]+)", name, re.DOTALL)
    return None if match is None else (match.group(1), match.group(2).lower())


def index_shard(path: Path, *, skip_damaged: bool = False) -> ShardIndex:
    """Read the headers of a shard: WebDataset's and img2dataset's conventions.

    A picture is KEY.jpg, .jpeg, .png, .webp, .bmp, .gif or .img; captions are KEY.txt, .cap, .text or
    .caption, one a line, or the fields "caption" or "captions" of KEY.json. Members of a sample need not
    stand together. In a shard of image tokens, KEY.tokens is in place of a picture.

    Args:
        path: a tar file, not compressed.
        skip_damaged: where a shard is damaged, log a warning and return the whole samples before the damage.

    Raises:
        DamagedShardError (a ValueError): truncated, not a tar, or empty.
        ValueError: compressed, or its description of image tokens is damaged or of another version.
    """
    try:
        members, damage = whole_members(path)
    except DamagedTarError as error:
        raise DamagedShardError(f"{error}; make it again, or pass --skip-damaged-shards to leave it out") from error
    tokens = description_in(path, members[0] if members else None)
    kinds = _PICTURE_KINDS if tokens is None else _TOKEN_KINDS
    samples: dict[str, list[tarfile.TarInfo | None]] = {}
    n_ignored = n_duplicates = 0
    for member in members:
        if not place_is_safe(member):
            n_ignored += not member.isdir()
            continue
        key_and_field = _key_and_field(member.name)
        if key_and_field is None:
            continue
        key, field = key_and_field
        places = samples.setdefault(key, [None, None, None])
        kind = kinds.get(field)
        if kind is None:
            continue
        n_duplicates += places[kind] is not None
        places[kind] = places[kind] or member
    if damage is not None:
        _drop_cut_sample(samples)
        message = f"{path} {damage}: {len(samples):,} whole samples before it"
        if not skip_damaged:
            raise DamagedShardError(f"{message}; make it again, or pass --skip-damaged-shards to use those")
        logger.warning("%s, which are used", message)
    rows = list(samples.values())
    spans = [[(m.offset_data, m.size) if m else (0, 0) for m in row] for row in rows]
    places_N32 = np.array(spans, dtype=np.int64).reshape(-1, 3, 2)
    return ShardIndex(
        path=path,
        n_bytes=path.stat().st_size,
        tokens=tokens,
        # Names that are not UTF-8 come with lone surrogates, which no log and no JSON can hold.
        keys=tuple(key.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for key in samples),
        image_names=tuple(row[0].name if row[0] else "" for row in rows),
        image=places_N32[:, 0],
        text=places_N32[:, 1],
        json=places_N32[:, 2],
        n_ignored=n_ignored,
        n_duplicates=n_duplicates,
        damage=damage,
    )


def _drop_cut_sample(samples: dict[str, list[tarfile.TarInfo | None]]) -> None:
    """Remove the last sample before the damage unless it has every kind of member that the first one has."""
    if samples:
        first, last = next(iter(samples)), next(reversed(samples))
        kinds_first, kinds_last = ([member is not None for member in samples[key]] for key in (first, last))
        if first == last or any(a and not b for a, b in zip(kinds_first, kinds_last, strict=True)):
            del samples[last]


def captions_of(text: bytes, is_json: bool, source: str) -> tuple[str, ...]:
    """Return the captions in a text member (one a line) or a JSON member; blank ones are dropped."""
    if is_json:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}: its JSON cannot be read ({error})") from error
        found = (record.get("captions") or record.get("caption")) if isinstance(record, dict) else None
        lines = [found] if isinstance(found, str) else found if isinstance(found, list) else []
        captions = [" ".join(line.split()) for line in lines if isinstance(line, str)]
    else:
        try:
            captions = [line.strip() for line in text.decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: its caption is not UTF-8 ({error})") from error
    return tuple(caption for caption in captions if caption)
