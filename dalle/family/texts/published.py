"""Tokenizers that DALLE-pytorch's users had: CLIP's BPE, YouTokenToMe's, and any of the `tokenizers` library.

Source: lucidrains/DALLE-pytorch at 58c1e1a, dalle_pytorch/tokenizer.py. None puts anything around a caption.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from tokenizers import Tokenizer, processors

from dalle.family.texts.yttm import YouTokenToMe
from storage.atomic import replace_text
from storage.bpe import OpenAIPairs
from storage.errors import reason_of
from storage.text import parse_json


class _Published:
    """What they share: a file of a kind and the text of a tokenizer."""

    kind: ClassVar[str]
    """Of the tokenizer, in its file."""
    vocab_size: int
    """The number of ids."""

    def __init__(self, text: str) -> None:
        self._text = text

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a bundle's tokenizer.json.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds something else.
        """
        try:
            found = parse_json(file.read_text(encoding="utf-8"))
            if found["kind"] != cls.kind:
                raise ValueError("its kind is another")
            return cls(found["tokenizer"])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is no tokenizer of kind {cls.kind}: {error}; import the model again") from error

    def save(self, file: Path | str) -> None:
        """Write the tokenizer to a file, whole or not at all."""
        replace_text(Path(file), json.dumps({"kind": self.kind, "tokenizer": self._text}) + "\n")

    @property
    def hash(self) -> str:
        """16 hex digits that name this tokenizer."""
        return hashlib.sha256(f"{self.kind}\0{self._text}".encode()).hexdigest()[:16]


class CLIPText(_Published):
    """CLIP's BPE, with its cleaning of captions; its ids of start and end, the last two, never occur.

    Args:
        text: what `OpenAIPairs.to_json` wrote.

    Raises:
        ValueError: it is something else.
    """

    kind = "clip"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._pairs = OpenAIPairs.from_json(text)
        self.vocab_size = len(self._pairs.vocab) + 2

    def encode(self, caption: str) -> list[int]:
        """Return the ids of a caption; none if nothing is left after cleaning."""
        return self._pairs.encode(caption)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words of ids; those of start and end are nothing."""
        return self._pairs.decode([number for number in ids if number < len(self._pairs.vocab)])


class HuggingFaceText(_Published):
    """A tokenizer of the `tokenizers` library, which says itself how captions are cleaned and split.

    Args:
        text: content of its JSON file.

    Raises:
        ValueError: it is something else.
    """

    kind = "tokenizers"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"damaged or no tokenizer: {reason_of(error, 200)}") from error
        # in place of one that adds tokens, such as [CLS]
        self._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, caption: str) -> list[int]:
        """Return the ids of a caption."""
        ids: list[int] = self._tokenizer.encode(caption).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, as the tokenizer's own decoder spells it."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


class YouTokenToMeText(_Published):
    """YouTokenToMe's BPE, of captions in the letters that they have: ruDALLE reads them in small ones.

    Args:
        text: content of the library's file.

    Raises:
        ValueError: it is something else.
    """

    kind = "youtokentome, as written"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._pairs = YouTokenToMe(text)
        self.vocab_size = self._pairs.vocab_size

    def encode(self, caption: str) -> list[int]:
        """Return the ids of a caption; none of white space alone."""
        return self._pairs.encode_as_written(caption)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words of ids: see `YouTokenToMe.decode`."""
        return self._pairs.decode(ids)


PublishedText = CLIPText | HuggingFaceText | YouTokenToMeText
"""Any of them."""
