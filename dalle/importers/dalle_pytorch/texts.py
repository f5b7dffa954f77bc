"""The tokenizer that a DALLE-pytorch was trained with: CLIP's unless another file came along."""

from pathlib import Path

from dalle.family.texts.published import CLIPText, HuggingFaceText, PublishedText, YouTokenToMeText
from dalle.importers.clip_vocabulary import read_vocabulary

CLIP_IDS = 49_408
"""Ids of CLIP's tokenizer, the default."""
MAX_BYTES = 64 << 20
"""Of a tokenizer's file; larger ones are refused."""


def import_tokenizer(
    tokenizer: Path | None, vocabulary: Path | None, beside: Path, n_ids: int
) -> tuple[PublishedText, str]:
    """Return a tokenizer with as many ids as a transformer has, and what it is in words.

    Args:
        tokenizer: of Hugging Face (JSON) or YouTokenToMe (numbers), or None for CLIP's.
        vocabulary: CLIP's merges; None for a file in the folder `beside`.
        beside: the folder of the transformer.
        n_ids: of the transformer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or has another number of ids.
    """
    if tokenizer is None:
        if vocabulary is None and n_ids != CLIP_IDS:
            raise ValueError(
                f"the transformer has {n_ids:,} text tokens, and CLIP's tokenizer {CLIP_IDS:,}: it was trained with "
                "another one; give its file with --tokenizer (Hugging Face's .json, or YouTokenToMe's)"
            )
        return CLIPText(read_vocabulary(vocabulary, beside, n_ids).to_json()), "CLIP's BPE"
    if not tokenizer.is_file():
        raise FileNotFoundError(f"no file {tokenizer}: expected the tokenizer that the transformer was trained with")
    if tokenizer.stat().st_size > MAX_BYTES:
        raise ValueError(f"{tokenizer} has more than {MAX_BYTES >> 20} MiB: expected a tokenizer's file")
    read: PublishedText
    try:
        text = tokenizer.read_text(encoding="utf-8")
        is_json = text.lstrip().startswith("{")
        read = HuggingFaceText(text) if is_json else YouTokenToMeText(text)
    except ValueError as error:
        raise ValueError(
            f"{tokenizer}: {error}; expected the JSON of a Hugging Face tokenizer, or YouTokenToMe's model"
        ) from error
    if read.vocab_size != n_ids:
        raise ValueError(
            f"{tokenizer} has {read.vocab_size:,} ids, but the transformer {n_ids:,}: it was trained with another one"
        )
    return read, f"{'a tokenizer of Hugging Face' if is_json else 'YouTokenToMe'}, {tokenizer.name}"
