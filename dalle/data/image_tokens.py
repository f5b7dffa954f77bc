"""Shards of image tokens in place of pictures: how the tokens were made, and their bytes.

`training/stages/encode.py` writes such shards, `reader.py` reads them. The members, in this order:

    .encoded.json    `Description`; no sample's key begins with a dot
    KEY.txt          the captions, and KEY.json, byte for byte as in the shard of pictures
    KEY.tokens       the image tokens of every view of the picture
    …

KEY.tokens is an array (V,Y,X) of unsigned little-endian integers, two bytes each if the vocabulary allows it and four
otherwise, and then the CRC-32 of those bytes. It has no header: `Encoding` gives the shape, and a member of any other
size is refused. So it holds nothing to interpret or to execute.

Legend: V views of a picture, the centre crop first  Y,X grid of tokens
"""

import dataclasses
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from storage.stores.files import open_start
from storage.tar import DamagedTarError, Member, first_member

DESCRIPTION_MEMBER = ".encoded.json"
TOKENS_FIELD = "tokens"
FORMAT_VERSION = 1
"""Raised when shards of this version could no longer be read by the code before it."""
VIEWS = "resize_and_crop, then transformer_augmentation"
"""How views are taken; shards with other views are not mixed with these."""

_MAX_DESCRIPTION_BYTES = 1 << 16
_CHECKSUM_BYTES = 4
_BELOW = {"image_size": 1 << 16, "grid": 1 << 12, "vocab_size": 1 << 31, "crops": 1 << 16, "seed": 1 << 64}


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The way that image tokens were made; shards of equal encodings can be read together."""

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
    """The way that the views were taken."""

    def __post_init__(self) -> None:
        for name, end in _BELOW.items():
            value, least = getattr(self, name), 0 if name in ("crops", "seed") else 1
            if type(value) is not int or not least <= value < end:
                raise ValueError(f"{name} must be a whole number from {least} to {end - 1}, got {value!r}")
        for name in ("dvae_hash", "views"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(V,Y,X) of a picture's tokens."""
        return 1 + self.crops, self.grid, self.grid

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored tokens."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def n_bytes(self) -> int:
        """Size of a member."""
        return int(np.prod(self.shape)) * self.dtype.itemsize + _CHECKSUM_BYTES

    def differences(self, other: "Encoding") -> str:
        """Return the differences in words, such as "crops 4, not 8"; empty if the two are equal."""
        pairs = [(name, value, getattr(other, name)) for name, value in dataclasses.asdict(self).items()]
        return ", ".join(f"{name} {ours}, not {theirs}" for name, ours, theirs in pairs if ours != theirs)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of .encoded.json."""

    encoding: Encoding
    source: str
    """Name of the shard of pictures that the tokens were made of."""
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
    """Return the description in a tar file; None if it is no shard of image tokens. Reads the first member alone.

    Raises:
        ValueError: it is no tar file, or its description is damaged.
    """
    try:
        return description_in(shard, first_member(shard))
    except DamagedTarError as error:
        raise ValueError(f"{error}; delete it, or move it away") from error


def description_in(shard: Path, first: Member | None) -> Description | None:
    """Return the description in a shard whose first member is given; None if that member is another.

    Raises:
        ValueError: it is damaged.
    """
    if first is None or first.name != DESCRIPTION_MEMBER or not first.is_safe:
        return None
    with open_start(shard) as file:
        file.seek(first.offset)
        return Description.from_json(file.read(max(0, min(first.size, _MAX_DESCRIPTION_BYTES))), shard)


def pack(tokens_VYX: NDArray[np.integer[Any]], encoding: Encoding) -> bytes:
    """Return the bytes of a picture's (V,Y,X) tokens, integers in 0 … vocab_size-1."""
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
