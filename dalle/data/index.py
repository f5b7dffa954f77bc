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
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dalle.data.captions import MAX_TEXT_BYTES, NO_CAPTION, TOO_LARGE, caption_problem
from dalle.data.endings import CAPTION_ENDINGS, READ_ENDINGS, is_picture, not_read
from dalle.data.image_tokens import TOKENS_FIELD, Description, description_in
from storage.stores.files import file_status, open_file
from storage.tar import Member, whole_members

IMAGE, TEXT, JSON = 0, 1, 2
"""Kinds of members, in the order of places and checksums: a picture or its tokens, a caption, a JSON member."""
NO_PICTURE = "no picture"
_CAPTION_KINDS = {ending[1:]: JSON if ending == ".json" else TEXT for ending in CAPTION_ENDINGS}
_PICTURE_KINDS = dict.fromkeys([*(ending[1:] for ending in READ_ENDINGS), "img"], IMAGE) | _CAPTION_KINDS
_TOKEN_KINDS = {TOKENS_FIELD: IMAGE} | _CAPTION_KINDS

_Row = list[Member | None]  # the members of a sample, by kind


class Texts(Sequence[str]):
    """Texts that lie in one block of bytes and are decoded when one is asked for: no Python object for each.

    Args:
        starts: where each begins in the block.
        ends: where each ends.
        block: their UTF-8; halves of surrogate pairs, of names that are not UTF-8, have three bytes each.
    """

    def __init__(self, starts: NDArray[np.integer[Any]], ends: NDArray[np.integer[Any]], block: memoryview) -> None:
        self._starts, self._ends, self._block = starts, ends, block

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Return some texts in a block of their own."""
        block, ends = joined(texts)
        return cls.by_ends(ends, memoryview(block))

    @classmethod
    def by_ends(cls, ends: NDArray[np.integer[Any]], block: memoryview) -> "Texts":
        """Return the texts of a block without gaps, by their ends."""
        return cls(np.concatenate([np.zeros(1, dtype=ends.dtype), ends[:-1]]), ends, block)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[number] for number in range(*i.indices(len(self)))]
        return str(self._block[self._starts[i] : self._ends[i]], "utf-8", "surrogatepass")

    def chosen(self, rows: NDArray[np.int64]) -> "Texts":
        """Return some of the texts, of the same block."""
        return Texts(self._starts[rows], self._ends[rows], self._block)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Places of the n samples of one shard."""

    path: Path
    """The tar file."""
    n_bytes: int
    """Its size."""
    tokens: Description | None
    """Description of its image tokens; None for a shard of pictures."""
    keys: Sequence[str]
    """One per sample."""
    image_names: Sequence[str]
    """Member names of the pictures, or of their tokens; "" where a sample has none."""
    places: NDArray[np.integer[Any]]
    """(n, 3, 2): offset and size in bytes of each kind of member; size 0 for a member that is missing."""
    n_ignored: int
    """Links, devices, sparse members and names that lead out of a folder: never looked at."""
    n_duplicates: int
    """Members whose sample had such a member already: the first one counts. Among them a.b.jpg beside a.jpg."""
    damage: str | None
    """Damage of the file after these samples; None if it is whole."""
    ignored_names: tuple[str, ...] = ()
    """Names of the ignored members; empty for an index out of a manifest."""
    has_caption: NDArray[np.bool_] | None = None
    """(n,) whether a sample has a caption that can be read and is not blank; None before captions are read."""
    checksums: NDArray[np.uint64] | None = None
    """(n, 3) of each kind of member; None without a manifest."""
    problems: Mapping[int, str] = field(default_factory=dict)
    """Why samples cannot be used, by row, as far as it is known: a reason, perhaps ": " and details of this sample."""
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
        """Return the index of some of the samples, without problems: they can be used."""
        if len(rows) == len(self.keys):
            return dataclasses.replace(self, problems={})
        columns = {name: getattr(self, name) for name in ("places", "has_caption", "checksums", "lost")}
        return dataclasses.replace(
            self,
            keys=_texts(self.keys).chosen(rows),
            image_names=_texts(self.image_names).chosen(rows),
            problems={},
            **{name: column[rows] for name, column in columns.items() if column is not None},
        )

    def compact(self) -> "ShardIndex":
        """Return the index in few bytes, without a Python object for each sample."""
        return dataclasses.replace(
            self,
            keys=_texts(self.keys),
            image_names=_texts(self.image_names),
            places=self.places.astype(compact_type(self.places)),
        )


def _texts(texts: Sequence[str]) -> Texts:
    return texts if isinstance(texts, Texts) else Texts.of(texts)


