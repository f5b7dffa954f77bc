"""The training objective: ⅛ of the text's and ⅞ of the image's cross entropy (Ramesh et al. 2021, §2.2, B.2).

Legend: B batch  T text positions  I image positions  V vocabulary
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dalle.model import DALLEConfig
from dalle.stream import IGNORED, text_targets

TEXT_WEIGHT = 1 / 8
IMAGE_WEIGHT = 7 / 8
"""The image matters more: it is what the model is for (§2.2)."""


@dataclass(frozen=True, kw_only=True)
class StreamLoss:
    """Losses of a batch in nats, scalars."""

    total: Tensor
    """What is minimised: ⅛ text + ⅞ image."""
    text: Tensor
    """Mean over all BPE tokens of the batch; 0 if all its captions are empty."""
    image: Tensor
    """Mean over all image tokens of the batch."""


def stream_loss(
    text_logits: Tensor, image_logits: Tensor, text: Tensor, image_tokens: Tensor, config: DALLEConfig
) -> StreamLoss:
    """Return the loss of a batch; each part is divided by the number of targets of that kind in the batch.

    Args:
        text_logits: float32 (B, T, V_text) of `DALLE.forward`.
        image_logits: float32 (B, I, V_image) of `DALLE.forward`.
        text: int64 (B, T), the text ids the model was given. Pads are not targets.
        image_tokens: int64 (B, I), the image tokens the model was given.
        config: the model's.
    """
    targets_BT = text_targets(text, config.text_vocab)
    n_targets = (targets_BT != IGNORED).sum().clamp(min=1)
    summed = F.cross_entropy(text_logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    text_loss = summed / n_targets
    image_loss = F.cross_entropy(image_logits.flatten(0, 1), image_tokens.flatten())
    return StreamLoss(total=TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss, text=text_loss, image=image_loss)
