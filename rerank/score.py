"""Cosines of captions and images under a CLIP: all that reranking needs (§2.6 of Ramesh et al. 2021).

Letters: C captions  N images  E features
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rerank.model import CLIP
from rerank.pixels import check_images


def score(clip: CLIP, captions: Sequence[str], images: Tensor, *, batch_size: int = 64) -> Tensor:
    """Score how well each image fits each caption; to rerank, sort a row in descending order.

    Args:
        clip: the model, with its tokenizer; it computes on the device it is on.
        captions: C captions.
        images: float (N, 3, H, W) in [0, 1], any size, any device.
        batch_size: captions or images encoded at once; it bounds memory and does not change the result.

    Returns:
        float32 (C, N) in [-1, 1], cosine similarities, on the device of the model.

    Raises:
        ValueError: no captions or images, images of another shape or range, or a CLIP without a tokenizer.
    """
    features_CE = embed_captions(clip, captions, batch_size=batch_size)
    features_NE = embed_images(clip, images, batch_size=batch_size)
    return features_CE @ features_NE.T


@torch.no_grad()
def embed_captions(clip: CLIP, captions: Sequence[str], *, batch_size: int = 64) -> Tensor:
    """Return unit features of captions, float32 (C, E) on the device of the model; long captions are cut (logged).

    Raises:
        ValueError: no captions, or a CLIP without a tokenizer.
    """
    if clip.tokenizer is None:
        raise ValueError("this CLIP cannot read captions: give it a tokenizer, CLIP(config, tokenizer)")
    if len(captions) == 0:
        raise ValueError("no captions to score: give at least one")
    _check_batch_size(batch_size)
    ids_CL = clip.tokenizer.tokenize(captions, clip.config.context_length)
    return torch.cat([clip.encode_text(ids_BL.to(clip.device)) for ids_BL in torch.split(ids_CL, batch_size)])


@torch.no_grad()
def embed_images(clip: CLIP, images: Tensor, *, batch_size: int = 64) -> Tensor:
    """Return unit features of images (N, 3, H, W) in [0, 1], float32 (N, E) on the device of the model.

    Raises:
        ValueError: no images, or images of another shape or range.
    """
    if len(images) == 0:
        raise ValueError("no images to score: give at least one")
    _check_batch_size(batch_size)
    check_images(images)  # before they are on a GPU, where only their shape is looked at
    batches = torch.split(images, batch_size)
    return torch.cat([clip.encode_image(images_BCHW.to(clip.device)) for images_BCHW in batches])


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
