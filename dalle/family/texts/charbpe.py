"""minDALL-E's tokenizer: the `tokenizers` library's CharBPE in small letters (kakaobrain/minDALL-E at e548007).

Control characters go, Chinese characters and punctuation are words of their own, a word's last symbol ends in </w>.
Start and end there are none; the pad is an id of the vocabulary.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tokenizers.implementations import CharBPETokenizer
from tokenizers.models import BPE

from storage.atomic import replace_text
from storage.errors import reason_of
from storage.text import parse_json

KIND = "charbpe"
"""In a bundle's tokenizer.json."""
UNKNOWN, PAD = "[UNK]", "[PAD]"
"""Symbols of the vocabulary. A caption that spells one has its id, as there."""


class CharBPE:
    """Captions to ids 0 … vocab_size-1.

    Args:
        vocab: symbol -> id.
        merges: pairs of symbols, best first.

    Raises:
        ValueError: the ids are not 0, 1, 2, …, unknown or pad has none, or a merge is of symbols that are not there.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"its {len(vocab)} ids are not 0 … {len(vocab) - 1}")
        if missing := [symbol for symbol in (UNKNOWN, PAD) if symbol not in vocab]:
            raise ValueError(f"it has no {' and no '.join(missing)}")
        try:
            self._backend = CharBPETokenizer(dict(vocab), list(merges), unk_token=UNKNOWN, lowercase=True)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"its merges are not those of a BPE: {reason_of(error, 200)}") from error
        self._backend.add_special_tokens([PAD])
        self._vocab, self._merges = dict(vocab), list(merges)
        self.vocab_size = len(vocab)
        """The number of ids."""
        self.pad = vocab[PAD]
        """Id of the pad."""

    @classmethod
    def read(cls, vocab: Path, merges: Path) -> Self:
        """Read the published files, bpe-16k-vocab.json and bpe-16k-merges.txt.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one is something else, or they are not of each other.
        """
        for file in (vocab, merges):
            if not file.is_file():
                raise FileNotFoundError(f"no file {file}: expected bpe-16k-vocab.json and bpe-16k-merges.txt")
        try:
            return cls(*BPE.read_file(str(vocab), str(merges)))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{vocab} and {merges} are no tokenizer of minDALL-E, such as bpe-16k-vocab.json and "
                f"bpe-16k-merges.txt: {reason_of(error, 200)}"
            ) from error

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a bundle's tokenizer.json.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds something else.
        """
        try:
            found = parse_json(file.read_text(encoding="utf-8"))
            if found["kind"] != KIND:
                raise ValueError("its kind is another")
            return cls(found["vocab"], [(left, right) for left, right in found["merges"]])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is no tokenizer of minDALL-E: {error}; import the model again") from error

    def _to_json(self) -> str:
        values = {"kind": KIND, "vocab": self._vocab, "merges": self._merges}
        return json.dumps(values, ensure_ascii=False, sort_keys=True)

    def save(self, file: Path | str) -> None:
        """Write it to a file, whole or not at all."""
        replace_text(file, self._to_json())

    @property
    def hash(self) -> str:
        """16 hex digits that name this tokenizer: equal if and only if it gives the same ids."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()[:16]

    def encode(self, caption: str) -> list[int]:
        """Return the ids of a caption; none if nothing is left of it."""
        text = caption.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes a question mark
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words of ids, with a space between any two."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text
