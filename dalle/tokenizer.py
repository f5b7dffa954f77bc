"""Captions to the transformer's text ids: byte-level BPE, seeded BPE dropout (Ramesh et al. 2021, §2.2, B.2).

BPE dropout (Provilkov et al. 2020) leaves out candidate merges at random in training. The `tokenizers` library's own
cannot be seeded and repeats itself in forked workers, so with dropout the merges are done here.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from dalle.stream import text_rows
from storage.atomic import replace_text
from storage.bpe import N_BYTES, BytePairs

MAX_MERGE_LENGTH = 64
"""Bytes of a word that are merged together with dropout, whose cost grows with the square; longer words are cut."""


class Tokenizer:
    """A byte-level BPE. Its ids are 0 … vocab_size-1; start and pads are stream.py's."""

    def __init__(self, pairs: BytePairs) -> None:
        """Wrap a BPE; `train` and `load` call this."""
        self._pairs = pairs
        self._ranks = {pair: rank for rank, pair in enumerate(pairs.merges)}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 16_384) -> Self:
        """Learn a tokenizer; the same captions in the same order give the same one.

        Args:
            captions: the text to learn from.
            vocab_size: ids wanted, 257 or more. There are fewer when the captions have no more pairs that
                occur twice.

        Raises:
            ValueError: if vocab_size is too small or there is no caption.
        """
        if vocab_size <= N_BYTES:
            raise ValueError(f"vocab_size ({vocab_size}) must be at least {N_BYTES + 1}: {N_BYTES} bytes and a merge")
        return cls(BytePairs.train(map(_encodable, captions), vocab_size, space_first=False))

    @classmethod
    def load(cls, file: Path | str) -> Self:
        """Read a tokenizer from a file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or another kind of tokenizer.
        """
        file = Path(file)
        try:
            return cls(BytePairs.from_json(file.read_text(encoding="utf-8"), space_first=False))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no tokenizer at {file}: expected a tokenizer.json; train one with `dalle-train tokenizer`, or give "
                "--tokenizer"
            ) from None
        except ValueError as error:
            raise ValueError(f"{file} is not a tokenizer.json of `dalle-train tokenizer`: {error}") from error

    def save(self, file: Path | str) -> None:
        """Write the tokenizer to a file, whole or not at all."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, self._pairs.to_json(pretty=True))

    @property
    def vocab_size(self) -> int:
        """The number of BPE ids."""
        return len(self._pairs.vocab)

    @property
    def hash(self) -> str:
        """16 hex digits that name this tokenizer: equal if and only if it gives the same ids."""
        return hashlib.sha256(self._pairs.to_json().encode()).hexdigest()[:16]

    def normalise(self, caption: str) -> str:
        """Return the caption as the model sees it: NFKC, lowercase, single spaces, none at the ends."""
        return self._pairs.normalise(_encodable(caption))

    def encode(self, caption: str, *, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """Return the BPE ids of a caption, 0 … vocab_size-1; none if nothing is left after normalising.

        Args:
            caption: any text.
            dropout: probability that a candidate merge is left out at each step; 0 is the one best
                segmentation, 1 is bytes.
            rng: where the choices of dropout come from; needed, and read, only with dropout.

        Raises:
            ValueError: if dropout is not a probability or lacks its rng.
        """
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout ({dropout}) must be from 0 to 1")
        if dropout == 0:
            return self._pairs.encode(_encodable(caption))
        if rng is None:
            raise ValueError(f"dropout ({dropout}) needs an rng, such as numpy.random.default_rng(0)")
        ids: list[int] = []
        for word in self._pairs.words(_encodable(caption)):
            for start in range(0, len(word), MAX_MERGE_LENGTH):
                symbols = self._merged(word[start : start + MAX_MERGE_LENGTH], dropout, rng)
                ids.extend(self._pairs.vocab[symbol] for symbol in symbols)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of BPE ids; bytes that are no UTF-8, as a cut caption can end in, become U+FFFD.

        Raises:
            ValueError: for an id that is not a BPE id, such as start or a pad.
        """
        listed = [int(i) for i in ids]
        if listed and not 0 <= min(listed) <= max(listed) < self.vocab_size:
            raise ValueError(
                f"ids {min(listed)} to {max(listed)} cannot be decoded: BPE ids are 0 to {self.vocab_size - 1}"
            )
        return self._pairs.decode(listed)

    def text(
        self,
        captions: Sequence[str],
        text_len: int,
        *,
        dropout: float = 0.0,
        rngs: Sequence[np.random.Generator] | None = None,
    ) -> tuple[Tensor, int]:
        """Return the text ids of captions as the model takes them.

        Args:
            captions: B captions; an empty one becomes the null caption.
            text_len: T; start of text takes one of them.
            dropout: see `encode`.
            rngs: one generator per caption; needed only with dropout.

        Returns:
            int64 (B, T), each row start, BPE ids, pads (see stream.py); and how many captions had to be cut.
        """
        if rngs is not None and len(rngs) != len(captions):
            raise ValueError(f"{len(rngs)} rngs for {len(captions)} captions: expected one each")
        each: Sequence[np.random.Generator | None] = [None] * len(captions) if rngs is None else rngs
        ids = [self.encode(caption, dropout=dropout, rng=rng) for caption, rng in zip(captions, each, strict=True)]
        n_cut = sum(len(one) > text_len - 1 for one in ids)
        return text_rows(ids, self.vocab_size, text_len), n_cut

    def _merged(self, word: str, dropout: float, rng: np.random.Generator) -> list[str]:
        """Merge the bytes of a word: the best candidate that dropout leaves, again until it leaves none."""
        symbols = list(word)
        while True:
            pairs = enumerate(pairwise(symbols))
            candidates = [(self._ranks[pair], i) for i, pair in pairs if pair in self._ranks]
            chances = rng.random(len(candidates)).tolist()
            kept = [c for c, chance in zip(candidates, chances, strict=True) if chance >= dropout]
            if not kept:
                return symbols
            _, i = min(kept)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def _encodable(caption: str) -> str:
    """Return the caption with lone surrogates, which are no Unicode text, replaced by question marks."""
    return caption.encode("utf-8", "replace").decode("utf-8")
