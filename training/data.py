"""Reading shards: which samples there are, in which order they come, and the micro-batches they make.

1. `expand_shards`: names, folders, globs and brace ranges to paths of tar files.
2. `index_shard`: one pass over a tar's headers to the place of every picture and caption in it.
3. `ShardData`: the samples of all shards, read by number, in any order, from any process.
4. `batches`: an endless, seeded, exactly resumable sequence of micro-batches.
5. `validation_batches`: every sample once.

The format is WebDataset's (https://github.com/webdataset/webdataset): members of a tar that share a key (the
path up to the first dot of the base name) are one sample. webdataset's own reader is avoided on purpose: it
runs `pipe:` URLs in a shell, unpickles members by their extension, drops the rest of a shard whose bytes are
damaged without a word, and gives each worker whole shards, so that what is trained on depends on the number
of workers. Here headers are read once with `tarfile`, nothing is ever extracted or unpickled, and the sample
at a position of the sequence is a function of (seed, position) alone.
"""

import glob
import hashlib
import itertools
import json
import logging
import math
import os
import re
import signal
import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle.tarfiles import LARGEST_PICTURE_BYTES, DamagedTarError, place_is_safe, whole_members
from dvae.images import PICTURE_EXTENSIONS

logger = logging.getLogger(__name__)

IMAGE_FIELDS = (*sorted(extension[1:] for extension in PICTURE_EXTENSIONS), "img")
TEXT_FIELDS = ("txt", "cap", "text", "caption")
_FIELD_KINDS = dict.fromkeys(IMAGE_FIELDS, 0) | dict.fromkeys(TEXT_FIELDS, 1) | {"json": 2}
_LARGEST_BRACE_RANGE = 1_000_000
_LARGEST_TEXT_BYTES = 16 << 20
_OPEN_FILES = 64  # per thread: far below the usual limit of 1,024 per process
_REPLACEMENTS = 100  # samples tried in place of an unusable one
_NAMED_IN_LOG = 20  # unusable samples that are logged by name
_FEWEST_BAD = 10  # fewer unusable samples say nothing about those not read yet


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
    keys: tuple[str, ...]
    """One per sample, n of them."""
    image_names: tuple[str, ...]
    """Member names of the pictures; "" where a sample has none."""
    image: NDArray[np.int64]
    """(n, 2) places of the pictures."""
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
    stand together.

    Args:
        path: a tar file, not compressed.
        skip_damaged: where a shard is damaged, log a warning and return the whole samples before the damage.

    Raises:
        DamagedShardError (a ValueError): truncated, not a tar, or empty.
        ValueError: compressed.
    """
    try:
        members, damage = whole_members(path)
    except DamagedTarError as error:
        raise DamagedShardError(f"{error}; make it again, or pass --skip-damaged-shards to leave it out") from error
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
        kind = _FIELD_KINDS.get(field)
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
    """The picture as it is stored (JPEG, PNG, …)."""
    captions: tuple[str, ...]
    """One or more, none of them blank; empty when the data was opened without captions."""
    source: str = ""
    """"SHARD: MEMBER", to name the picture in messages."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was found in the shards, and what is not used."""

    n_samples: int
    """Samples in use."""
    n_without_image: int
    """Samples left out because they have no picture."""
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
        skip_damaged: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "ShardData":
        """Index shards.

        Args:
            shards: what `expand_shards` takes.
            captions: whether samples need captions; those without are left out and counted.
            skip_damaged: use the whole samples of truncated shards, and leave out unreadable ones.
            progress: called with (shards indexed, shards).

        Raises:
            FileNotFoundError: a shard or folder is missing.
            ValueError: a shard is damaged, or has no picture or no caption at all.
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
            ValueError, OSError: its bytes or captions cannot be read. The picture is not decoded here.
        """
        image_bytes = self._bytes(i, self._image[i], LARGEST_PICTURE_BYTES)
        return Sample(key=self.keys[i], image_bytes=image_bytes, captions=self.captions(i), source=self.source(i))

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
    return ShardIndex(
        path=index.path,
        n_bytes=index.n_bytes,
        keys=tuple(index.keys[i] for i in chosen),
        image_names=tuple(index.image_names[i] for i in chosen),
        image=index.image[chosen],
        text=index.text[chosen],
        json=index.json[chosen],
        n_ignored=index.n_ignored,
        n_duplicates=index.n_duplicates,
        damage=index.damage,
    )


def _nothing_usable(index: ShardIndex, captions: bool) -> str:
    if not len(index.keys):
        return f"shard {index.path} has no samples: expected members called KEY.jpg and KEY.txt"
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


# ---------------------------------------------------------------------------------------------------- batches

