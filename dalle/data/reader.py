"""Reading shards: the samples of many, read by number, and the order in which an epoch shows them.

`shard_index.py` says which samples a shard has; `ShardData` reads them, in any order, from any process;
`batches.py` makes batches of them. The sample at a position of the sequence is a function of (seed, position)
alone.

With a manifest (`manifest.py`) samples have the numbers that they had when it was made, whatever became of
the shards since: a sample that is lost keeps its number and cannot be read, and bytes that changed are noticed.
"""

import hashlib
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dalle.data.image_tokens import TOKENS_FIELD, Encoding, unpack
from dalle.data.index import (
    IMAGE_FIELDS,
    LARGEST_TEXT_BYTES,
    DamagedShardError,
    ShardIndex,
    captions_of,
    expand_shards,
    index_shard,
)
from storage.tar import LARGEST_PICTURE_BYTES
from training.data.manifest import Manifest, checksum, located

logger = logging.getLogger(__name__)

_NAMED_IN_LOG = 20  # shards that are logged by name
_OPEN_FILES = 64  # per thread: far below the usual limit of 1,024 per process


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
    position: int = 0
    """Its place in the endless sequence of training, the same for any number of ranks and workers."""


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
    """Shards used in part or not at all, with the reason (with skip_damaged or a manifest only)."""
    n_lost: int = 0
    """Samples in use that a manifest knows and that are not there any more."""
    n_excluded: int = 0
    """Samples left out because the manifest was made so."""


class _OpenFiles(threading.local):
    """The files of one thread, so that no thread closes what another one reads.

    Reading by `pread`, which moves no file position, makes inherited files safe after a fork.
    """

    def __init__(self) -> None:
        self.files: OrderedDict[int, BinaryIO] = OrderedDict()


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
        self._checksums = [shard.checksums for shard in shards]
        """(n, 3) of each shard's members; None without a manifest."""
        nothing = [np.zeros(len(shard.keys), dtype=bool) for shard in shards]
        lost = [none if shard.lost is None else shard.lost for shard, none in zip(shards, nothing, strict=True)]
        self.is_lost = np.concatenate(lost)
        """(n,) samples that a manifest knows and that cannot be read any more."""
        self._first = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        self._open_files = _OpenFiles()

    @classmethod
    def open(
        cls,
        shards: Sequence[str | Path],
        *,
        captions: bool,
        encoded: bool = False,
        skip_damaged: bool = False,
        manifest: Manifest | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "ShardData":
        """Index shards.

        With a manifest, the samples are those that it knows, whole or not, with the numbers that they had when it was
        made. Those that are not there any more are marked as lost, and shards that it does not know are left out;
        both are logged.

        Args:
            shards: what `expand_shards` takes.
            captions: whether samples need captions; those without are left out and counted.
            encoded: whether shards of image tokens will do, which hold no pictures.
            skip_damaged: use the whole samples of truncated shards, and leave out unreadable ones.
            manifest: of these shards; damaged and missing ones are then no errors.
            progress: called with (shards indexed, shards).

        Raises:
            FileNotFoundError: a shard or folder is missing.
            ValueError: a shard is damaged, or has no picture or no caption at all; there are shards of image tokens
                where pictures are needed, among others, or made in another way than the others; the manifest is
                damaged, or nothing that it knows is there.
        """
        counts: Counter[str] = Counter()
        damaged: list[str] = []
        if manifest is not None:
            used = _known_shards(shards, manifest, captions, encoded, counts, damaged, progress)
        else:
            used = _indexed_shards(expand_shards(shards), captions, encoded, skip_damaged, counts, damaged, progress)
        names = ("n_without_image", "n_without_caption", "n_duplicates", "n_ignored_members", "n_excluded")
        for name in names:
            if counts[name]:
                logger.warning("left out of the shards: %d %s", counts[name], name.removeprefix("n_").replace("_", " "))
        report = DataReport(
            n_samples=sum(len(index.keys) for index in used),
            damaged_shards=tuple(damaged),
            n_lost=counts["n_lost"],
            **{name: counts[name] for name in names},
        )
        return cls(used, report, captions=captions)

    def __len__(self) -> int:
        return len(self.keys)

    def _member(self, i: int, kind: int, largest: int) -> bytes:
        """Return the bytes of a sample's picture (kind 0), caption (1) or JSON member (2)."""
        if self.is_lost[i]:
            raise ValueError(f"{self.source(i)}: the sample is lost: its shard is missing or damaged; restore it")
        offset, size = (int(number) for number in (self._image, self._text, self._json)[kind][i])
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
        known = self._checksums[shard]
        if known is not None and checksum(data) != int(known[i - int(self._first[shard]), kind]):
            raise ValueError(
                f"{self.source(i)}: its bytes are not those that the manifest knows (another checksum): the shard has "
                "changed or is damaged; restore it"
            )
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
        member = self._member(i, 2 if is_json else 1, LARGEST_TEXT_BYTES)
        captions = captions_of(member, is_json, self.source(i))
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
            image_bytes=self._member(i, 0, LARGEST_PICTURE_BYTES) if self.encoding is None else b"",
            captions=self.captions(i),
            source=self.source(i),
            image_tokens=None if self.encoding is None else self._image_tokens(i, self.encoding),
        )

    def _image_tokens(self, i: int, encoding: Encoding) -> NDArray[np.integer[Any]]:
        member = self._member(i, 0, encoding.n_bytes)
        try:
            return unpack(member, encoding)
        except ValueError as error:
            raise ValueError(f"{self.source(i)}: {error}") from None

    def caption_members(self, i: int) -> dict[str, bytes]:
        """Return the bytes of the members with sample i's captions as they are: "txt", "json" or both.

        Raises:
            ValueError, OSError: they cannot be read any more.
        """
        kinds = {"txt": 1, "json": 2}
        sizes = {"txt": self._text[i, 1], "json": self._json[i, 1]}
        return {field: self._member(i, kinds[field], LARGEST_TEXT_BYTES) for field, size in sizes.items() if size > 0}

    def samples_of(self, shard: int) -> range:
        """Return the numbers of the samples of `shards[shard]`."""
        return range(int(self._first[shard]), int(self._first[shard + 1]))

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


