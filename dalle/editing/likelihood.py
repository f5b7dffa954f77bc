"""How likely a bundle's transformer takes pictures to be after a caption, token by token.

The text part of a model that has met no empty caption in training knows nothing of "without caption"; the numbers are
told all the same. Not in the paper.

Letters: N pictures  I image positions  Y rows of tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import check_caption
from dalle.family.tokenizers import text_of
from dalle.sampler.likelihood import log_likelihoods
from dvae.images import resize_and_crop, to_tensor

if TYPE_CHECKING:
    from dalle.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True, repr=False)
class Likelihood:
    """Of N pictures; all tensors are on the CPU."""

    tokens: Tensor
    """int64 (N, I): the pictures as the transformer sees them, raster order."""
    with_caption: Tensor
    """float32 (N, I), nats: log p(token | those before it, caption)."""
    without_caption: Tensor
    """float32 (N, I): the same after the empty caption."""

    def __repr__(self) -> str:
        return f"Likelihood({len(self.tokens)} pictures, {float(self.with_caption.mean()):.3f} nats per token)"

    def by_row(self, grid: int) -> Tensor:
        """Return the sums of rows of tokens with the caption, float32 (N, Y), for Y = grid."""
        return self.with_caption.reshape(-1, grid, grid).sum(-1)


def likelihood(pipe: "Pipeline", caption: str, images: Sequence[Image.Image]) -> Likelihood:
    """Do what `Pipeline.likelihood` does."""
    check_caption(caption)
    if not images:
        raise ValueError("no pictures: give at least one")
    side, device = pipe.dvae.config.image_size, pipe.dalle.device
    texts = [text_of(pipe.tokenizer, [caption], pipe.dalle), pipe.dalle.config.null_caption()[None]]
    size = pipe.default_batch_size(len(images))
    tokens: list[Tensor] = []
    found: list[list[Tensor]] = [[], []]
    for first in range(0, len(images), size):
        some = [to_tensor(resize_and_crop(image, side)) for image in images[first : first + size]]
        tokens_NI = torch.cat([pipe.dvae.encode(one[None].to(device)).flatten(1) for one in some])
        tokens.append(tokens_NI.cpu())
        for each, text_1T in zip(found, texts, strict=True):
            each.append(log_likelihoods(pipe.dalle, text_1T, tokens_NI).cpu())
    with_caption, without = (torch.cat(each) for each in found)
    return Likelihood(tokens=torch.cat(tokens), with_caption=with_caption, without_caption=without)