def joined(texts: Iterable[str]) -> tuple[bytes, NDArray[np.integer[Any]]]:
    """Return the block of some texts, as `Texts` has it, and where each of them ends in it."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = np.cumsum(list(map(len, encoded)), dtype=np.int64)
    return b"".join(encoded), ends.astype(compact_type(ends))


def compact_type(values: NDArray[np.integer[Any]]) -> np.dtype[Any]:
    """Return the smaller one of two types of stored numbers that holds these."""
    return np.dtype("<u4" if values.size == 0 or 0 <= values.min() <= values.max() < 1 << 32 else "<i8")


def checksum(data: bytes) -> int:
    """Return the first 64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def index_shard(path: Path) -> ShardIndex:
    """Read the headers of a shard: WebDataset's and img2dataset's conventions.

    A picture is KEY.jpg or another of `READ_ENDINGS`, or KEY.img. Captions are KEY.txt, .cap, .text or .caption, one a
    line, the first of them in the shard; if there is none, or it has no bytes, they are a field of KEY.json, as in
    `captions.py`. Members of a sample need not stand together. In a shard of image tokens, KEY.tokens is in place of a
    picture.

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
    strangers: dict[str, tuple[str, str]] = {}  # by key, name and field of a member that is none of the kinds
    n_strange_pictures: Counter[str] = Counter()
    n_duplicates = 0
    for member in members:
        if not member.is_safe:
            ignored += [] if member.is_folder else [member.name]
            continue
        key_and_field = _key_and_field(member.name)
        if key_and_field is None:
            continue
        key, field_name = key_and_field
        row = samples.setdefault(key, [None, None, None])
        kind = kinds.get(field_name)
        if kind is None:
            is_picture_like = _is_picture_like(member.name)
            if key not in strangers or is_picture_like:
                strangers[key] = (_text(member.name), field_name)
            if is_picture_like:
                n_strange_pictures[key] += 1
            continue
        n_duplicates += row[kind] is not None
        row[kind] = row[kind] or member
    if damage is not None:
        _drop_cut_sample(samples)
    for key, row in samples.items():  # one stands for the picture that its sample has not got
        n_duplicates += max(0, n_strange_pictures[key] - (row[IMAGE] is None))
    rows = list(samples.values())
    places = [[(m.offset, m.size) if m else (0, 0) for m in row] for row in rows]
    return ShardIndex(
        path=path,
        n_bytes=file_status(path).n_bytes,
        tokens=tokens,
        keys=tuple(map(_text, samples)),
        image_names=tuple(image.name if (image := row[IMAGE]) else "" for row in rows),
        places=np.array(places, dtype=np.int64).reshape(-1, 3, 2),
        n_ignored=len(ignored),
        n_duplicates=n_duplicates,
        damage=damage,
        ignored_names=tuple(ignored),
        problems={
            i: problem
            for i, (key, row) in enumerate(samples.items())
            if (problem := _why_no_picture(row, strangers.get(key))) is not None
        },
    )


def _text(name: str) -> str:
    """Return a name that is not UTF-8 without its lone surrogates, which no log and no JSON can hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_picture_like(name: str) -> bool:
    return is_picture(name) or not_read(name) is not None


def _why_no_picture(row: _Row, stranger: tuple[str, str] | None) -> str | None:
    """Return the problem of a sample without a picture; names a member that was perhaps meant to be it."""
    image = row[IMAGE]
    if image is not None and image.size > 0:
        return None
    has_caption = any(member is not None and member.size > 0 for member in row[TEXT:])
    problem = NO_PICTURE if has_caption else f"{NO_PICTURE} and {NO_CAPTION}"
    if image is not None:
        return f"{problem}: {_text(image.name)} is empty"
    if stranger is None:
        return problem
    name, field_name = stranger
    if "." in field_name:
        return f"{problem}: {name} has the field {field_name!r}, because a key ends at the first dot of a name"
    return f"{problem}: {not_read(name) or f'{name} is none of its kinds'}"


def _key_and_field(name: str) -> tuple[str, str] | None:
    """Return ("a.b/c", "d.jpg") for "a.b/c.d.jpg"; None without key or field, as in macOS's "._c.jpg"."""
    folder, slash, base = re.sub(r"\A(?:\./)+", "", name).rpartition("/")
    stem, _, field_name = base.partition(".")
    return (folder + slash + stem, field_name.lower()) if stem and field_name else None


def _drop_cut_sample(samples: dict[str, _Row]) -> None:
    """Remove the last sample before the damage unless it has every kind of member that the first one has."""
    if samples:
        first, last = next(iter(samples)), next(reversed(samples))
        kinds_first, kinds_last = ([member is not None for member in samples[key]] for key in (first, last))
        if first == last or any(a and not b for a, b in zip(kinds_first, kinds_last, strict=True)):
            del samples[last]


def with_captions(index: ShardIndex) -> ShardIndex:
    """Read the captions of all samples that have a picture; returns the index with `has_caption` and the problems."""
    has_caption = np.zeros(len(index.keys), dtype=bool)
    problems = dict(index.problems)
    kinds = index.caption_kind
    with open_file(index.path) as file:
        for i in np.flatnonzero(index.has_image).tolist():
            offset, size = index.places[i, kinds[i]].tolist()
            problem: str | None = NO_CAPTION if size == 0 else TOO_LARGE
            if 0 < size <= MAX_TEXT_BYTES:
                problem = caption_problem(os.pread(file.fileno(), size, offset), is_json=kinds[i] == JSON)
            if problem is None:
                has_caption[i] = True
            else:
                problems[i] = problem
    return dataclasses.replace(index, has_caption=has_caption, problems=problems)