Transform = Callable[[Sample, np.random.Generator], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of B samples."""

    tensors: dict[str, Tensor]
    """What the transform made of the samples, stacked: (B, …) each."""
    keys: list[str]
    """The B samples, in order."""
    n_bad: int
    """How many samples that belong here were unusable; in training the next usable one replaces each."""


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What a worker hands over: a batch, and the (number, reason) of each unusable sample.

    No tensors: too many samples in a row were unusable.
    """

    tensors: dict[str, Tensor] | None
    keys: list[str]
    bad: list[tuple[int, str]]


def _stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class _Positions(Dataset[_Read]):
    """Reads the micro-batch at a range of positions of the endless sequence."""

    def __init__(self, data: ShardData, transform: Transform, seed: int) -> None:
        self._data = data
        self._transform = transform
        self._seed = seed
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders[epoch] = self._data.order(self._seed, epoch)
            if len(self._orders) > 2:  # a micro-batch may reach over the end of an epoch
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def __getitem__(self, positions: range) -> _Read:
        tensors: list[dict[str, Tensor]] = []
        keys: list[str] = []
        bad: list[tuple[int, str]] = []
        n = len(self._data)
        for position in positions:
            epoch, place = divmod(position, n)
            order = self._order(epoch)
            for attempt in range(min(n, 1 + _REPLACEMENTS)):
                i = int(order[(place + attempt) % n])
                try:
                    sample = self._data.read(i)
                    tensors.append(self._transform(sample, sample_rng(self._seed, epoch, sample.key, "training")))
                except (ValueError, OSError) as error:
                    if attempt == 0:  # the others are counted at their own positions
                        bad.append((i, str(error)))
                    continue
                keys.append(sample.key)
                break
            else:
                return _Read(tensors=None, keys=keys, bad=bad)
        return _Read(tensors=_stack(tensors), keys=keys, bad=bad)


class _BadSamples:
    """Counts unusable samples, logs each once, and raises when there are too many.

    Too many are, first, more different ones than the fraction of all samples: certain, whatever part of which
    epoch this process has read, and prompt for small data. Before that, for large data, at least ten, and
    more among the samples read than chance explains (four standard deviations): an unlucky start stops
    nothing.
    """

    def __init__(self, data: ShardData, max_fraction: float) -> None:
        self._data = data
        self._max_fraction = max_fraction
        self._n_seen = 0
        self._n_bad = 0
        self._reasons: dict[int, str] = {}

    def add(self, read: _Read, n_seen: int) -> None:
        self._n_seen += n_seen
        self._n_bad += len(read.bad)
        for i, reason in read.bad:
            if i in self._reasons:
                continue
            self._reasons[i] = reason
            if len(self._reasons) <= _NAMED_IN_LOG:
                logger.warning("unusable sample %s (%s): %s", self._data.keys[i], self._data.shard_of(i), reason)
            elif len(self._reasons) == _NAMED_IN_LOG + 1:
                logger.warning("further unusable samples are counted, not named")
        if read.tensors is None:
            raise self.error(f"{min(len(self._data), 1 + _REPLACEMENTS)} samples in a row are unusable")
        limit = self._max_fraction * self._n_seen
        is_certain = len(self._reasons) > self._max_fraction * len(self._data)
        is_likely = self._n_bad >= _FEWEST_BAD and self._n_bad > limit + 4 * math.sqrt(limit)
        # The first condition spares long runs that add up rare failures of the disk or the network.
        if self._n_bad > limit and (is_certain or is_likely):
            n_read = min(self._n_seen, len(self._data))
            raise self.error(f"{len(self._reasons):,} unusable samples after reading {n_read:,} of {len(self._data):,}")

    def error(self, what: str) -> ValueError:
        per_shard = Counter(str(self._data.shard_of(i)) for i in self._reasons)
        worst = ", ".join(f"{shard} ({count:,})" for shard, count in per_shard.most_common(3))
        first = next(iter(self._reasons.values()), "")
        return ValueError(
            f"{what}, more than --max-bad-fraction {self._max_fraction:g} allows; most are in {worst}; "
            f"the first: {first}; repair the shards, or raise --max-bad-fraction"
        )


def _positions(
    first_step: int, last_step: int | None, micro_batch: int, accumulation: int, rank: int, world_size: int
) -> Iterator[range]:
    """Yield the positions of each micro-batch of a rank: its contiguous part of every global batch."""
    per_rank = micro_batch * accumulation
    for step in itertools.count(first_step) if last_step is None else range(first_step, last_step):
        start = (step * world_size + rank) * per_rank
        for first in range(start, start + per_rank, micro_batch):
            yield range(first, first + micro_batch)


_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread: a process forked meanwhile begins with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_the_parent_alone(worker: int) -> None:
    """Leave Ctrl-C and the end of a job, of which workers hear too, to the training process: it saves a checkpoint.

    Runs in a worker forked under `_interrupts_held_back`. Only the training process's own SIGTERM ends it.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
        return
    parent = os.getppid()

    def wait() -> None:
        while True:
            heard = signal.sigwaitinfo(_INTERRUPTS)
            if heard.si_signo == signal.SIGTERM and heard.si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _deliver(reads: Iterator[_Read], bad_samples: _BadSamples) -> Iterator[Batch]:
    for read in reads:
        bad_samples.add(read, n_seen=len(read.keys))
        assert read.tensors is not None
        yield Batch(tensors=read.tensors, keys=read.keys, n_bad=len(read.bad))


def batches(
    data: ShardData,
    transform: Transform,
    *,
    seed: int,
    micro_batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
    max_steps: int | None = None,
) -> Iterator[Batch]:
    """Return the micro-batches of a training run, for ever.

    Optimizer step s takes the positions s·G to (s + 1)·G of the endless sequence (`ShardData.order`), where G
    is micro_batch × accumulation × world_size; rank r takes the r-th of world_size equal parts, in
    micro-batches. So what a step sees depends on (seed, step, G) alone: not on the number of workers or
    ranks, nor on where it was resumed.

    A sample whose reading or transform raises ValueError or OSError is replaced by the next usable one of its
    epoch's order.

    Args:
        data: the samples.
        transform: makes tensors of a sample; its only randomness is the generator it is given, a function of
            (seed, epoch, key).
        seed: ≥ 0.
        micro_batch: samples per batch that is returned.
        accumulation: micro-batches per optimizer step.
        rank: of this process, 0 ≤ rank < world_size.
        world_size: number of processes.
        start_step: optimizer step to begin with: the number of steps already done.
        workers: forked processes that read ahead; 0 reads in this one.
        max_bad_fraction: of all samples that may be unusable, in [0, 1].
        max_steps: the step before which to end, counted from step 0 of the run; None: never end.

    Raises:
        ValueError: an argument is out of range (at once); too many samples are unusable (while iterating).
    """
    for name, value, least in (
        ("micro_batch", micro_batch, 1),
        ("accumulation", accumulation, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be at least 0 and below world_size ({world_size}), got {rank}")
    if start_step < 0 or workers < 0 or not 0 <= max_bad_fraction <= 1:
        raise ValueError(
            f"start_step ({start_step}) and workers ({workers}) must be at least 0, "
            f"max_bad_fraction ({max_bad_fraction}) in [0, 1]"
        )
    positions = _positions(start_step, max_steps, micro_batch, accumulation, rank, world_size)
    reader = _Positions(data, transform, seed)
    if workers == 0:
        return _deliver(map(reader.__getitem__, positions), _BadSamples(data, max_bad_fraction))
    loader = DataLoader(
        reader,
        batch_size=None,  # an item is a micro-batch
        sampler=positions,
        num_workers=workers,  # DataLoader gives each worker one torch thread
        prefetch_factor=4,
        multiprocessing_context="fork",  # shares the index; transforms need not be picklable
        worker_init_fn=_obey_the_parent_alone,
        generator=torch.Generator(),  # or it draws from the global one, and workers=0 would train differently
    )
    with _interrupts_held_back():
        reads = iter(loader)  # forks the workers
    return _deliver(reads, _BadSamples(data, max_bad_fraction))


def validation_batches(
    data: ShardData, transform: Transform, batch_size: int, *, max_bad_fraction: float = 0.01
) -> Iterator[Batch]:
    """Yield every sample once, in the order of the shards, with the same randomness each time.

    Args:
        data: the samples.
        transform: as in `batches`; its generator depends on the key alone.
        batch_size: samples per batch; fewer in the last one, and where unusable samples are left out.
        max_bad_fraction: of the samples that may be unusable, in [0, 1].

    Raises:
        ValueError: batch_size is below 1; too many samples are unusable, or all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    bad_samples = _BadSamples(data, max_bad_fraction)
    n_bad = n_usable = 0
    for first in range(0, len(data), batch_size):
        numbers = range(first, min(first + batch_size, len(data)))
        read = _read_once(data, transform, numbers)
        bad_samples.add(read, n_seen=len(numbers))
        n_bad += len(read.bad)
        n_usable += len(read.keys)
        if read.tensors:
            yield Batch(tensors=read.tensors, keys=read.keys, n_bad=n_bad)
            n_bad = 0  # those of a batch without a usable sample go with the next one
    if n_usable == 0:
        raise bad_samples.error(f"all {len(data):,} samples are unusable")


def _read_once(data: ShardData, transform: Transform, numbers: range) -> _Read:
    """Return the usable ones of some samples, none replaced; no usable one makes an empty dict of tensors."""
    tensors: list[dict[str, Tensor]] = []
    keys: list[str] = []
    bad: list[tuple[int, str]] = []
    for i in numbers:
        try:
            sample = data.read(i)
            tensors.append(transform(sample, sample_rng(0, 0, sample.key, "validation")))
            keys.append(sample.key)
        except (ValueError, OSError) as error:
            bad.append((i, str(error)))
    return _Read(tensors=_stack(tensors) if tensors else {}, keys=keys, bad=bad)
