"""Byte-level BPE of lowercased text, under the transformer's and CLIP's tokenizers, and OpenAI's own for CLIP.

A text is normalised (NFKC, lowercase, runs of white space become one space, ends stripped), split into words as GPT-2
does, each word spelled in bytes, and the bytes merged. So every text has ids and decodes to its normalised self; there
is no unknown.
"""

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from storage.errors import reason_of
from storage.text import parse_json

N_BYTES = 256
MIN_PAIR_COUNT = 2
"""Occurrences of a pair before it is merged: a pair seen once would only memorise its caption."""


class BytePairs:
    """A vocabulary, and the merges that spell texts in it.

    Args:
        vocab: symbol -> id; the ids are 0 … len(vocab)-1, and each byte has one.
        merges: pairs of symbols, best first.
        space_first: put a space before the text, so that its first word has the same ids as later ones.

    Raises:
        ValueError: the ids are not 0, 1, 2, …, or a byte has none.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], *, space_first: bool) -> None:
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"its {len(vocab)} ids are not 0 … {len(vocab) - 1}")
        if missing := set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys():
            raise ValueError(f"{len(missing)} of the {N_BYTES} bytes have no id")
        self.vocab = vocab
        self.merges = merges
        self._backend = _backend(models.BPE(vocab=vocab, merges=list(merges)), space_first)

    @classmethod
    def train(cls, captions: Iterable[str], n_ids: int, *, space_first: bool) -> Self:
        """Learn the merges; the same captions in the same order give the same ones.

        Args:
            captions: read once; Unicode text.
            n_ids: size of the vocabulary. It is smaller if the captions have no more pairs that occur twice.
            space_first: see the class.

        Raises:
            ValueError: there is no caption.
        """
        n_captions = 0

        def counted() -> Iterator[str]:
            nonlocal n_captions
            for caption in captions:
                n_captions += 1
                yield caption

        backend = _backend(models.BPE(), space_first)
        trainer = trainers.BpeTrainer(
            vocab_size=n_ids,
            min_frequency=MIN_PAIR_COUNT,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        backend.train_from_iterator(counted(), trainer=trainer)
        if not n_captions:
            raise ValueError("no captions to train a tokenizer from: give at least one")
        return cls(*_vocab_and_merges(backend.to_str()), space_first=space_first)

    @classmethod
    def from_json(cls, text: str, *, space_first: bool) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else, such as a tokenizer with another normalisation or with added tokens,
                which a caption could spell.
        """
        try:
            saved = Tokenizer.from_str(text).to_str()
            added = [token["content"] for token in json.loads(saved)["added_tokens"]]
            pairs = cls(*_vocab_and_merges(saved), space_first=space_first)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"damaged or no byte-level BPE: {reason_of(error, 200)}") from error
        if added:
            raise ValueError(f"it has added tokens, {added[:4]}, which a caption could spell")
        if pairs.to_json() != saved:
            raise ValueError("another kind of tokenizer: expected a byte-level BPE as this package trains")
        return pairs

    def to_json(self, *, pretty: bool = False) -> str:
        """Return all of it as JSON, in the format of the `tokenizers` library."""
        text: str = self._backend.to_str(pretty=pretty)
        return text

    def normalise(self, text: str) -> str:
        """Return a text as it is spelled: NFKC, lowercase, single spaces, none at the ends."""
        normal: str = self._backend.normalizer.normalize_str(text)
        return normal

    def words(self, text: str) -> list[str]:
        """Return the words of a text, normalised, each spelled in the symbols of its bytes."""
        return [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(self.normalise(text))]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; none if nothing is left after normalising."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8, as a cut text can end in, become U+FFFD."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


WORD_END = "</w>"
"""Ends the last symbol of a word in OpenAI's vocabulary."""
_OPENAI_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}" + "\u0345]+"
"""Its words. U+0345 is in none: OpenAI's pattern ignores case, and a letter is its capital."""


class OpenAIPairs:
    """The BPE of OpenAI's CLIP: another cleaning and splitting than `BytePairs`, and words that know their end.

    A text is mended (ftfy: "â€™" becomes ’), HTML's entities become characters, runs of white space one space, and
    capitals small letters. Symbols are the 256 bytes, the same at the end of a word, and what the merges make, in this
    order. A text that spells "<|endoftext|>" is text, unlike in OpenAI's code, where it ends there.

    Args:
        merges: pairs of symbols, best first.

    Raises:
        ValueError: two merges make the same symbol, or one is made of symbols that are not there.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        symbols = [*letters, *(letter + WORD_END for letter in letters), *(left + right for left, right in merges)]
        self.vocab = {symbol: number for number, symbol in enumerate(symbols)}
        if len(self.vocab) != len(symbols):
            raise ValueError(f"{len(symbols) - len(self.vocab)} of its merges make a symbol that is there already")
        try:
            model = models.BPE(vocab=self.vocab, merges=list(merges), end_of_word_suffix=WORD_END)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"its merges are not those of a BPE: {error}") from error
        self._backend = Tokenizer(model)
        words = pre_tokenizers.Split(Regex(_OPENAI_WORDS), "removed", invert=True)
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._backend.pre_tokenizer = pre_tokenizers.Sequence([words, spelled])
        # the word's end becomes the symbol of a space
        self._backend.decoder = decoders.Sequence([decoders.Replace(WORD_END, "Ġ"), decoders.ByteLevel()])

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            pairs = cls(_vocab_and_merges(text)[1])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"damaged or no BPE: {error}") from error
        if json.loads(pairs.to_json()) != json.loads(text):
            raise ValueError("another kind of tokenizer: expected OpenAI's for CLIP, as this package writes it")
        return pairs

    def to_json(self) -> str:
        """Return all of it but the cleaning as JSON, in the format of the `tokenizers` library."""
        text: str = self._backend.to_str()
        return text

    def normalise(self, text: str) -> str:
        """Return a text as it is spelled: mended, without entities, lowercase, single spaces, none at the ends."""
        import ftfy  # here, because only this needs it

        mended = html.unescape(html.unescape(ftfy.fix_text(text)))
        return " ".join(mended.split()).lower()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; none if nothing is left after normalising."""
        ids: list[int] = self._backend.encode(self.normalise(text), add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words of ids with a space behind each; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text.rstrip(" ")


def pairs_from_json(text: str) -> BytePairs | OpenAIPairs:
    """Read a BPE of CLIP's, of either kind; raises as their `from_json`."""
    try:
        is_openai = parse_json(text)["model"]["end_of_word_suffix"] == WORD_END
    except (LookupError, TypeError, ValueError):
        is_openai = False
    return OpenAIPairs.from_json(text) if is_openai else BytePairs.from_json(text, space_first=True)


def _backend(model: models.BPE, space_first: bool) -> Tokenizer:
    """Return the library's tokenizer: the only place that says how texts are normalised and split."""
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space_first)
    backend.decoder = decoders.ByteLevel()
    return backend


def _vocab_and_merges(text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(text)["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
