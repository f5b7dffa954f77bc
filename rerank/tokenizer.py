"""Captions to CLIP's text ids: a byte-level BPE between a start and an end token, padded with zeros.

The BPE is one that was trained here, or OpenAI's, which most published CLIPs have; the file says which.

Start-of-text and end-of-text are the two ids above the BPE's own (49,406 and 49,407 in the published CLIP). They are
no part of the BPE, so no caption can spell them. End-of-text is the highest id, so `argmax` of a row finds it, and the
pads behind it are never mistaken for text although their id 0 is also an ordinary BPE id.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from storage.atomic import replace_text
from storage.bpe import N_BYTES, BytePairs, OpenAIPairs, pairs_from_json

logger = logging.getLogger(__name__)

N_SPECIAL = 2
PAD_ID = 0


class CLIPTokenizer:
    """Turns captions into rows of ids `[start, BPE ids…, end, 0, 0, …]`.

    Ids: 0 … vocab_size-3 are BPE, vocab_size-2 is start-of-text, vocab_size-1 is end-of-text.
    """

    def __init__(self, pairs: BytePairs | OpenAIPairs) -> None:
        self._pairs = pairs
        n_bpe = len(pairs.vocab)
        self.vocab_size = n_bpe + N_SPECIAL
        """Number of ids, the two special ones included."""
        self.start_id = n_bpe
        """The first id of every row."""
        self.end_id = n_bpe + 1
        """The id that closes the text; the highest of all."""

    @property
    def ids(self) -> dict[str, int]:
        """The ids of the BPE's symbols."""
        return self._pairs.vocab

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Self:
        """Learn the merges from captions; the same captions always give the same tokenizer.

        Args:
            captions: the training captions; read once.
            vocab_size: the wanted number of ids, start and end included; at least 258. With few or repetitive
                captions the result is smaller: use `.vocab_size` of the result for the model.

        Raises:
            ValueError: vocab_size is too small for the 256 bytes, there is no caption, or one is not text.
        """
        if vocab_size < N_BYTES + N_SPECIAL:
            raise ValueError(
                f"vocab_size is {vocab_size}; it must be at least {N_BYTES + N_SPECIAL}: "
                f"{N_BYTES} bytes, start-of-text and end-of-text"
            )
        return cls(BytePairs.train(map(_checked, captions), vocab_size - N_SPECIAL, space_first=True))

    @classmethod
    def openai(cls, merges: Sequence[tuple[str, str]]) -> Self:
        """Return OpenAI's tokenizer with these merges, 48,894 of them in the published one.

        Raises:
            ValueError: they are not those of such a tokenizer.
        """
        return cls(OpenAIPairs(merges))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not such a tokenizer.
        """
        try:
            return cls(pairs_from_json(text))
        except ValueError as error:
            raise ValueError(f"not CLIP's tokenizer: {error}") from error

    def to_json(self) -> str:
        """Return the whole tokenizer as one JSON string."""
        return self._pairs.to_json()

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
        """Write the tokenizer to a JSON file, whole or not at all."""
        replace_text(path, self.to_json())

    def encode(self, caption: str) -> list[int]:
        """Return the BPE ids of a caption, without start, end or pads.

        Raises:
            ValueError: not a string, or one with half of a surrogate pair, which is no Unicode text.
        """
        return self._pairs.encode(_checked(caption))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the normalised caption of a row of `tokenize`, or of a result of `encode`.

        Reading stops at the first end-of-text; the start token is skipped.
        """
        ids = list(ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        text = self._pairs.decode([i for i in ids if i != self.start_id])
        # the space before the first word, see `BytePairs`
        return text.removeprefix(" ")

    def tokenize(self, captions: Sequence[str], context_length: int) -> Tensor:
        """Return rows of ids for a batch of captions, and warn if some are cut.

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
        """Do what `tokenize` does, but return the number of captions cut rather than log it."""
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


def _checked(caption: str) -> str:
    if not isinstance(caption, str):
        raise ValueError(f"a caption must be a str, got {type(caption).__name__}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the caption {caption[:40]!r} is not Unicode text: {error.reason}") from error
    return caption
