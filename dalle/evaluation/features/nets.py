"""Networks as makers of features: what a number needs to know of one, and pictures through it in batches of one size.

Letters: B batch  N pictures  D features  K classes  H, W pixels
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dalle.data.pictures import in_batches
from dalle.evaluation.features.inception import FEATURES, Inception
from dalle.evaluation.features.resize import Resize, check_bytes, resized
from rerank import CLIP

BATCH_SIZE = 32
"""Pictures in every batch, the last one too: the size changes features by some 1e-5."""


class FeatureNet(Protocol):
    """A network that makes features of pictures."""

    @property
    def name(self) -> str:
        """What numbers call it, with everything that is done to pictures inside, such as inception-tf."""

    @property
    def hash(self) -> str:
        """Hexadecimal digits that name its weights, at least 8."""

    @property
    def dimension(self) -> int:
        """D."""

    def features(self, images: Tensor) -> Tensor:
        """Return features, float32 (B,D) on the CPU, of pictures uint8 (B,3,H,W)."""


@dataclass(frozen=True, eq=False)
class CLIPFeatures:
    """The image tower of a CLIP: unit features."""

    clip: CLIP
    hash: str
    """Of its directory, by `directory_hash`."""
    name: str = "own-clip"

    @property
    def dimension(self) -> int:
        """D."""
        return self.clip.config.embed_dim

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return unit features, float32 (B,D) on the CPU, of pictures uint8 (B,3,H,W)."""
        check_bytes(images)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.clip.encode_image(images.to(self.clip.device).float() / 255).cpu()


@dataclass(frozen=True, eq=False)
class InceptionFeatures:
    """Inception v3 with a resize and a map of bytes to what it computes with."""

    net: Inception
    hash: str
    """The sha256 of its file."""
    name: str
    resize: Resize
    pixels: Callable[[Tensor], Tensor]
    """Maps float32 (B,3,H,W) in 0 … 255."""
    dimension: int = FEATURES

    def features(self, images: Tensor) -> Tensor:
        """Return the last pool's features, float32 (B,2048) on the CPU, of pictures uint8 (B,3,H,W)."""
        return self.features_and_logits(images)[0]

    @torch.no_grad()
    def features_and_logits(self, images: Tensor, *, bias: bool = False) -> tuple[Tensor, Tensor]:
        """Return features (B,2048) and logits (B,K), float32 on the CPU, of pictures uint8 (B,3,H,W).

        For both of many pictures in one pass, give `in_equal_batches` a function that joins them, torch.cat(…, 1).

        Args:
            images: of any size.
            bias: whether the logits have the last layer's bias; the usual Inception Score is of those without.
        """
        check_bytes(images)
        device = self.net.fc.weight.device
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features_BD = self.net(self.pixels(resized(images.to(device), self.resize)))
            logits_BK = self.net.logits(features_BD, bias=bias)
        return features_BD.cpu(), logits_BK.cpu()


def in_equal_batches(
    compute: Callable[[Tensor], Tensor],
    images: Iterable[Tensor],
    *,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Compute rows of pictures, always `batch_size` at once, so that rows of a shard do not depend on its size.

    The last batch is filled up with its last picture, whose rows are dropped.

    Args:
        compute: a batch uint8 (B,3,H,W) to rows (B,D), such as `net.features`.
        images: N pictures uint8 (3,H,W) of one size, read as they are needed.
        batch_size: B.
        progress: called with the number of pictures done.

    Returns:
        (N,D)

    Raises:
        ValueError: there are no pictures, they are of several sizes, or batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    rows, done, shape = [], 0, None
    for batch in in_batches(images, batch_size):
        for number, image in enumerate(batch, done):
            shape = image.shape if shape is None else shape
            if image.shape != shape:
                raise ValueError(
                    f"picture {number} is of shape {tuple(image.shape)}, those before of {tuple(shape)}: "
                    "make all of one size, with `prepared`"
                )
        filled_BCHW = torch.stack(batch + batch[-1:] * (batch_size - len(batch)))
        rows.append(compute(filled_BCHW)[: len(batch)])
        done += len(batch)
        if progress is not None:
            progress(done)
    if not rows:
        raise ValueError("no pictures to make features of: give at least one")
    return torch.cat(rows)
