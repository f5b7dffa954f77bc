"""DALL·E mini's tokenizer: a byte-level BPE with GPT-2's words, of captions that are normalised first.

Start, pad and end of text, ids of the same vocabulary, are the model's: see `MiniConfig`. No caption spells them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer, models, pre_tokenizers

from dalle.family.texts.mini_captions import normalised
from storage.atomic import replace_text
from storage.text import parse_json

KIND = "bart"
"""In a bundle's tokenizer.json."""
UNKNOWN = "<unk>"
"""Symbol of bytes that the vocabulary lacks, where it has one."""


class BartTokenizer:
    """A byte-level BPE whose ids are those of a published vocabulary.

    Args:
        vocab: symbol -> id, from 0 on, without two of the same.
        merges: pairs of symbols, best first.
        normalises: whether captions are normalised first, as those of the published models are.

    Raises:
        ValueError: the ids are no ids, or a merge is of symbols that are not there.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], *, normalises: bool) -> None:
        ids = sorted(vocab.values())
        if not ids or ids[0] < 0 or len(set(ids)) < len(ids):
            raise ValueError(f"its {len(ids)} ids are not different whole numbers from 0 on")
        unknown = UNKNOWN if UNKNOWN in vocab else None
        try:
            model = models.BPE(vocab=dict(vocab), merges=list(merges), unk_token=unknown)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"its merges are not those of a BPE: {error}") from error
        self.vocab, self.normalises = dict(vocab), normalises
        self._merges = [list(pair) for pair in merges]
        self._backend = Tokenizer(model)
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.vocab_size = ids[-1] + 1
        """One more than the largest id."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: it is something else.
        """
        found = parse_json(text)
        try:
            if found["kind"] != KIND or not isinstance(found["normalises"], bool):
                raise ValueError("its kind is another")
            pairs = [(left, right) for left, right in found["merges"]]
            return cls(found["vocab"], pairs, normalises=found["normalises"])
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"it is damaged ({error})") from error

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds something else.
        """
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no tokenizer of DALL·E mini: {error}; import the model again") from error

    def to_json(self) -> str:
        """Return all of it as JSON."""
        values: dict[str, Any] = {"kind": KIND, "normalises": self.normalises, "vocab": self.vocab}
        return json.dumps({**values, "merges": self._merges}, ensure_ascii=False)

    def save(self, file: Path | str) -> None:
        """Write it to a file, whole or not at all."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, self.to_json())

    @property
    def hash(self) -> str:
        """16 hex digits that name this tokenizer: equal if and only if it gives the same ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def encode(self, caption: str) -> list[int]:
        """Return the ids of a caption, without start and end.

        Raises:
            ValueError: see `normalised`.
        """
        text = caption.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes a question mark
        ids: list[int] = self._backend.encode(normalised(text) if self.normalises else text).ids
        return ids
