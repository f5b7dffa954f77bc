"""Reading shards: which samples there are, what each holds, and the order in which an epoch shows them.

1. `expand_shards`: names, folders, globs and brace ranges to paths of tar files.
2. `index_shard`: one pass over a tar's headers to the place of every picture and caption in it.
3. `ShardData`: the samples of all shards, read by number, in any order, from any process.

`training/batches.py` makes batches of them.

The format is WebDataset's (https://github.com/webdataset/webdataset): members of a tar that share a key (the
path up to the first dot of the base name) are one sample. webdataset's own reader is avoided on purpose: it
runs `pipe:` URLs in a shell, unpickles members by their extension, drops the rest of a shard whose bytes are
damaged without a word, and gives each worker whole shards, so that what is trained on depends on the number
of workers. Here headers are read once with `tarfile`, nothing is ever extracted or unpickled, and the sample
at a position of the sequence is a function of (seed, position) alone.

Shards that `dalle-train encode` made hold image tokens in place of pictures: see `training/image_tokens.py`.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dalle.tarfiles import LARGEST_PICTURE_BYTES, DamagedTarError, place_is_safe, whole_members
from dvae.images import PICTURE_EXTENSIONS
from training.image_tokens import TOKENS_FIELD, Description, Encoding, description_in, unpack

logger = logging.getLogger(__name__)

IMAGE_FIELDS = (*sorted(extension[1:] for extension in PICTURE_EXTENSIONS), "img")
TEXT_FIELDS = ("txt", "cap", "text", "caption")
_CAPTION_KINDS = dict.fromkeys(TEXT_FIELDS, 1) | {"json": 2}
_PICTURE_KINDS = dict.fromkeys(IMAGE_FIELDS, 0) | _CAPTION_KINDS
_TOKEN_KINDS = {TOKENS_FIELD: 0} | _CAPTION_KINDS
_LARGEST_BRACE_RANGE = 1_000_000
_LARGEST_TEXT_BYTES = 16 << 20
_OPEN_FILES = 64  # per thread: far below the usual limit of 1,024 per process


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


def _expand_name(name: str, pattern: str) -> list[Path]:
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


def expand_shards(patterns: Sequence[str | Path]) -> list[Path]:
    """Return the tar files that names, folders (searched recursively), globs and brace ranges stand for.

    Args:
        patterns: e.g. `["pictures/", "more/train-{000000..000009}.tar", "other/*.tar"]`.

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
        for shard in itertools.chain.from_iterable(_expand_name(name, pattern) for name in names):
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


# --------------------------------------------------------------------------------------------------- all data


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture with its captions."""

    key: str
    """Its name within the data."""
    image_bytes: bytes
    """The picture as it is stored (JPEG, PNG, …); empty where there are image tokens in its place."""
    captions: tuple[str, ...]
    """One or more, none of them blank; empty when the data was opened without captions."""
    source: str = ""
    """"SHARD: MEMBER", to name the picture in messages."""
    image_tokens: NDArray[np.integer[Any]] | None = None
    """(V,Y,X) tokens of the picture's views, the centre crop first; None where there is a picture."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was found in the shards, and what is not used."""

    n_samples: int
    """Samples in use."""
    n_without_image: int
    """Samples left out because they have neither a picture nor image tokens."""
    n_without_caption: int
    """Samples left out because they have no caption, a blank one or an unreadable one."""
    n_duplicates: int
    """Members left out because their sample had such a member already."""
    n_ignored_members: int
    """Links, devices and names that lead out of a folder."""
    damaged_shards: tuple[str, ...]
    """Shards used in part or not at all, with the reason (with skip_damaged only)."""


class _OpenFiles(threading.local):
    """The files of one thread, so that no thread closes what another one reads.

    Reading by `pread`, which moves no file position, makes inherited files safe after a fork.
    """

    def __init__(self) -> None:
        self.files: OrderedDict[int, BinaryIO] = OrderedDict()


def _captions_of(text: bytes, is_json: bool, source: str) -> tuple[str, ...]:
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


