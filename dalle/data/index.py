"""Samples of one shard: the places of their pictures and captions, found in one pass over a tar's headers.

The format is WebDataset's (https://github.com/webdataset/webdataset): members of a tar that share a key (the
path up to the first dot of the base name) are one sample. webdataset's own reader is avoided on purpose: it
runs `pipe:` URLs in a shell, unpickles members by their extension, drops the rest of a damaged shard without a
word, and gives each worker whole shards, so that training would depend on the number of workers. Here headers
are read once, and nothing is ever extracted or unpickled.

Shards that `dalle-train encode` made hold image tokens in place of pictures: see `image_tokens.py`.
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dalle.data.endings import READ_ENDINGS
from dalle.data.image_tokens import TOKENS_FIELD, Description, description_in
from storage.tar import Member, whole_members

IMAGE, TEXT, JSON = 0, 1, 2
"""Kinds of members, in the order of places and checksums: a picture or its tokens, a caption, a JSON member."""
IMAGE_FIELDS = (*sorted(ending[1:] for ending in READ_ENDINGS), "img")
TEXT_FIELDS = ("txt", "cap", "text", "caption")
MAX_TEXT_BYTES = 16 << 20
"""Larger members are not read as captions."""
_CAPTION_KINDS = dict.fromkeys(TEXT_FIELDS, TEXT) | {"json": JSON}
_PICTURE_KINDS = dict.fromkeys(IMAGE_FIELDS, IMAGE) | _CAPTION_KINDS
_TOKEN_KINDS = {TOKENS_FIELD: IMAGE} | _CAPTION_KINDS

_Row = list[Member | None]  # the members of a sample, by kind


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Places of the n samples of one shard."""

    path: Path
    """The tar file."""
    n_bytes: int
    """Its size."""
    tokens: Description | None
    """Description of its image tokens; None for a shard of pictures."""
    keys: tuple[str, ...]
    """One per sample."""
    image_names: tuple[str, ...]
    """Member names of the pictures, or of their tokens; "" where a sample has none."""
    places: NDArray[np.int64]
    """(n, 3, 2): offset and size in bytes of each kind of member; size 0 for a member that is missing."""
    n_ignored: int
    """Links, devices, sparse members and names that lead out of a folder: never looked at."""
    n_duplicates: int
    """Members whose sample had such a member already: the first one counts."""
    damage: str | None
    """Damage of the file after these samples; None if it is whole."""
    ignored_names: tuple[str, ...] = ()
    """Names of the ignored members; empty for an index out of a manifest."""
    has_caption: NDArray[np.bool_] | None = None
    """(n,) whether a sample has a caption that can be read and is not blank; None before captions are read."""
    checksums: NDArray[np.uint64] | None = None
    """(n, 3) of each kind of member; None without a manifest."""
    lost: NDArray[np.bool_] | None = None
    """(n,) samples that a manifest knows and that are not there any more; None without a manifest."""

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """(n,) whether a sample has a picture, or image tokens."""
        return self.places[:, IMAGE, 1] > 0

    @property
    def caption_kind(self) -> NDArray[np.int64]:
        """(n,) the kind of member that a sample's captions are in: TEXT, or JSON if it has no text."""
        return np.where(self.places[:, TEXT, 1] > 0, TEXT, JSON)

    def chosen(self, rows: NDArray[np.int64]) -> "ShardIndex":
        """Return the index of some of the samples."""
        columns = {name: getattr(self, name) for name in ("places", "has_caption", "checksums", "lost")}
        return dataclasses.replace(
            self,
            keys=tuple(self.keys[i] for i in rows),
            image_names=tuple(self.image_names[i] for i in rows),
            **{name: column[rows] for name, column in columns.items() if column is not None},
        )


