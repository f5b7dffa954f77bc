"""Reading shards: the samples of many, read by number, and the order in which an epoch shows them.

`index.py` finds the samples of one shard; `ShardData` reads those of many, in any order, from any process. The sample
at a position of the endless sequence is a function of (seed, position) alone.

Indexes may come from a manifest (`training/data/manifest.py`), which knows samples that a shard has lost since, and the
checksums of all: a lost sample keeps its number and cannot be read, and changed bytes are noticed.
"""

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dalle.data.captions import MAX_TEXT_BYTES, CaptionError, captions_of
from dalle.data.image_tokens import Encoding, unpack
from dalle.data.index import (
    IMAGE,
    JSON,
    TEXT,
    ShardIndex,
    checksum,
    index_shard,
)
from dalle.data.names import expand_shards
from dalle.data.usable import DataReport, nothing_usable, usable_part
from storage.tar import MAX_PICTURE_BYTES, DamagedTarError

logger = logging.getLogger(__name__)

_MAX_OPEN_FILES = 64  # per thread: far below the usual limit of 1,024 per process


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


class _OpenFiles(threading.local):
    """The files of one thread, so that no thread closes what another one reads.

    Reading by `pread`, which moves no file position, makes inherited files safe after a fork.
    """

    def __init__(self) -> None:
        self.files: OrderedDict[int, BinaryIO] = OrderedDict()


