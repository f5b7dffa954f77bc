"""Features and moments of reference pictures, kept in a folder: computed once for a list, a profile and weights."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dalle.evaluation.numbers.moments import Moments

logger = logging.getLogger(__name__)

_KEY, _FEATURES, _CONTENT = "key", "features", "sha256"


@dataclass(frozen=True, kw_only=True)
class ReferenceKey:
    """What the features of a reference depend on, but for the last bits, which differ by device and by version."""

    pictures: str
    """By `picture_list_hash`."""
    profile: str
    """Its name."""
    crop: str
    side: int
    """Pixels at which the pictures are cropped and blurred."""
    radius: float
    """Of the blur."""
    network: str
    """Its name."""
    weights: str
    """Its hash."""
    batch_size: int

    @property
    def digest(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def text(self) -> str:
        """The same for people, as JSON."""
        return json.dumps({**dataclasses.asdict(self), "radius": float(self.radius)}, sort_keys=True)


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference, ready to be compared with."""

    moments: Moments
    features: Tensor
    """float32 (M,D), for floors, kernels and neighbours."""
    from_cache: bool
    digest: str
    """Of its key."""

    @property
    def note(self) -> str:
        """Return what is to be shown of it: "reference: 5,000 pictures, from cache, 3f2a91bc"."""
        origin = "from cache" if self.from_cache else "computed now"
        return f"reference: {self.moments.n:,} pictures, {origin}, {self.digest[:8]}"


def picture_list_hash(pictures: Iterable[tuple[str, bytes]]) -> str:
    """Return the sha256 of a list of pictures: their names and the bytes of their files, in this order."""
    total = hashlib.sha256()
    for name, data in pictures:
        for part in (name.encode(errors="surrogatepass"), data):  # names of files need not be Unicode
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def reference(key: ReferenceKey, compute: Callable[[], Tensor], folder: Path | None) -> Reference:
    """Return a reference from the folder, or compute it and keep it there.

    A file that is damaged, or of another key, is computed again, and a warning says so.

    Args:
        key: what it is of.
        compute: returns its features (M,D).
        folder: made if it is missing; None keeps nothing.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: the features are no (M,D) of finite numbers.
    """
    if folder is not None and (kept := _read(_file(folder, key), key)) is not None:
        return kept
    features_MD = compute().float().cpu()
    moments = Moments.of(features_MD)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        about = {_KEY: key.text, _CONTENT: _content(moments, features_MD)}
        moments.save(_file(folder, key), about, also={_FEATURES: features_MD.contiguous()})
    return Reference(moments, features_MD, False, key.digest)


def _file(folder: Path, key: ReferenceKey) -> Path:
    return folder / f"reference-{key.digest[:16]}.safetensors"


def _content(moments: Moments, features_MD: Tensor) -> str:
    """Return the sha256 of the numbers of a file, which safetensors has no sum of."""
    total = hashlib.sha256(str(moments.n).encode())
    for tensor in (moments.mean, moments.comoment, features_MD):
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()


def _read(file: Path, key: ReferenceKey) -> Reference | None:
    if not file.is_file():
        return None
    try:
        moments, about = Moments.load(file)
        with safe_open(file, framework="pt") as opened:
            features_MD: Tensor = opened.get_tensor(_FEATURES).clone()
    except (ValueError, SafetensorError) as error:
        logger.warning("%s is computed again: %s", file, error)
        return None
    if about.get(_CONTENT) != _content(moments, features_MD):
        logger.warning("%s is computed again: its numbers are damaged", file)
        return None
    if about.get(_KEY) != key.text:
        logger.warning("%s is computed again: it is of %s, not of %s", file, about.get(_KEY), key.text)
        return None
    return Reference(moments, features_MD, True, key.digest)
