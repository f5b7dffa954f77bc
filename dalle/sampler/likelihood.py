"""How likely image tokens are under a transformer, after a caption: from the steps of decoding, whichever model it is.

Legend: N pictures  I image positions  T text positions  V image vocabulary
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.family.transformers import Transformer, decoding
from dalle.sampling import undisturbed
from dalle.stream import check_ids, start_of_image_id


def log_likelihoods(model: Transformer, text: Tensor, tokens: Tensor) -> Tensor:
    """Return log p(token | those before it, caption) of every image token, under the unmodified model.

    Args:
        model: the transformer.
        text: int64 (1, T), text ids of one caption, or (N, T), of one for each picture.
        tokens: int64 (N, I), raster order, of N pictures, all at once.

    Returns:
        float32 (N, I), nats, on the model's device.

    Raises:
        ValueError: for a wrong shape, or for ids out of range.
    """
    config = model.config
    check_ids("text", text, config.text_len, config.n_text_ids)
    check_ids("tokens", tokens, config.stream.n_image, config.image_vocab)
    if len(text) not in (1, len(tokens)):
        raise ValueError(f"{len(text)} captions for {len(tokens)} pictures: expected one, or one for each")
    counts = [len(tokens)] if len(text) == 1 else [1] * len(text)
    tokens = tokens.to(model.device)
    with undisturbed(), torch.inference_mode():
        decoder = decoding(model, text.to(model.device), counts)
        inputs_NI = F.pad(tokens[:, :-1], (1, 0), value=start_of_image_id(config.image_vocab))
        each = [
            -F.cross_entropy(decoder.step(inputs_N), tokens_N, reduction="none")
            for inputs_N, tokens_N in zip(inputs_NI.unbind(1), tokens.unbind(1), strict=True)
        ]
        found_NI = torch.stack(each, dim=1)
    return found_NI.clone()