class ShardData:
    """The samples of some shards, numbered from 0; threads and forked processes may read at once."""

    def __init__(self, shards: Sequence[ShardIndex], report: DataReport, *, captions: bool) -> None:
        """Take indexes that hold usable samples only; `ShardData.open` makes them."""
        self.report = report
        self.encoding = _common_encoding(shards)
        """How the image tokens were made that are in place of pictures; None if there are pictures."""
        self.shards = [shard.path for shard in shards]
        self.keys = [key for shard in shards for key in shard.keys]
        self.has_captions = captions
        self._n_bytes = [shard.n_bytes for shard in shards]
        self._names = [name for shard in shards for name in shard.image_names]
        self._shard = np.repeat(np.arange(len(shards)), [len(shard.keys) for shard in shards])
        self._image = np.concatenate([shard.image for shard in shards])
        self._text = np.concatenate([shard.text for shard in shards])
        self._json = np.concatenate([shard.json for shard in shards])
        self._open_files = _OpenFiles()

    @classmethod
    def open(
        cls,
        shards: Sequence[str | Path],
        *,
        captions: bool,
        encoded: bool = False,
        skip_damaged: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "ShardData":
        """Index shards.

        Args:
            shards: what `expand_shards` takes.
            captions: whether samples need captions; those without are left out and counted.
            encoded: whether shards of image tokens will do, which hold no pictures.
            skip_damaged: use the whole samples of truncated shards, and leave out unreadable ones.
            progress: called with (shards indexed, shards).

        Raises:
            FileNotFoundError: a shard or folder is missing.
            ValueError: a shard is damaged, or has no picture or no caption at all; there are shards of image tokens
                where pictures are needed, among others, or made in another way than the others.
        """
        paths = expand_shards(shards)
        used: list[ShardIndex] = []
        damaged: list[str] = []
        counts: Counter[str] = Counter()
        for n_done, path in enumerate(paths, start=1):
            try:
                index = index_shard(path, skip_damaged=skip_damaged)
            except DamagedShardError as error:
                if not skip_damaged:
                    raise
                logger.warning("shard left out: %s", error)
                damaged.append(str(error))
                continue
            if index.tokens is not None and not encoded:
                raise ValueError(
                    f"{path} holds image tokens, and pictures are needed here: give the shards that it was made of by "
                    f"`dalle-train encode` ({index.tokens.source}, …)"
                )
            if index.damage is not None:
                damaged.append(f"{path} {index.damage}")
            counts.update(n_duplicates=index.n_duplicates, n_ignored_members=index.n_ignored)
            usable = _usable(index, captions, counts)
            if usable.keys:
                used.append(usable)
            elif index.damage is None:
                raise ValueError(_nothing_usable(index, captions))
            if progress is not None:
                progress(n_done, len(paths))
        if not used:
            raise ValueError(f"no usable shard among {len(paths)}: " + "; ".join(damaged[:3]))
        names = ("n_without_image", "n_without_caption", "n_duplicates", "n_ignored_members")
        n_samples = sum(len(index.keys) for index in used)
        report = DataReport(
            n_samples=n_samples,
            damaged_shards=tuple(damaged),
            **{name: counts[name] for name in names},
        )
        for name in names:
            if counts[name]:
                logger.warning(
                    "left out of %d shards: %d %s",
                    len(paths),
                    counts[name],
                    name.removeprefix("n_").replace("_", " "),
                )
        return cls(used, report, captions=captions)

    def __len__(self) -> int:
        return len(self.keys)

    def _bytes(self, i: int, place: NDArray[np.int64], largest: int) -> bytes:
        offset, size = int(place[0]), int(place[1])
        if size > largest:
            raise ValueError(f"{self.source(i)}: a member of {size:,} bytes, expected at most {largest:,}")
        shard = int(self._shard[i])
        files = self._open_files.files
        if shard in files:
            files.move_to_end(shard)
        else:
            file = self.shards[shard].open("rb", buffering=0)
            if os.fstat(file.fileno()).st_size != self._n_bytes[shard]:
                file.close()
                raise ValueError(f"{self.shards[shard]} has changed since it was indexed: start again to read it anew")
            files[shard] = file
            if len(files) > _OPEN_FILES:
                files.popitem(last=False)[1].close()
        data = os.pread(files[shard].fileno(), size, offset)
        if len(data) != size:
            raise ValueError(f"{self.source(i)}: the shard ends at byte {offset + len(data):,}, before the member does")
        return data

    def source(self, i: int) -> str:
        """Return "SHARD: MEMBER" of sample i, for messages."""
        return f"{self.shard_of(i)}: {self._names[i]}"

    def shard_of(self, i: int) -> Path:
        """Return the shard of sample i."""
        return self.shards[int(self._shard[i])]

    def captions(self, i: int) -> tuple[str, ...]:
        """Return the captions of sample i without reading its picture; () if the data was opened without.

        Raises:
            ValueError, OSError: they cannot be read any more.
        """
        if not self.has_captions:
            return ()
        is_json = bool(self._text[i, 1] == 0)
        place = self._json[i] if is_json else self._text[i]
        captions = _captions_of(self._bytes(i, place, _LARGEST_TEXT_BYTES), is_json, self.source(i))
        if not captions:
            raise ValueError(f"{self.source(i)}: its caption is empty")
        return captions

    def read(self, i: int) -> Sample:
        """Read sample i, 0 ≤ i < len(self).

        Raises:
            ValueError, OSError: its bytes, image tokens or captions cannot be read. The picture is not decoded here.
        """
        return Sample(
            key=self.keys[i],
            image_bytes=self._bytes(i, self._image[i], LARGEST_PICTURE_BYTES) if self.encoding is None else b"",
            captions=self.captions(i),
            source=self.source(i),
            image_tokens=None if self.encoding is None else self._image_tokens(i, self.encoding),
        )

    def _image_tokens(self, i: int, encoding: Encoding) -> NDArray[np.integer[Any]]:
        member = self._bytes(i, self._image[i], encoding.n_bytes)
        try:
            return unpack(member, encoding)
        except ValueError as error:
            raise ValueError(f"{self.source(i)}: {error}") from None

    def caption_members(self, i: int) -> dict[str, bytes]:
        """Return the bytes of the members with sample i's captions as they are: "txt", "json" or both.

        Raises:
            ValueError, OSError: they cannot be read any more.
        """
        places = {"txt": self._text[i], "json": self._json[i]}
        return {field: self._bytes(i, place, _LARGEST_TEXT_BYTES) for field, place in places.items() if place[1] > 0}

    def samples_of(self, shard: int) -> range:
        """Return the numbers of the samples of `shards[shard]`."""
        first, end = np.searchsorted(self._shard, [shard, shard + 1])
        return range(int(first), int(end))

    def fingerprint(self, shard: int) -> str:
        """Return 16 hexadecimal digits that tell `shards[shard]` from one with other samples.

        Of their keys, and the places and sizes of their members: nothing but the headers has to be read.
        """
        samples = self.samples_of(shard)
        digest = hashlib.blake2b(repr(self.keys[samples.start : samples.stop]).encode(), digest_size=8)
        for places in (self._image, self._text, self._json):
            digest.update(places[samples.start : samples.stop].astype("<i8").tobytes())
        return digest.hexdigest()

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch: (n,) int64, a permutation that depends on (seed, epoch, n) alone.

        The sample at position p of the endless sequence is `order(seed, p // n)[p % n]`.
        """
        bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
        # Sorting raw bits, because NumPy guarantees those across its versions and not Generator.permutation.
        return np.argsort(bits.random_raw(len(self)), kind="stable").astype(np.int64)


def _usable(index: ShardIndex, captions: bool, counts: Counter[str]) -> ShardIndex:
    """Return the part of an index that has pictures, and captions if needed; add the rest to `counts`."""
    keep = index.image[:, 1] > 0
    counts["n_without_image"] += int((~keep).sum())
    if captions:
        with index.path.open("rb", buffering=0) as file:
            for i in np.flatnonzero(keep):
                is_json = index.text[i, 1] == 0
                offset, size = (int(number) for number in (index.json[i] if is_json else index.text[i]))
                try:
                    text = os.pread(file.fileno(), size, offset) if size <= _LARGEST_TEXT_BYTES else b""
                    keep[i] = size > 0 and bool(_captions_of(text, bool(is_json), index.keys[i]))
                except ValueError:
                    keep[i] = False
                counts["n_without_caption"] += int(not keep[i])
    chosen = np.flatnonzero(keep)
    return dataclasses.replace(
        index,
        keys=tuple(index.keys[i] for i in chosen),
        image_names=tuple(index.image_names[i] for i in chosen),
        image=index.image[chosen],
        text=index.text[chosen],
        json=index.json[chosen],
    )


def _common_encoding(shards: Sequence[ShardIndex]) -> Encoding | None:
    """Return how the image tokens of all shards were made; None if they hold pictures.

    Raises:
        ValueError: there are shards of both kinds, or tokens that were made differently.
    """
    first = shards[0]
    for other in shards[1:]:
        if (other.tokens is None) != (first.tokens is None):
            tokens, pictures = (first, other) if other.tokens is None else (other, first)
            raise ValueError(
                f"{tokens.path} holds image tokens and {pictures.path} pictures: give shards of one kind; "
                "`dalle-train encode` makes those of tokens"
            )
        if first.tokens is not None and other.tokens is not None:
            differences = other.tokens.encoding.differences(first.tokens.encoding)
            if differences:
                raise ValueError(
                    f"{other.path} holds other image tokens than {first.path} ({differences}): expected shards that "
                    "`dalle-train encode` made with the same dVAE, crops and seed; encode one of them again"
                )
    return first.tokens.encoding if first.tokens is not None else None


def _nothing_usable(index: ShardIndex, captions: bool) -> str:
    if not len(index.keys):
        return f"shard {index.path} has no samples: expected members called KEY.jpg and KEY.txt"
    if not index.image[:, 1].any() and index.tokens is not None:
        return f"shard {index.path} has no image tokens: expected KEY.{TOKENS_FIELD} in it; encode its pictures again"
    if not index.image[:, 1].any():
        fields = ", ".join("." + field for field in IMAGE_FIELDS)
        return (
            f"shard {index.path} has no pictures: expected KEY{fields} in it, "
            f"found keys such as {index.keys[0]!r} without one"
        )
    assert captions
    return (
        f"shard {index.path} has no captions: expected KEY.txt beside KEY.jpg (UTF-8, one caption a line), "
        f'or "caption" in KEY.json, for keys such as {index.keys[0]!r}'
    )


def sample_rng(seed: int, epoch: int, key: str, purpose: str) -> np.random.Generator:
    """Return the randomness of one sample in one epoch: the same in every process, whatever was drawn before.

    Args:
        seed: of the run.
        epoch: from 0.
        key: of the sample.
        purpose: what it is for; different purposes draw independent numbers.
    """
    name = repr((int(seed), int(epoch), key, purpose)).encode()
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
