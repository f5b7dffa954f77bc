"""Checking one shard: it is read to its end, and every picture and caption in it is decoded."""

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dalle.data.captions import (
    BLANK,
    MAX_TEXT_BYTES,
    NO_CAPTION,
    NOT_IN_JSON,
    TOO_LARGE,
    CaptionError,
    captions_of,
)
from dalle.data.image_tokens import unpack
from dalle.data.index import IMAGE, JSON, NO_PICTURE, TEXT, ShardIndex, checksum, index_shard
from dalle.tokenizer import Tokenizer
from dvae.images import PictureError, open_image
from storage.stores.errors import StoreError, WrongBytesError
from storage.stores.files import open_file
from storage.tar import MAX_PICTURE_BYTES
from training.data.record import Counts, ShardRecord

SUBJECTS = (
    *("samples", "unusable pictures", "unusable captions", "caption characters", "caption words", "caption tokens"),
    *("shorter side", "aspect ratio"),
)
ASPECT_RATIOS = ((0.25, "below 1/4"), (0.5, "1/4 to 1/2"), (1.0, "1/2 to 1"), (2.0, "1 to 2"), (4.0, "2 to 4"))
"""Upper ends and names of the ranges that width ÷ height is counted in, besides "above 4"; 1/2 and 2 are inside."""
UNREADABLE = -1
"""In place of the time of the last change of a shard that could not be read: it is tried again."""
_EXACT_LENGTHS = 1000  # longer captions are counted by two digits of their lengths


def check_shard(path: Path, tokenizer: Tokenizer | None = None) -> ShardRecord:
    """Read a shard to its end, and decode every picture and every caption in it.

    Args:
        path: the tar file; damage, even of all of it, is part of the record, and so are errors of the disk and wrong
            bytes of a store.
        tokenizer: counts the captions' tokens.

    Raises:
        StoreError: its store cannot be used.
    """
    hash_ = None if tokenizer is None else tokenizer.hash
    try:
        with open_file(path) as file:
            status = os.fstat(file.fileno())
            try:
                index = index_shard(path)
            except ValueError as error:
                index = _nothing(path, status.st_size, str(error).removeprefix(f"{path} "))
            check = _Check(index, file, tokenizer)
            problems = {i: problem for i in range(len(index.keys)) if (problem := check.sample(i)) is not None}
    except StoreError:
        raise
    except (OSError, WrongBytesError) as error:
        index = _nothing(path, 0, f"cannot be read ({getattr(error, 'strerror', None) or error})")
        return ShardRecord(index=index, changed_ns=UNREADABLE, problems={}, counts={}, tokenizer=hash_)
    check.count_samples()
    return ShardRecord(
        index=dataclasses.replace(index, checksums=check.checksums, has_caption=check.has_caption),
        changed_ns=status.st_mtime_ns,
        problems=problems,
        counts=check.counts,
        tokenizer=hash_,
    )


def _nothing(path: Path, n_bytes: int, damage: str) -> ShardIndex:
    """Return the index of a shard of which nothing can be read."""
    return ShardIndex(
        path=path,
        n_bytes=n_bytes,
        tokens=None,
        keys=(),
        image_names=(),
        places=np.zeros((0, 3, 2), dtype=np.int64),
        n_ignored=0,
        n_duplicates=0,
        damage=damage,
        has_caption=np.zeros(0, dtype=bool),
        checksums=np.zeros((0, 3), dtype=np.uint64),
    )


class _Check:
    """Checks the samples of one shard, and counts.

    Args:
        index: of the shard.
        file: the shard, opened.
        tokenizer: counts the captions' tokens.
    """

    def __init__(self, index: ShardIndex, file: BinaryIO, tokenizer: Tokenizer | None) -> None:
        n = len(index.keys)
        self._index, self._file, self._tokenizer = index, file, tokenizer
        self._caption_kind = index.caption_kind
        self.counts: Counts = {subject: Counter() for subject in SUBJECTS}
        self.checksums: NDArray[np.uint64] = np.zeros((n, 3), dtype=np.uint64)
        self.has_caption: NDArray[np.bool_] = np.zeros(n, dtype=bool)

    def count_samples(self) -> None:
        """Count the samples by their members."""
        index = self._index
        has_image, has_text = index.has_image, index.places[:, 1:, 1].any(axis=1)
        self.counts["samples"] = Counter(
            {
                "keys": len(index.keys),
                "pairs": int((has_image & self.has_caption).sum()),
                "pictures without a caption": int((has_image & ~has_text).sum()),
                "captions without a picture": int((~has_image & has_text).sum()),
                "members that come twice": index.n_duplicates,
                "links, devices and unsafe names": index.n_ignored,
            }
        )

    def sample(self, i: int) -> str | None:
        """Check sample i; returns its problem, None if it can be used."""
        contents = [self._content(i, kind) for kind in (IMAGE, TEXT, JSON)]
        picture = self._picture(i, contents[IMAGE])
        caption = self._caption(i, contents[self._caption_kind[i]])
        for problem, subject in ((picture, "unusable pictures"), (caption, "unusable captions")):
            if problem is not None and not problem.startswith("no "):
                self.counts[subject][problem.partition(" ")[2]] += 1
        self.has_caption[i] = caption is None
        return self._index.problems.get(i) or caption or picture

    def _content(self, i: int, kind: int) -> bytes | None:
        """Return the bytes of a member, and note their checksum; None if it is missing or too large."""
        offset, size = self._index.places[i, kind].tolist()
        if not 0 < size <= (MAX_PICTURE_BYTES if kind == IMAGE else MAX_TEXT_BYTES):
            return None
        data = os.pread(self._file.fileno(), size, offset)
        self.checksums[i, kind] = checksum(data)
        return data

    def _picture(self, i: int, data: bytes | None) -> str | None:
        """Decode a picture or its tokens; returns the problem."""
        if data is None:
            return "picture is too large" if self._index.has_image[i] else NO_PICTURE
        if self._index.tokens is not None:
            try:
                unpack(data, self._index.tokens.encoding)
            except ValueError:
                return "picture has damaged image tokens"
            return None
        try:
            width, height = open_image(data, "picture").size
        except PictureError as error:
            return f"picture {error.problem}"
        except OSError:
            return "picture is damaged"
        low = 1 << (min(width, height).bit_length() - 1)
        self.counts["shorter side"][f"{low} to {2 * low - 1}"] += 1
        ratio = width / height
        is_below = (name for end, name in ASPECT_RATIOS if ratio < end or (ratio == end >= 1))
        self.counts["aspect ratio"][next(is_below, "above 4")] += 1
        return None

    def _caption(self, i: int, text: bytes | None) -> str | None:
        """Read a sample's captions as training does, from the text or else the JSON; returns the problem."""
        is_json = bool(self._caption_kind[i] == JSON)
        if text is None:
            return TOO_LARGE if self._index.places[i, self._caption_kind[i], 1] > 0 else NO_CAPTION
        try:
            captions = captions_of(text, is_json=is_json)
        except CaptionError as error:
            return error.reason
        for caption in captions:
            self.counts["caption characters"][_length(len(caption))] += 1
            self.counts["caption words"][_length(len(caption.split()))] += 1
            if self._tokenizer is not None:
                self.counts["caption tokens"][_length(len(self._tokenizer.encode(caption)))] += 1
        if captions:
            return None
        return NOT_IN_JSON if is_json else BLANK


def _length(n: int) -> str:
    """Return the number that a length is counted as: itself, or rounded down to two digits."""
    if n < _EXACT_LENGTHS:
        return str(n)
    unit = 10 ** (len(str(n)) - 2)
    return str(n // unit * unit)
