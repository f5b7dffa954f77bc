"""Captions to the text ids of any transformer of the family."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dalle.family.texts.bart import KIND as BART
from dalle.family.texts.bart import BartTokenizer
from dalle.family.texts.charbpe import KIND as CHARBPE
from dalle.family.texts.charbpe import CharBPE
from dalle.family.texts.published import CLIPText, HuggingFaceText, PublishedText, YouTokenToMeText
from dalle.family.texts.yttm import KIND as YTTM
from dalle.family.texts.yttm import YouTokenToMe
from dalle.family.transformers import Transformer
from dalle.tokenizer import Tokenizer
from storage.text import parse_json

logger = logging.getLogger(__name__)

TextTokenizer = Tokenizer | BartTokenizer | YouTokenToMe | CharBPE | PublishedText
"""Any of them."""
_KINDS: dict[str, type[BartTokenizer | YouTokenToMe | CharBPE | PublishedText]] = {
    BART: BartTokenizer,
    YTTM: YouTokenToMe,
    CHARBPE: CharBPE,
    **{kind.kind: kind for kind in (CLIPText, HuggingFaceText, YouTokenToMeText)},
}
"""Those that are imported, by the kind that their files say."""


def load_tokenizer(file: Path) -> TextTokenizer:
    """Read a bundle's tokenizer; raises as `Tokenizer.load`."""
    imported = _KINDS.get(_kind(file))
    return Tokenizer.load(file) if imported is None else imported.load(file)


def _kind(file: Path) -> str:
    """Return the kind that a file says; "" for the paper's tokenizer, and for anything else."""
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("kind")) if isinstance(found, dict) else ""


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