def _indexed_shards(
    paths: Sequence[Path],
    captions: bool,
    encoded: bool,
    skip_damaged: bool,
    counts: Counter[str],
    damaged: list[str],
    progress: Callable[[int, int], None] | None,
) -> list[ShardIndex]:
    """Return the usable samples of shards; arguments and errors as those of `ShardData.open`."""
    used: list[ShardIndex] = []
    for n_done, path in enumerate(paths, start=1):
        try:
            index = index_shard(path, skip_damaged=skip_damaged)
        except DamagedShardError as error:
            if not skip_damaged:
                raise
            logger.warning("shard left out: %s", error)
            damaged.append(str(error))
            continue
        _require_pictures(index, encoded)
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
    return used


def _known_shards(
    shards: Sequence[str | Path],
    manifest: Manifest,
    captions: bool,
    encoded: bool,
    counts: Counter[str],
    damaged: list[str],
    progress: Callable[[int, int], None] | None,
) -> list[ShardIndex]:
    """Return the samples of a manifest, in its order, those that are not there marked as lost."""
    matches, unknown = manifest.match(expand_shards(shards, skip_missing=True))
    used: list[ShardIndex] = []
    for n_done, (entry, path) in enumerate(matches, start=1):
        record = manifest.record(entry)
        index, damage = located(record, path)
        _require_pictures(index, encoded)
        counts.update(n_duplicates=index.n_duplicates, n_ignored_members=index.n_ignored)
        has_image, excluded = index.image[:, 1] > 0, manifest.excluded.rows(index, entry.path)
        counts["n_without_image"] += int((~has_image).sum())
        counts["n_without_caption"] += int((has_image & ~record.has_caption).sum()) if captions else 0
        wanted = has_image & record.has_caption if captions else has_image
        counts["n_excluded"] += int((wanted & excluded).sum())
        usable = index.chosen(np.flatnonzero(wanted & ~excluded))
        assert usable.lost is not None
        n_left = int((~usable.lost).sum())
        counts["n_lost"] += len(usable.keys) - n_left
        if damage is not None:
            damaged.append(f"{entry.name}: {n_left:,} of {len(usable.keys):,} samples are left ({damage})")
        if usable.keys:
            used.append(usable)
        if progress is not None:
            progress(n_done, len(matches))
    _log_some("shard", damaged)
    _log_some("shard left out", [f"{path} is not in the manifest {manifest.folder}" for path in unknown])
    n_known = sum(len(index.keys) for index in used)
    if counts["n_lost"] == n_known:
        found = "; ".join(damaged[:3]) or f"it knows {len(manifest.entries):,} shards and no usable sample"
        raise ValueError(
            f"nothing that the manifest {manifest.folder} knows is left: {found}; check --data, or make a manifest of "
            "these shards with `dalle-train check-data`"
        )
    return used


def _log_some(what: str, lines: Sequence[str]) -> None:
    for line in lines[:_NAMED_IN_LOG]:
        logger.warning("%s %s", what, line)
    if len(lines) > _NAMED_IN_LOG:
        logger.warning("and %d more", len(lines) - _NAMED_IN_LOG)


def _require_pictures(index: ShardIndex, encoded: bool) -> None:
    """Check that a shard holds pictures, or image tokens where those will do.

    Raises:
        ValueError: it does not.
    """
    if index.tokens is not None and not encoded:
        raise ValueError(
            f"{index.path} holds image tokens, and pictures are needed here: give the shards that it was made of by "
            f"`dalle-train encode` ({index.tokens.source}, …)"
        )


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
                    text = os.pread(file.fileno(), size, offset) if size <= LARGEST_TEXT_BYTES else b""
                    keep[i] = size > 0 and bool(captions_of(text, bool(is_json), index.keys[i]))
                except ValueError:
                    keep[i] = False
                counts["n_without_caption"] += int(not keep[i])
    return index.chosen(np.flatnonzero(keep))


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
