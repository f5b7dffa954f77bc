"""The training objective: ⅛ of the text's and ⅞ of the image's cross entropy (Ramesh et al. 2021, §2.2, B.2).

Legend: B batch  T text positions  I image positions  V vocabulary  Y rows of the grid
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dalle.model import DALLE, DALLEConfig
from dalle.stream import IGNORED, text_targets

TEXT_WEIGHT = 1 / 8
IMAGE_WEIGHT = 7 / 8
"""The paper weighs the image more because images are the goal (§2.2)."""


@dataclass(frozen=True, kw_only=True)
class StreamLoss:
    """Losses of a batch in nats, scalars."""

    total: Tensor
    """The objective: ⅛ text + ⅞ image."""
    text: Tensor | None
    """Mean over all BPE tokens of the batch; 0 if all its captions are empty; None of a model that only reads them."""
    image: Tensor
    """Mean over all image tokens of the batch."""
    image_by_row: Tensor
    """Mean over the image tokens of each row of the grid, (Y,), without a gradient."""


def training_loss(model: DALLE, text: Tensor, image_tokens: Tensor) -> StreamLoss:
    """Return `stream_loss` of the model's logits, without holding them: less memory, the same numbers.

    Args:
        model: the transformer.
        text: int64 (B, T), text ids.
        image_tokens: int64 (B, I), raster order.

    Raises:
        ValueError: as `DALLE.forward`.
    """
    h_BSD = model.states(text, image_tokens)  # checks both
    targets_BT = text_targets(text, model.config.text_vocab)
    T = model.config.text_len
    text_sum, _ = model.text_head(h_BSD[:, :T], targets_BT)
    image_sum, losses_BI = model.image_head(h_BSD[:, T:], image_tokens)
    return _stream_loss(text_sum / _count(targets_BT), image_sum / image_tokens.numel(), losses_BI, model.config)


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
    summed = F.cross_entropy(text_logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    text_loss = summed / _count(targets_BT)
    losses_N = F.cross_entropy(image_logits.flatten(0, 1), image_tokens.flatten(), reduction="none")
    return _stream_loss(text_loss, losses_N.mean(), losses_N.view(image_tokens.shape), config)


def _stream_loss(text_loss: Tensor, image_loss: Tensor, losses_BI: Tensor, config: DALLEConfig) -> StreamLoss:
    return StreamLoss(
        total=TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss,
        text=text_loss,
        image=image_loss,
        image_by_row=losses_BI.detach().view(-1, config.grid, config.grid).mean(dim=(0, 2)),
    )


def _count(targets: Tensor) -> Tensor:
    """Return the number of targets, at least 1."""
    return (targets != IGNORED).sum().clamp(min=1)
