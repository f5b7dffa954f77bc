"""Captions as a language model: what a decoder-only transformer of the family predicts of its text.

Text never sees the image, so the text positions are run alone. DALL·E mini reads captions with an encoder and predicts
none of them.

Legend: B captions  n tokens of each so far  T text positions  V text ids that are predicted  D width
"""

from functools import partial

import torch
from torch import Tensor

from dalle.attention import masked_attention
from dalle.family.dalle_pytorch.model import DALLEPytorch
from dalle.family.mini.model import DALLEMini
from dalle.family.transformers import Transformer
from dalle.family.variants.model import VariantDALLE
from dalle.model import DALLE

CaptionModel = DALLE | VariantDALLE | DALLEPytorch
"""Those that predict text."""


def caption_model(model: Transformer) -> CaptionModel:
    """Return a transformer that predicts text.

    Raises:
        ValueError: it predicts none.
    """
    if isinstance(model, DALLEMini):
        raise ValueError(
            "this bundle's transformer is a DALL·E mini: it reads captions with an encoder and predicts no text, so it "
            "cannot complete one; take a bundle whose transformer predicts text (the paper's, ruDALLE's, minDALL-E's "
            "or DALLE-pytorch's)"
        )
    return model


def next_text_logits(model: CaptionModel, tokens: Tensor) -> Tensor:
    """Return the logits of the text id after the first n of B captions, float32 (B, V).

    Args:
        model: the transformer.
        tokens: int64 (B, n), ids of its tokenizer; n from 0 to `max_caption` - 1.

    Raises:
        ValueError: there is no room for another token, or the model has nothing that the first one follows.
    """
    config, n = model.config, tokens.shape[1]
    if n >= config.max_caption:
        raise ValueError(
            f"{n} tokens leave no room for another: the model reads {config.max_caption} of a caption; begin with fewer"
        )
    text_BT = config.text_rows(tokens.tolist()).to(model.device)
    if isinstance(model, DALLEPytorch):
        h_BnD = model.run(model.embed_text(text_BT)[:, : n + 1], 0, partial(model.attend_all, text_BT), model.shift_all)
        return model.text_logits(h_BnD[:, -1])
    if isinstance(model, DALLE):
        h_BnD = model.embed_text(text_BT)[:, : n + 1]
    else:
        first = n + (model.variant.start is not None)
        if first == 0:
            raise ValueError(
                "this model has no start of text that a first token follows: give the beginning of a caption"
            )
        h_BnD = model.embed(text_BT[:, :first], text_BT[:, :0])
    length = h_BnD.shape[1]
    for block, kind in zip(model.blocks, model.config.kinds, strict=True):
        h_BnD = block(h_BnD, partial(masked_attention, mask_SS=model.mask(kind)[:length, :length]))
    logits_BV: Tensor = model.text_head(model.final_norm(h_BnD[:, -1]))
    return logits_BV.float()


def is_text(model: CaptionModel) -> Tensor:
    """Return which of the predicted text ids are text, bool (V,); one that is none ends a caption.

    All are with the paper's transformer, whose pads are not predicted: it does not tell where a caption ends.
    """
    config = model.config
    if isinstance(model, DALLE):
        return torch.ones(config.text_vocab, dtype=torch.bool)
    is_text_V = torch.arange(config.n_text_ids) < config.text_vocab
    if isinstance(model, VariantDALLE):
        no_text = [model.config.pad, model.variant.start, model.variant.end]
        is_text_V[[number for number in no_text if number is not None]] = False
    else:
        is_text_V[0] = False
    return is_text_V
