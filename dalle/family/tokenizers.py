"""Captions to the text ids of any transformer of the family."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dalle.family.transformers import Transformer
from dalle.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TextTokenizer = Tokenizer
"""Any of them."""


def load_tokenizer(file: Path) -> TextTokenizer:
    """Read a bundle's tokenizer; raises as `Tokenizer.load`."""
    return Tokenizer.load(file)


def text_of(tokenizer: TextTokenizer, captions: Sequence[str], model: Transformer) -> Tensor:
    """Return the text ids of captions as a transformer takes them, int64 (B, T); warn of each that is cut."""
    config = model.config
    each = [tokenizer.encode(caption) for caption in captions]
    for caption, ids in zip(captions, each, strict=True):
        if (n_cut := len(ids) - config.max_caption) > 0:
            logger.warning(
                "the caption %r has %d tokens, the model reads %d: the last %d were cut",
                caption if len(caption) <= 60 else f"{caption[:57]}...",
                len(ids),
                config.max_caption,
                n_cut,
            )
    return config.text_rows(each)
