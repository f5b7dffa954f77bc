"""Reading shards: the samples of many, read by number.

`index.py` finds the samples of one shard; `ShardData` reads those of many, in any order, from any process. It knows a
shard by its counts, and opens the index when a sample is read: its memory does not grow with the samples. Only indexes
that are kept nowhere (`index_file.py`) stay in memory.

Indexes may come from a manifest (`training/data/manifest.py`), which knows samples that a shard has lost since, and the
checksums of all: a lost sample keeps its number and cannot be read, and changed bytes are noticed.
"""

import hashlib
import logging
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dalle.data.captions import MAX_TEXT_BYTES, CaptionError, captions_of
from dalle.data.image_tokens import Encoding, unpack
from dalle.data.index import IMAGE, JSON, TEXT, ShardIndex, checksum
from dalle.data.names import expand_shards
from dalle.data.order import MAX_FULL_SHUFFLE, Order
from dalle.data.shard import Shard, changed, common_encoding, in_threads, look_at
from dalle.data.usable import DataReport, fingerprint
from storage.read_ahead import ReadAhead
from storage.stores.files import is_remote_file, open_file, prefetch, warn_if_more_than_cache
from storage.tar import MAX_PICTURE_BYTES

logger = logging.getLogger(__name__)

_MAX_OPEN = 64
"""Files that a thread has open: far below the usual limit of 1,024 per process."""
_MAX_HELD = MAX_FULL_SHUFFLE
"""Samples whose indexes a thread holds, some 50 to 80 bytes each: all that are shuffled together, or some windows."""
_MOST_HELD = 8 * MAX_FULL_SHUFFLE
"""The same where more shards are read by turns."""


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


class _Open(threading.local):
    """The files and indexes of one thread, so that no thread closes what another one reads.

    Reading by `pread`, which moves no file position, makes inherited files safe after a fork.
    """

    def __init__(self) -> None:
        self.files: OrderedDict[int, BinaryIO] = OrderedDict()
        self.indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self.n_held = 0


