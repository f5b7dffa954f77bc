"""YouTokenToMe's BPE, which ruDALLE reads captions with (VKCOM/YouTokenToMe at f4162d8).

A text is split at white space, each word begins with U+2581, and its characters are merged: of the rules that apply
the first, where it applies first. A run of characters that no symbol has is one unknown symbol.

The library's own file is text, numbers apart from white space:

    n m                      numbers of characters and rules
    code point, id           n times; the code point 9601 marks the beginning of a word
    left, right, new id      m times, best first
    unknown pad start end    the ids of no text
"""

import functools
import hashlib
import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from storage.atomic import replace_text
from storage.text import parse_json

KIND = "youtokentome"
"""In a bundle's tokenizer.json."""
WORD_START = "\u2581"
_SPACES = f" \t\n\v\f\r{WORD_START}"
_SPECIAL = (1, 0, 2, 3)
"""Ids of unknown, pad, start and end in files that the library writes unless told otherwise."""
_UNKNOWN = 1


class YouTokenToMe:
    """Captions to ids 0 … vocab_size-1; those of pad, start and end never occur.

    Args:
        model: content of the library's file.

    Raises:
        ValueError: it is something else.
    """

    def __init__(self, model: str) -> None:
        try:
            numbers = [int(word) for word in model.split()]
        except ValueError as error:
            raise ValueError(f"it holds something other than whole numbers: {error}") from None
        if len(numbers) < 2 or len(numbers) != 6 + 2 * numbers[0] + 3 * numbers[1] or min(numbers) < 0:
            raise ValueError(f"its {len(numbers)} numbers are not those of as many characters and rules as it says")
        n_characters, n_rules = numbers[:2]
        characters = numbers[2 : 2 + 2 * n_characters]
        rules = numbers[2 + 2 * n_characters : -4]
        if tuple(numbers[-4:]) != _SPECIAL:
            raise ValueError(f"unknown, pad, start and end have the ids {numbers[-4:]}, expected {list(_SPECIAL)}")
        self._model = model
        self._ids = dict(zip(characters[::2], characters[1::2], strict=True))
        self._rules = {pair: i for i, pair in enumerate(zip(rules[::3], rules[1::3], strict=True))}
        self._new_ids = rules[2::3]
        self.vocab_size = len(_SPECIAL) + n_characters + n_rules
        """The number of ids."""
        if sorted([*_SPECIAL, *self._ids.values(), *self._new_ids]) != list(range(self.vocab_size)):
            raise ValueError(f"its {self.vocab_size} ids are not 0 … {self.vocab_size - 1}")
        if ord(WORD_START) not in self._ids or not {*rules[::3], *rules[1::3]} <= set(range(self.vocab_size)):
            raise ValueError("it has no mark of beginning words, or rules of ids that are not there")

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read the library's file, such as ruDALLE's bpe.model.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else.
        """
        try:
            return cls(file.read_text(encoding="ascii"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no file {file}: expected a tokenizer of YouTokenToMe, such as bpe.model"
            ) from None
        except ValueError as error:
            raise ValueError(f"{file} is no tokenizer of YouTokenToMe, such as bpe.model: {error}") from error

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
            return cls(found["model"])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is no tokenizer of YouTokenToMe: {error}; import the model again") from error

    def save(self, file: Path | str) -> None:
        """Write it to a file, whole or not at all."""
        replace_text(file, json.dumps({"kind": KIND, "model": self._model}))

    @property
    def hash(self) -> str:
        """16 hex digits that name this tokenizer: equal if and only if it gives the same ids."""
        return hashlib.sha256(" ".join(self._model.split()).encode()).hexdigest()[:16]

    def encode(self, caption: str) -> list[int]:
        """Return the ids of a caption in small letters, as ruDALLE reads it; none of white space alone."""
        return self.encode_as_written(caption.lower().strip())

    def encode_as_written(self, caption: str) -> list[int]:
        """Return the ids of a caption in the letters that it has, as the library itself reads it."""
        text = caption.translate(dict.fromkeys(map(ord, _SPACES), " "))
        return [number for word in text.split(" ") if word for number in self._merged(word)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words of ids, as the library does; an unknown symbol is <UNK>, ids of no text are nothing."""
        return "".join(self._symbols.get(number, "") for number in ids).replace(WORD_START, " ").strip(" ")

    @functools.cached_property
    def _symbols(self) -> dict[int, str]:
        """Ids and the text that each stands for."""
        symbols = {number: chr(character) for character, number in self._ids.items()} | {_UNKNOWN: "<UNK>"}
        for (left, right), rule in self._rules.items():
            symbols[self._new_ids[rule]] = symbols.get(left, "") + symbols.get(right, "")
        return symbols

    def _merged(self, word: str) -> list[int]:
        ids: list[int] = []
        """Of the symbols; below 0 for unknown ones, each another number, and for those merged into one before."""
        for character in WORD_START + word:
            known = self._ids.get(ord(character))
            if known is not None:
                ids.append(known)
            elif ids[-1] != -1:
                ids.append(-1)
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        found: list[tuple[int, int]] = []

        def look(i: int) -> None:
            j = after[i] if i >= 0 else len(ids)
            if j < len(ids) and (rule := self._rules.get((ids[i], ids[j]))) is not None:
                heapq.heappush(found, (rule, i))

        for i in range(len(ids)):
            look(i)
        while found:
            rule, i = heapq.heappop(found)
            j = after[i]
            if j >= len(ids) or self._rules.get((ids[i], ids[j])) != rule:
                continue
            ids[i], ids[j], after[i] = self._new_ids[rule], -2, after[j]
            if after[i] < len(ids):
                before[after[i]] = i
            look(before[i])
            look(i)
        return [_UNKNOWN if number == -1 else number for number in ids if number != -2]
