"""Real pictures to compare with: those of shards, or moments that someone has computed of them.

Letters: M pictures  D features
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dalle.data.reader import ShardData
from dalle.evaluation.distances import Reference
from dalle.evaluation.features.nets import BATCH_SIZE
from dalle.evaluation.features.profiles import SIDE
from dalle.evaluation.features.reference import ReferenceKey, picture_list_hash, reference
from dalle.evaluation.networks import PictureNetwork
from dalle.evaluation.numbers.moments import Moments
from dalle.output.progress import progress_bar
from dvae.images import open_image
from storage.exclusions import Excluded


class RealPictures:
    """The pictures of some shards as a reference at any radius, kept in a folder between runs.

    Args:
        data: the shards; every picture must be readable.
        network: makes their features.
        cache: the folder; None keeps nothing.
    """

    def __init__(self, data: ShardData, network: PictureNetwork, cache: Path | None) -> None:
        self._data, self._network, self._cache = data, network, cache
        self._notes: dict[float, str] = {}

    @cached_property
    def hash(self) -> str:
        """Hash of the list of pictures; all are read once."""
        data = self._data
        return picture_list_hash((data.name(i), data.read(i).image_bytes) for i in range(len(data)))

    def at(self, radius: float, keep: Tensor | None = None) -> Reference:
        """Return the reference at a radius of the blur; of the pictures where bool (M,) `keep` is True.

        Raises:
            ValueError: a picture cannot be read.
        """
        key = ReferenceKey(
            pictures=self.hash,
            profile=self._network.profile.name,
            crop=self._network.profile.crop,
            side=SIDE,
            radius=radius,
            network=self._network.net.name,
            weights=self._network.net.hash,
            batch_size=BATCH_SIZE,
        )
        found = reference(key, lambda: self._features(radius), self._cache)
        note = self._notes.setdefault(radius, found.note)  # what is computed now is in the cache a moment later
        if keep is None:
            return Reference(moments=found.moments, features=found.features, note=note)
        kept = found.features[keep]
        return Reference(moments=Moments.of(kept), features=kept, note=f"{note}, {len(kept):,} of them kept")

    def _features(self, radius: float) -> Tensor:
        n = len(self._data)
        with progress_bar("reference pictures") as progress:
            return self._network(self._images(), radius, lambda done: progress(done, n))["features"]

    def _images(self) -> Iterator[Image.Image]:
        for i in range(len(self._data)):
            sample = self._data.read(i)
            yield open_image(sample.image_bytes, sample.source)


def stored_reference(path: Path, network: PictureNetwork) -> Reference:
    """Return the reference whose moments are in a file: at radius 0 alone, without floor, KID and neighbours.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no moments, or those of other features.
    """
    moments, _ = Moments.load(path)
    if moments.dimension != network.net.dimension:
        raise ValueError(
            f"{path} has moments of {moments.dimension} features, but {network.net.name} makes "
            f"{network.net.dimension}: give moments that were computed with this network"
        )
    return Reference(moments=moments, features=None, note=f"reference: moments of {moments.n:,} pictures in {path}")


def kept_of(data: ShardData, lists: Sequence[Path]) -> Tensor:
    """Return which samples of some shards no list leaves out, bool (M,).

    Raises:
        FileNotFoundError, ValueError: as `Excluded.read`.
    """
    excluded = Excluded.read(lists)
    kept: list[bool] = []
    first = 0
    for shard, count in zip(data.shards, data.counts, strict=True):
        keys = [data.key(i) for i in range(first, first + count)]
        kept += (~excluded.rows(keys, shard.resolve().as_posix())).tolist()
        first += count
    return torch.tensor(kept)