class ShardData:
    """The samples of some shards, numbered from 0; threads and forked processes may read at once."""

    def __init__(self, shards: Sequence[Shard], report: DataReport, *, captions: bool) -> None:
        """Take shards with usable samples; `ShardData.open` makes them."""
        self.report = report
        self.encoding = common_encoding(shards)
        """The way that image tokens in place of pictures were made; None if there are pictures."""
        self.shards = [shard.path for shard in shards]
        self.has_captions = captions
        self.counts = [shard.n_samples for shard in shards]
        """Samples of each shard."""
        self._shards = shards
        self._first: list[int] = np.cumsum([0, *self.counts]).tolist()
        self._lost = {
            number: shard.index.lost
            for number, shard in enumerate(shards)
            if shard.index is not None and shard.index.lost is not None and shard.index.lost.any()
        }
        self._n_by_turns = 0
        self._open = _Open()
        self._ahead = ReadAhead()

    @classmethod
    def open(
        cls,
        shards: Sequence[str | Path],
        *,
        captions: bool,
        encoded: bool = False,
        skip_damaged: bool = False,
    ) -> "ShardData":
        """Index shards, or read the indexes that are kept of them.

        Args:
            shards: what `expand_shards` takes.
            captions: whether samples need captions; those without are left out and counted.
            encoded: whether shards of image tokens will do, which hold no pictures.
            skip_damaged: use the whole samples of truncated shards, and leave out unreadable ones.

        Raises:
            FileNotFoundError: a shard or folder is missing.
            StoreError (an OSError): a store cannot be used.
            ValueError: a shard is damaged, or has no picture or no caption at all; there are shards of image tokens
                where pictures are needed, among others, or made in another way than the others.
        """
        paths = expand_shards(shards)
        look = partial(look_at, captions=captions, encoded=encoded, skip_damaged=skip_damaged)
        used: list[Shard] = []
        reports: list[DataReport] = []
        for shard, found in in_threads(look, paths):
            reports.append(found)
            for damage in found.damaged_shards:
                logger.warning("%s, which are used" if found.n_samples else "shard left out: %s", damage)
            if shard is not None:
                used.append(shard)
        report = DataReport.total(reports)
        if not used:
            raise ValueError(f"no usable shard among {len(paths)}: " + "; ".join(report.damaged_shards[:3]))
        report.log()
        warn_if_more_than_cache(paths)
        return cls(used, report, captions=captions)

    def __len__(self) -> int:
        return self._first[-1]

    def _index(self, shard: int) -> ShardIndex:
        """Return the index of a shard's usable samples.

        Raises:
            ValueError, OSError: it cannot be read, or is another one than at the start.
        """
        known = self._shards[shard]
        if known.index is not None:
            return known.index
        held = self._open
        if shard in held.indexes:
            held.indexes.move_to_end(shard)
            return held.indexes[shard]
        assert known.load is not None
        index = known.load()
        if (len(index.keys), index.n_bytes) != (known.n_samples, known.n_bytes):
            raise changed(known.path)
        held.indexes[shard] = index
        held.n_held += known.n_samples
        while held.n_held > max(_MAX_HELD, min(_MOST_HELD, self._n_by_turns)) and len(held.indexes) > 1:
            held.n_held -= self.counts[held.indexes.popitem(last=False)[0]]
        return index

    def _at(self, i: int) -> tuple[int, ShardIndex, int]:
        """Return the shard of sample i, its index and the row of the sample in it."""
        shard = self.shard_number(i)
        return shard, self._index(shard), i - self._first[shard]

    def _member(self, i: int, kind: int, max_bytes: int) -> bytes:
        """Return the bytes of one member of sample i."""
        shard, index, row = self._at(i)
        if self.is_lost(i):
            raise ValueError(f"{self.source(i)}: the sample is lost: its shard is missing or damaged; restore it")
        offset, size = index.places[row, kind].tolist()
        if size > max_bytes:
            raise ValueError(f"{self.source(i)} is too large ({size:,} bytes): expected at most {max_bytes:,}")
        data = os.pread(self._file_of(shard), size, offset)
        if len(data) != size:
            raise ValueError(f"{self.source(i)}: the shard ends at byte {offset + len(data):,}, before the member does")
        if index.checksums is not None and checksum(data) != int(index.checksums[row, kind]):
            raise ValueError(
                f"{self.source(i)}: its bytes are not those that the manifest knows (another checksum): the shard has "
                "changed or is damaged; restore it"
            )
        return data

    def _file_of(self, shard: int) -> int:
        """Return the number of a shard's open file.

        Raises:
            ValueError: it has another size than it had when it was indexed.
            OSError: it cannot be opened.
        """
        files = self._open.files
        if shard in files:
            files.move_to_end(shard)
        else:
            file = open_file(self.shards[shard])
            if os.fstat(file.fileno()).st_size != self._shards[shard].n_bytes:
                file.close()
                raise changed(self.shards[shard])
            for other in [other for other in files if self._has_lost_its_place(other)]:
                files.pop(other).close()
            files[shard] = file
            if len(files) > _MAX_OPEN:
                files.popitem(last=False)[1].close()
        return files[shard].fileno()

    def _has_lost_its_place(self, shard: int) -> bool:
        """Return whether an open shard of a store has left the cache: the disk keeps its room until it is closed."""
        return is_remote_file(self.shards[shard]) and os.fstat(self._open.files[shard].fileno()).st_nlink == 0

    def read_ahead(self, shards: Sequence[int]) -> None:
        """Tell which shards are read soon, all of their samples, in the order of need; returns at once."""
        paths = [self.shards[shard] for shard in shards]
        prefetch(paths)
        self._ahead.want([path for path in paths if path.exists()])

    def by_turns(self, n_shards: int) -> None:
        """Tell how many shards are read by turns from now on, so that a thread holds their indexes together."""
        self._n_by_turns = sum(sorted(self.counts, reverse=True)[:n_shards])

    def key(self, i: int) -> str:
        """Return the key of sample i; may raise as `read`."""
        _, index, row = self._at(i)
        return index.keys[row]

    def name(self, i: int) -> str:
        """Return the member name of sample i's picture, or of its tokens; may raise as `read`."""
        _, index, row = self._at(i)
        return index.image_names[row]

    def source(self, i: int) -> str:
        """Return "SHARD: MEMBER" of sample i, for messages; may raise as `read`."""
        return f"{self.shard_of(i)}: {self.name(i)}"

    def shard_number(self, i: int) -> int:
        """Return the number of sample i's shard."""
        return bisect_right(self._first, i) - 1

    def shard_of(self, i: int) -> Path:
        """Return the shard of sample i."""
        return self.shards[self.shard_number(i)]

    def is_lost(self, i: int) -> bool:
        """Return whether a manifest knows sample i, and it cannot be read any more."""
        lost = self._lost.get(shard := self.shard_number(i))
        return lost is not None and bool(lost[i - self._first[shard]])

    def lost_in(self) -> dict[Path, int]:
        """Return the number of lost samples of each shard that has some."""
        return {self.shards[number]: int(lost.sum()) for number, lost in self._lost.items()}

    def captions(self, i: int) -> tuple[str, ...]:
        """Return the captions of sample i without reading its picture; () if the data was opened without.

        Raises:
            ValueError, OSError: they cannot be read any more.
        """
        if not self.has_captions:
            return ()
        _, index, row = self._at(i)
        kind = TEXT if index.places[row, TEXT, 1] > 0 else JSON
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
            key=self.key(i),
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
        _, index, row = self._at(i)
        kinds = {"txt": TEXT, "json": JSON}
        return {
            field: self._member(i, kind, MAX_TEXT_BYTES)
            for field, kind in kinds.items()
            if index.places[row, kind, 1] > 0
        }

    def samples_of(self, shard: int) -> range:
        """Return the numbers of the samples of `shards[shard]`."""
        return range(self._first[shard], self._first[shard + 1])

    def fingerprint(self, shard: int) -> str:
        """Return 16 hexadecimal digits of the keys, places and sizes in `shards[shard]`."""
        return self._shards[shard].fingerprint or fingerprint(self._index(shard))

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the full shuffle of an epoch: (n,) int64, a permutation that depends on (seed, epoch, n) alone."""
        return Order(self.counts, seed).epoch(epoch)


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
