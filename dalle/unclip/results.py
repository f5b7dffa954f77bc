"""What DALL·E 2 returns beside ranked candidates.

Letters: N pictures  K kept ones  H, W pixels
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dalle.best_of_n import Ranked
from dalle.editing.regions import Region


@dataclass(frozen=True, kw_only=True, repr=False)
class Edited(Ranked):
    """The best K edits of a picture."""

    region: Region
    """What was drawn anew of what, in the size of the pictures."""
    seams: Tensor
    """float32 (K,): see `Region.seams`."""

    def described(self) -> list[dict[str, Any]]:
        """Return what is to be said of each picture."""
        return [{**said, "seam": seam} for said, seam in zip(super().described(), self.seams.tolist(), strict=True)]


@dataclass(frozen=True, kw_only=True, repr=False)
class Series:
    """N pictures that were drawn of others, in order; on the CPU."""

    caption: str
    """What they lead to; empty for no caption."""
    images: Tensor
    """float32 (N, 3, H, W) in [0, 1]."""
    scores: Tensor
    """float32 (N,): CLIP's cosine of each picture with the embedding that it was drawn of, or with the caption that the
    best were chosen by."""
    each: tuple[Mapping[str, float], ...]
    """What each was drawn by, first what tells them apart: its theta, its number as a candidate, or how many principal
    components."""

    def __repr__(self) -> str:
        n, _, height, width = self.images.shape
        name = next(iter(self.each[0]))
        first, last = self.each[0][name], self.each[-1][name]
        return f"Series({n} of {width}×{height} pixels, {name} {first:g}, {name} {last:g})"

    def described(self) -> list[dict[str, Any]]:
        """Return what is to be said of each picture."""
        return [{"score": score, **said} for score, said in zip(self.scores.tolist(), self.each, strict=True)]
