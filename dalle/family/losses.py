"""What any transformer of the family is trained to minimise.

Legend: B batch  T text positions  I image positions  Y rows of the grid
"""

from torch import Tensor

from dalle.family.mini.model import DALLEMini
from dalle.family.transformers import Transformer
from dalle.loss import StreamLoss
from dalle.loss import training_loss as stream_training_loss
from dalle.model import DALLE


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
    if not isinstance(model, DALLEMini):
        raise ValueError(f"a {type(model).__name__} is imported, not trained here: its loss is not known")
    total, losses_BI = model.image_head(model.states(text, image_tokens), image_tokens)
    image, grid = total / image_tokens.numel(), model.config.grid
    by_row_Y = losses_BI.detach().view(-1, grid, grid).mean(dim=(0, 2))
    return StreamLoss(total=image, text=None, image=image, image_by_row=by_row_Y)