class ShardData:
    """The samples of some shards, numbered from 0; threads and forked processes may read at once."""

    def __init__(self, shards: Sequence[ShardIndex], report: DataReport, *, captions: bool) -> None:
        """Take indexes of usable samples only; `ShardData.open` makes them."""
        self.report = report
        self.encoding = _common_encoding(shards)
        """The way that image tokens in place of pictures were made; None if there are pictures."""
        self.shards = [shard.path for shard in shards]
        self.keys = [key for shard in shards for key in shard.keys]
        self.names = [name for shard in shards for name in shard.image_names]
        """Member names of the pictures."""
        self.has_captions = captions
        sizes = [len(shard.keys) for shard in shards]
        self.is_lost = np.concatenate(
            [
                np.zeros(n, dtype=bool) if shard.lost is None else shard.lost
                for shard, n in zip(shards, sizes, strict=True)
            ]
        )
        """(n,) samples that a manifest knows and that cannot be read any more."""
        self._n_bytes = [shard.n_bytes for shard in shards]
        self._first = np.cumsum([0, *sizes])
        self._shard = np.repeat(np.arange(len(shards)), sizes)
        self._places = np.concatenate([shard.places for shard in shards])
        self._caption_kind = np.concatenate([shard.caption_kind for shard in shards])
        self._checksums = [shard.checksums for shard in shards]
        self._open_files = _OpenFiles()

    @classmethod
    def open(
        cls,
        shards: Sequence[str | Path],
        *,
        captions: bool,
        encoded: bool = False,
        skip_damaged: bool = False,
    ) -> "ShardData":
        """Index shards.

        Args:
            shards: what `expand_shards` takes.
            captions: whether samples need captions; those without are left out and counted.
            encoded: whether shards of image tokens will do, which hold no pictures.
            skip_damaged: use the whole samples of truncated shards, and leave out unreadable ones.

        Raises:
            FileNotFoundError: a shard or folder is missing.
            ValueError: a shard is damaged, or has no picture or no caption at all; there are shards of image tokens
                where pictures are needed, among others, or made in another way than the others.
        """
        paths = expand_shards(shards)
        used: list[ShardIndex] = []
        report = DataReport()
        for path in paths:
            index, damage = _indexed(path, skip_damaged=skip_damaged)
            if damage is not None:
                report += DataReport(damaged_shards=(damage,))
            if index is not None:
                part, found = usable_part(index, captions=captions, encoded=encoded)
                report += found
                if part.keys:
                    used.append(part)
                elif damage is None:
                    raise ValueError(nothing_usable(index, found))
        if not used:
            raise ValueError(f"no usable shard among {len(paths)}: " + "; ".join(report.damaged_shards[:3]))
        report.log()
        return cls(used, report, captions=captions)

    def __len__(self) -> int:
        return len(self.keys)

    def _member(self, i: int, kind: int, max_bytes: int) -> bytes:
        """Return the bytes of one member of sample i."""
        if self.is_lost[i]:
            raise ValueError(f"{self.source(i)}: the sample is lost: its shard is missing or damaged; restore it")
        offset, size = self._places[i, kind].tolist()
        if size > max_bytes:
            raise ValueError(f"{self.source(i)} is too large ({size:,} bytes): expected at most {max_bytes:,}")
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
            if len(files) > _MAX_OPEN_FILES:
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
        return f"{self.shard_of(i)}: {self.names[i]}"

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
        kind = int(self._caption_kind[i])
        member = self._member(i, kind, MAX_TEXT_BYTES)
        try:
            captions = captions_of(member, is_json=kind == JSON)
        except CaptionError as error:
            raise ValueError(f"{self.source(i)}: its {error}") from error
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
            image_bytes=self._member(i, IMAGE, MAX_PICTURE_BYTES) if self.encoding is None else b"",
            captions=self.captions(i),
            source=self.source(i),
            image_tokens=None if self.encoding is None else self._image_tokens(i, self.encoding),
        )

    def _image_tokens(self, i: int, encoding: Encoding) -> NDArray[np.integer[Any]]:
        member = self._member(i, IMAGE, encoding.n_bytes)
        try:
            return unpack(member, encoding)
        except ValueError as error:
            raise ValueError(f"{self.source(i)}: {error}") from None

    def caption_members(self, i: int) -> dict[str, bytes]:
        """Return the bytes of the members with sample i's captions as they are: "txt", "json" or both.

        Raises:
            ValueError, OSError: they cannot be read any more.
        """
        kinds = {"txt": TEXT, "json": JSON}
        return {
            field: self._member(i, kind, MAX_TEXT_BYTES)
            for field, kind in kinds.items()
            if self._places[i, kind, 1] > 0
        }

    def samples_of(self, shard: int) -> range:
        """Return the numbers of the samples of `shards[shard]`."""
        return range(int(self._first[shard]), int(self._first[shard + 1]))

    def fingerprint(self, shard: int) -> str:
        """Return 16 hexadecimal digits of the keys, places and sizes in `shards[shard]`; only its headers are read."""
        samples = self.samples_of(shard)
        digest = hashlib.blake2b(repr(self.keys[samples.start : samples.stop]).encode(), digest_size=8)
        for kind in (IMAGE, TEXT, JSON):
            digest.update(self._places[samples.start : samples.stop, kind].astype("<i8").tobytes())
        return digest.hexdigest()

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch: (n,) int64, a permutation that depends on (seed, epoch, n) alone.

        The sample at position p of the endless sequence is `order(seed, p // n)[p % n]`.
        """
        bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
        # Sorting raw bits, because NumPy guarantees those across its versions and not Generator.permutation.
        return np.argsort(bits.random_raw(len(self)), kind="stable").astype(np.int64)


def _indexed(path: Path, *, skip_damaged: bool) -> tuple[ShardIndex | None, str | None]:
    """Return the index of a shard, None if nothing can be read, and the damage, None if it is whole.

    Raises:
        ValueError: it is damaged, unless `skip_damaged`; or as `index_shard`.
    """
    index: ShardIndex | None = None
    try:
        index = index_shard(path)
        if index.damage is None:
            return index, None
        damage = f"{path} {index.damage}: {len(index.keys):,} whole samples before it"
    except DamagedTarError as error:
        damage = str(error)
    if not skip_damaged:
        raise ValueError(f"{damage}; make it again, or pass --skip-damaged-shards to leave out what is damaged")
    logger.warning("shard left out: %s" if index is None else "%s, which are used", damage)
    return index, damage


def _common_encoding(shards: Sequence[ShardIndex]) -> Encoding | None:
    """Return the one encoding of all shards; None if they hold pictures.

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


def sample_rng(seed: int, epoch: int, key: str, purpose: str) -> np.random.Generator:
    """Return the generator of one sample in one epoch: the same in every process, whatever was drawn before.

    Args:
        seed: of the run.
        epoch: from 0.
        key: of the sample.
        purpose: names the use; different purposes draw independent numbers.
    """
    name = repr((int(seed), int(epoch), key, purpose)).encode()
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
