"""What a shard of image tokens holds in place of pictures: how they were made, and their bytes.

`training/stages/encode.py` writes such shards, `dalle/data/reader.py` reads them. The members, in this order:

    .encoded.json    `Description`; no sample's key begins with a dot
    KEY.txt          the captions, and KEY.json, byte for byte as in the shard of pictures
    KEY.tokens       the image tokens of every view of the picture
    …

KEY.tokens is an array (V,Y,X) of unsigned little-endian integers, two bytes each if the vocabulary allows it and four
otherwise, and then the CRC-32 of those bytes. It has no header: `Encoding` says the shape, and a member of any other
size is refused. So there is nothing in it to interpret, let alone to execute.

Legend: V views of a picture, the centre crop first  Y,X grid of tokens
"""

import dataclasses
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from storage.tar import place_is_safe

DESCRIPTION_MEMBER = ".encoded.json"
TOKENS_FIELD = "tokens"
FORMAT_VERSION = 1
"""Raised when shards of this version could no longer be read by the code before it."""
VIEWS = "resize_and_crop, then transformer_augmentation"
"""Names how views are taken: views of another kind are not mixed with these."""

_LARGEST_DESCRIPTION_BYTES = 1 << 16
_CHECKSUM_BYTES = 4
_LARGEST = {"image_size": 1 << 16, "grid": 1 << 12, "vocab_size": 1 << 31, "crops": 1 << 16, "seed": 1 << 64}


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How image tokens were made; shards whose encodings are equal can be read together."""

    dvae_hash: str
    """`directory_hash` of the dVAE."""
    image_size: int
    """Side of a view, in pixels."""
    grid: int
    """Side of its grid of tokens."""
    vocab_size: int
    """Tokens are below it."""
    crops: int
    """Random views of each picture, besides the centre crop."""
    seed: int
    """Of the random views."""
    views: str = VIEWS
    """How they were taken."""

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value, least = getattr(self, name), 0 if name in ("crops", "seed") else 1
            if type(value) is not int or not least <= value < largest:
                raise ValueError(f"{name} must be a whole number from {least} to {largest - 1}, got {value!r}")
        for name in ("dvae_hash", "views"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(V,Y,X) of a picture's tokens."""
        return 1 + self.crops, self.grid, self.grid

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored tokens."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def n_bytes(self) -> int:
        """Size of a member."""
        return int(np.prod(self.shape)) * self.dtype.itemsize + _CHECKSUM_BYTES

    def differences(self, other: "Encoding") -> str:
        """Return what differs, in words: "crops 4, not 8"; empty if nothing does."""
        pairs = [(name, value, getattr(other, name)) for name, value in dataclasses.asdict(self).items()]
        return ", ".join(f"{name} {ours}, not {theirs}" for name, ours, theirs in pairs if ours != theirs)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What .encoded.json says of its shard."""

    encoding: Encoding
    """How its tokens were made."""
    source: str
    """Name of the shard of pictures it was made of."""
    source_fingerprint: str
    """`ShardData.fingerprint` of that shard."""

    def to_json(self) -> bytes:
        """Return the member's bytes."""
        return json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes, shard: Path) -> Self:
        """Read the bytes that `to_json` made.

        Raises:
            ValueError: they are something else; names the shard.
        """
        try:
            record = json.loads(text)
            version = record.pop("format")
            if version != FORMAT_VERSION:
                raise _OtherFormatError(f"is of format {version!r}, and this version reads {FORMAT_VERSION}")
            encoding = Encoding(**record.pop("encoding"))
            if not all(isinstance(value, str) for value in record.values()):
                raise ValueError("source and source_fingerprint must be texts")
            return cls(encoding=encoding, **record)
        except _OtherFormatError as error:
            raise ValueError(f"{shard} {error}: update the program, or encode the pictures again") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{shard}: its {DESCRIPTION_MEMBER} is damaged ({error}): make it again with `dalle-train encode`"
            ) from error


class _OtherFormatError(Exception):
    """The description was written by another version; no ValueError, so that it is told apart from damage."""


def read_description(shard: Path) -> Description | None:
    """Return what a tar file says of its image tokens; None if it is no shard of image tokens.

    Only the first member is read.

    Raises:
        ValueError: it is no tar file, or its description is damaged.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            first = tar.next()
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{shard} is not a tar file ({error}): delete it, or move it away") from error
    return description_in(shard, first)


def description_in(shard: Path, first: tarfile.TarInfo | None) -> Description | None:
    """Return the description in a shard whose first member is given; None if that member is none.

    Raises:
        ValueError: it is damaged.
    """
    if first is None or first.name != DESCRIPTION_MEMBER or not place_is_safe(first):
        return None
    with shard.open("rb") as file:
        file.seek(first.offset_data)
        return Description.from_json(file.read(max(0, min(first.size, _LARGEST_DESCRIPTION_BYTES))), shard)


def pack(tokens_VYX: NDArray[np.integer[Any]], encoding: Encoding) -> bytes:
    """Return the member of a picture's tokens, integers in 0 … vocab_size-1."""
    assert tokens_VYX.shape == encoding.shape
    assert 0 <= tokens_VYX.min() <= tokens_VYX.max() < encoding.vocab_size
    data = tokens_VYX.astype(encoding.dtype).tobytes()
    return data + zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little")


def unpack(member: bytes, encoding: Encoding) -> NDArray[np.integer[Any]]:
    """Return the (V,Y,X) tokens of a member that `pack` made; the array cannot be written to.

    Raises:
        ValueError: it was cut or changed, or is of another dVAE.
    """
    views, grid, _ = encoding.shape
    if len(member) != encoding.n_bytes:
        raise ValueError(
            f"{len(member):,} bytes of image tokens, expected {encoding.n_bytes:,} for {views} views of {grid}×{grid}: "
            "make the shard again with `dalle-train encode`"
        )
    data, checksum = member[:-_CHECKSUM_BYTES], int.from_bytes(member[-_CHECKSUM_BYTES:], "little")
    if zlib.crc32(data) != checksum:
        raise ValueError(
            "its image tokens are damaged (another checksum): make the shard again with `dalle-train encode`"
        )
    tokens_VYX: NDArray[np.integer[Any]] = np.frombuffer(data, encoding.dtype).reshape(encoding.shape)
    if tokens_VYX.max() >= encoding.vocab_size:
        raise ValueError(
            f"image tokens up to {tokens_VYX.max()}, expected 0 … {encoding.vocab_size - 1}: are they of another dVAE?"
        )
    return tokens_VYX
