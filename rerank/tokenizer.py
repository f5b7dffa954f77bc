"""Captions as CLIP's text ids: a byte-level BPE between a start and an end token, padded with zeros.

The text is normalised (NFKC, lower case, runs of white space become one space, ends stripped) and every
byte has an id, so that any script and any emoji can be encoded. Start-of-text and end-of-text are the two ids
above the BPE's own (49,406 and 49,407 in the published CLIP). They are not part of the BPE, so no caption can
spell them. End-of-text is the highest id of all, hence `argmax` of a row finds it, and the pads behind it are
never mistaken for text although their id 0 is also an ordinary BPE id.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from storage.atomic import replace_text

logger = logging.getLogger(__name__)

N_BYTES = 256
N_SPECIAL = 2
PAD_ID = 0
# A pair seen once would only memorise that one caption.
MIN_PAIR_COUNT = 2


class CLIPTokenizer:
    """Turns captions into rows of ids `[start, BPE ids…, end, 0, 0, …]`.

    Ids: 0 … vocab_size-3 are BPE, vocab_size-2 is start-of-text, vocab_size-1 is end-of-text.
    """

    def __init__(self, bpe: Tokenizer) -> None:
        self._bpe = bpe
        n_bpe: int = bpe.get_vocab_size()
        self.vocab_size = n_bpe + N_SPECIAL
        """Number of ids, the two special ones included."""
        self.start_id = n_bpe
        """The id every row begins with."""
        self.end_id = n_bpe + 1
        """The id that closes the text; the highest of all."""

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Self:
        """Learn the merges from captions; the same captions always give the same tokenizer.

        Args:
            captions: the training captions; read once.
            vocab_size: the wanted number of ids, start and end included; at least 258. With few or repetitive
                captions the result is smaller (logged): use `.vocab_size` of the result for the model.

        Raises:
            ValueError: vocab_size is too small for the 256 bytes, or there is no caption.
        """
        if vocab_size < N_BYTES + N_SPECIAL:
            raise ValueError(
                f"vocab_size is {vocab_size}; it must be at least {N_BYTES + N_SPECIAL}: "
                f"{N_BYTES} bytes, start-of-text and end-of-text"
            )
        n_captions = 0

        def counted() -> Iterable[str]:
            nonlocal n_captions
            for caption in captions:
                n_captions += 1
                yield _checked(caption)

        bpe = _untrained_bpe()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - N_SPECIAL,
            min_frequency=MIN_PAIR_COUNT,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        bpe.train_from_iterator(counted(), trainer=trainer)
        if n_captions == 0:
            raise ValueError("no captions to train CLIP's tokenizer from: give at least one")
        tokenizer = cls(bpe)
        if tokenizer.vocab_size < vocab_size:
            found = tokenizer.vocab_size
            logger.info("%d captions gave a vocabulary of %d, not %d", n_captions, found, vocab_size)
        return tokenizer

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The tokenizer written by `to_json`.

        Raises:
            ValueError: the text is not such a tokenizer.
        """
        try:
            bpe = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer's JSON ({error}); expected what `save` wrote") from error
        _check_is_byte_level(bpe)
        return cls(bpe)

    def to_json(self) -> str:
        """The whole tokenizer as one JSON string."""
        text: str = self._bpe.to_str()
        return text

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no CLIP tokenizer at {path}: expected the tokenizer.json that is saved with a CLIP"
            )
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a JSON file, replacing it whole or not at all."""
        replace_text(path, self.to_json())

    def encode(self, caption: str) -> list[int]:
        """The BPE ids of a caption, without start, end or pads.

        Raises:
            ValueError: not a string, or one with half of a surrogate pair, which is no Unicode text.
        """
        ids: list[int] = self._bpe.encode(_checked(caption), add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The normalised caption of a row of `tokenize` or of a result of `encode`.

        Reading stops at the first end-of-text; the start token is skipped.
        """
        ids = list(ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        text: str = self._bpe.decode([i for i in ids if i != self.start_id])
        # the pre-tokenizer puts one space before the first word, so that a word has the same ids everywhere
        return text.removeprefix(" ")

    def tokenize(self, captions: Sequence[str], context_length: int) -> Tensor:
        """Rows of ids for a batch of captions; how many were too long is logged as a warning.

        Args:
            captions: B captions; an empty one gives a row of only start and end.
            context_length: L ≥ 3, the length of every row.

        Returns:
            int64 (B, L) on the CPU. Longer captions are cut, and still end with end-of-text.

        Raises:
            ValueError: captions is a single string, a caption is not text, or context_length is below 3.
        """
        ids, n_cut = self.tokenize_counting(captions, context_length)
        if n_cut:
            logger.warning("%d of %d captions were cut to CLIP's %d ids", n_cut, len(ids), context_length)
        return ids

    def tokenize_counting(self, captions: Sequence[str], context_length: int) -> tuple[Tensor, int]:
        """As `tokenize`, but returns the number of captions that were cut instead of logging it."""
        if isinstance(captions, str):
            raise ValueError(f"captions is the single string {captions[:40]!r}: give a list of captions")
        if context_length < N_SPECIAL + 1:
            raise ValueError(f"context_length is {context_length}; it must be at least 3: start, one id, end")
        n_cut = 0
        ids_BL = torch.full((len(captions), context_length), PAD_ID, dtype=torch.int64)
        for row_L, caption in zip(ids_BL, captions, strict=True):
            ids = self.encode(caption)
            kept = ids[: context_length - N_SPECIAL]
            n_cut += len(kept) < len(ids)
            row_L[: len(kept) + N_SPECIAL] = torch.tensor([self.start_id, *kept, self.end_id])
        return ids_BL, n_cut


def _untrained_bpe() -> Tokenizer:
    """A byte-level BPE without merges, and the normalisation in front of it."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _checked(caption: str) -> str:
    if not isinstance(caption, str):
        raise ValueError(f"a caption must be a str, got {type(caption).__name__}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the caption {caption[:40]!r} is not Unicode text: {error.reason}") from error
    return caption


def _check_is_byte_level(bpe: Tokenizer) -> None:
    """ValueError unless ids are dense, every byte has one, and nothing in a caption is special."""
    parts = json.loads(bpe.to_str())
    kind = (parts["model"]["type"], (parts["pre_tokenizer"] or {}).get("type"))
    if kind != ("BPE", "ByteLevel"):
        raise ValueError(f"a tokenizer of kind {kind}; CLIP's is a BPE on bytes ('BPE', 'ByteLevel')")
    if parts["added_tokens"]:
        added = [token["content"] for token in parts["added_tokens"]]
        raise ValueError(f"the tokenizer has added tokens, {added[:4]}, which a caption could spell")
    vocabulary = bpe.get_vocab()
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"the {len(vocabulary)} ids of the tokenizer are not 0 … {len(vocabulary) - 1}")
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(vocabulary)
    if missing:
        raise ValueError(f"{len(missing)} of the 256 bytes have no id in the tokenizer")