def checksum(data: bytes) -> int:
    """Return the first 64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def index_shard(path: Path) -> ShardIndex:
    """Read the headers of a shard: WebDataset's and img2dataset's conventions.

    A picture is KEY.jpg, .jpeg, .png, .webp, .bmp, .gif or .img; captions are KEY.txt, .cap, .text or
    .caption, one a line, or the fields "caption" or "captions" of KEY.json. Members of a sample need not
    stand together. In a shard of image tokens, KEY.tokens is in place of a picture.

    Args:
        path: a tar file, not compressed.

    Returns:
        The whole samples; `damage` tells whether some are missing after them.

    Raises:
        DamagedTarError (a ValueError): empty, or not a tar.
        ValueError: compressed, or its description of image tokens is damaged or of another version.
    """
    members, damage = whole_members(path)
    tokens = description_in(path, members[0] if members else None)
    kinds = _PICTURE_KINDS if tokens is None else _TOKEN_KINDS
    samples: dict[str, _Row] = {}
    ignored: list[str] = []
    n_duplicates = 0
    for member in members:
        if not member.is_safe:
            ignored += [] if member.is_folder else [member.name]
            continue
        key_and_field = _key_and_field(member.name)
        if key_and_field is None:
            continue
        key, field = key_and_field
        row = samples.setdefault(key, [None, None, None])
        kind = kinds.get(field)
        if kind is None:
            continue
        n_duplicates += row[kind] is not None
        row[kind] = row[kind] or member
    if damage is not None:
        _drop_cut_sample(samples)
    rows = list(samples.values())
    places = [[(m.offset, m.size) if m else (0, 0) for m in row] for row in rows]
    return ShardIndex(
        path=path,
        n_bytes=path.stat().st_size,
        tokens=tokens,
        # Names that are not UTF-8 come with lone surrogates, which no log and no JSON can hold.
        keys=tuple(key.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for key in samples),
        image_names=tuple(image.name if (image := row[IMAGE]) else "" for row in rows),
        places=np.array(places, dtype=np.int64).reshape(-1, 3, 2),
        n_ignored=len(ignored),
        n_duplicates=n_duplicates,
        damage=damage,
        ignored_names=tuple(ignored),
    )


def _key_and_field(name: str) -> tuple[str, str] | None:
    """Return ("a.b/c", "d.jpg") for "a.b/c.d.jpg"; None without key or field, as in macOS's "._c.jpg"."""
    match = re.fullmatch(r"(?:\./)*((?:.*/)?[^./][^./]*)\.([^/]+)", name, re.DOTALL)
    return None if match is None else (match.group(1), match.group(2).lower())


def _drop_cut_sample(samples: dict[str, _Row]) -> None:
    """Remove the last sample before the damage unless it has every kind of member that the first one has."""
    if samples:
        first, last = next(iter(samples)), next(reversed(samples))
        kinds_first, kinds_last = ([member is not None for member in samples[key]] for key in (first, last))
        if first == last or any(a and not b for a, b in zip(kinds_first, kinds_last, strict=True)):
            del samples[last]


def with_captions(index: ShardIndex) -> ShardIndex:
    """Read the captions of all samples that have a picture, and return the index with `has_caption`."""
    has_caption = np.zeros(len(index.keys), dtype=bool)
    kinds = index.caption_kind
    with index.path.open("rb", buffering=0) as file:
        for i in np.flatnonzero(index.has_image):
            offset, size = index.places[i, kinds[i]].tolist()
            if 0 < size <= MAX_TEXT_BYTES:
                try:
                    text = os.pread(file.fileno(), size, offset)
                    has_caption[i] = bool(captions_of(text, is_json=kinds[i] == JSON, source=index.keys[i]))
                except ValueError:
                    continue
    return dataclasses.replace(index, has_caption=has_caption)


def captions_of(text: bytes, *, is_json: bool, source: str) -> tuple[str, ...]:
    """Return the captions in a text member (one a line) or a JSON member; blank ones are dropped.

    Raises:
        ValueError: the member cannot be read; names the source.
    """
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
