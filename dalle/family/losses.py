"""What any transformer of the family is trained to minimise.

Legend: B batch  T text positions  I image positions  Y rows of the grid
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.family.dalle_pytorch.model import DALLEPytorch
from dalle.family.mini.model import DALLEMini
from dalle.family.transformers import Transformer
from dalle.loss import IMAGE_WEIGHT, TEXT_WEIGHT, StreamLoss
from dalle.loss import training_loss as stream_training_loss
from dalle.model import DALLE
from dalle.stream import IGNORED


def training_loss(model: Transformer, text: Tensor, image_tokens: Tensor) -> StreamLoss:
    """Return the losses of a batch: the paper's of a decoder, an encoder-decoder's mean over all image tokens.

    Args:
        model: the transformer.
        text: int64 (B, T), text ids.
        image_tokens: int64 (B, I), raster order.

    Raises:
        ValueError: as the model's `states`; or it is of a kind that is imported and not trained.
    """
    if isinstance(model, DALLE):
        return stream_training_loss(model, text, image_tokens)
    if isinstance(model, DALLEPytorch):
        return _dalle_pytorch_loss(model, text, image_tokens)
    if not isinstance(model, DALLEMini):
        raise ValueError(f"a {type(model).__name__} is imported, not trained here: its loss is not known")
    total, losses_BI = model.image_head(model.states(text, image_tokens), image_tokens)
    image, grid = total / image_tokens.numel(), model.config.grid
    by_row_Y = losses_BI.detach().view(-1, grid, grid).mean(dim=(0, 2))
    return StreamLoss(total=image, text=None, image=image, image_by_row=by_row_Y)


def _dalle_pytorch_loss(model: DALLEPytorch, text: Tensor, image_tokens: Tensor) -> StreamLoss:
    """Return the paper's loss of a DALLE-pytorch; there, pads count as text, too."""
    text_logits, image_logits = model(text, image_tokens)
    is_word_BT = (text < model.config.text_vocab) & (text != 0)
    targets_BT = torch.where(is_word_BT, text, IGNORED)
    summed = F.cross_entropy(text_logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    text_loss = summed / is_word_BT.sum().clamp_min(1)
    losses_BI = F.cross_entropy(image_logits.mT, image_tokens, reduction="none")
    by_row_Y = losses_BI.detach().view(-1, model.config.grid, model.config.grid).mean(dim=(0, 2))
    image = losses_BI.mean()
    return StreamLoss(
        total=TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image, text=text_loss, image=image, image_by_row=by_row_Y
    )
