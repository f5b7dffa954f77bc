"""CLIP's objective: choose each image's caption, and each caption's image, among those of the batch.

Letters: B batch  M wrong captions of an image  N = B+M  E features
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    wrong_cosines: Tensor | None = None,
    is_wrong: Tensor | None = None,
) -> Tensor:
    """Symmetric cross-entropy over all pairs of a batch (figure 3 of Radford et al. 2021).

    Row i of both belongs together; every other row is a negative. For the whole batch of several processes as
    negatives, gather the features first (with gradients) and pass the gathered ones.

    An image may have wrong captions of its own, hard negatives: each is one more caption to choose from for this image
    (in Yuksekgonul et al. 2023, arXiv 2210.01936, 4.1, they are negatives for all images of the batch).

    Args:
        image_features: (B, E), unit length.
        text_features: (B, E), unit length.
        logit_scale: scalar factor of the cosines: the third result of `CLIP.forward`, not its logarithm.
        wrong_cosines: (B, M), the cosines of each image with its own wrong captions; None if it has none.
        is_wrong: (B, M) bool; False where an image has no such caption: the cosine is ignored.

    Returns:
        Scalar in nats: mean of choosing each image's caption, ln(B + M) at chance, and each caption's image, ln B.

    Raises:
        ValueError: the two shapes differ, or those of wrong_cosines and is_wrong do not fit.
    """
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"image features {tuple(image_features.shape)} and text features {tuple(text_features.shape)} "
            "must have the same shape: one caption per image"
        )
    logits_BB = logit_scale * image_features @ text_features.T
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    to_texts_BN = logits_BB
    if wrong_cosines is not None:
        if is_wrong is None or is_wrong.shape != wrong_cosines.shape or len(is_wrong) != len(own_B):
            raise ValueError(
                f"wrong_cosines {tuple(wrong_cosines.shape)} need an is_wrong of the same shape, "
                f"{len(own_B)} rows as there are images; got {None if is_wrong is None else tuple(is_wrong.shape)}"
            )
        wrong_BM = (logit_scale * wrong_cosines).masked_fill(~is_wrong, -torch.inf)
        to_texts_BN = torch.cat([logits_BB, wrong_BM], dim=1)
    return (F.cross_entropy(to_texts_BN, own_B) + F.cross_entropy(logits_BB.T, own_B)) / 2
