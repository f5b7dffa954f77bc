"""Tokenizers of published transformers give the ids of the programs that they are from."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from many_captions import captions, charbpe_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dalle.family.texts.charbpe import CharBPE
from dalle.family.texts.published import CLIPText, HuggingFaceText
from dalle.family.texts.yttm import YouTokenToMe
from dalle.family.tokenizers import load_tokenizer
from storage.bpe import OpenAIPairs

MODEL = Path(__file__).parents[1] / "fixtures" / "youtokentome.model"
"""Trained and written by youtokentome 1.0.6: 55 characters and 141 rules."""
LIBRARYS_IDS = "a2ab62b7ddb87cea0df7d26c2d374faff8dfc3ce765ba4a31638306d5f203d19"
"""sha256 of the JSON of the ids that youtokentome 1.0.6 gives `captions()` with this model."""


def restated_yttm(model: str) -> Callable[[str], list[int]]:
    """YouTokenToMe's encoding as its description says it, in the plainest way."""
    lines = [[int(number) for number in line.split()] for line in model.splitlines()]
    n_characters, n_rules = lines[0]
    ids = {code: number for code, number in lines[1 : 1 + n_characters]}  # noqa: C416  # a list of lists
    rules = lines[1 + n_characters : 1 + n_characters + n_rules]

    def of_word(word: str) -> list[int]:
        symbols: list[int | str] = []
        for character in "\u2581" + word:
            found = ids.get(ord(character), "")
            if found == "" and symbols and isinstance(symbols[-1], str):
                symbols[-1] += character
            else:
                symbols.append(character if found == "" else found)
        while True:
            pairs = list(pairwise(symbols))
            best = next((rule for rule in rules if (rule[0], rule[1]) in pairs), None)
            if best is None:
                return [1 if isinstance(symbol, str) else symbol for symbol in symbols]
            i = pairs.index((best[0], best[1]))
            symbols[i : i + 2] = [best[2]]

    return lambda caption: [
        i for word in re.split("[ \t\n\v\f\r\u2581]+", caption.lower().strip()) if word for i in of_word(word)
    ]


def test_youtokentomes_ids_are_those_of_the_library() -> None:
    tokenizer = YouTokenToMe.read(MODEL)
    assert tokenizer.vocab_size == 200
    ids = [tokenizer.encode(caption) for caption in captions()]
    assert len(ids) == 500
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == LIBRARYS_IDS


def test_youtokentomes_ids_are_those_of_its_rules_one_at_a_time() -> None:
    tokenizer, expected = YouTokenToMe.read(MODEL), restated_yttm(MODEL.read_text())
    for caption in captions():
        if len(caption) < 1000:
            assert tokenizer.encode(caption) == expected(caption), repr(caption)


def test_youtokentomes_ids_become_words_again() -> None:
    tokenizer = YouTokenToMe.read(MODEL)
    known = [caption for caption in captions() if 1 not in tokenizer.encode(caption)]
    assert len(known) > 50
    for caption in known:
        assert tokenizer.decode(tokenizer.encode(caption)).split() == re.split(
            "[ \t\n\v\f\r\u2581]+", caption.lower().strip(" \t\n\v\f\r\u2581")
        ) or not tokenizer.encode(caption)
    assert tokenizer.decode([0, 2, 3]) == ""
    assert tokenizer.decode([1]) == "<UNK>"


BAD_MODELS = {
    "words": ("3 x 4", "something other than whole numbers"),
    "empty": ("", "0 numbers are not those of as many characters and rules as it says"),
    "cut": (MODEL.read_text()[:400], "numbers are not those of as many"),
    "huge": ("9999999999 1 2 3", "numbers are not those of as many"),
    "negative": ("0 0 1 0 2 -3", "numbers are not those of as many"),
    "other specials": (MODEL.read_text().replace("\n1 0 2 3", "\n0 1 2 3"), r"have the ids \[0, 1, 2, 3\]"),
    "twice": ("2 0\n9601 4\n97 4\n1 0 2 3", "6 ids are not 0 … 5"),
    "no words": ("1 0\n97 4\n1 0 2 3", "no mark of beginning words"),
    "lost rule": ("1 1\n9601 4\n4 77 5\n1 0 2 3", "rules of ids that are not there"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_file_that_is_not_youtokentomes_is_refused(tmp_path: Path, name: str) -> None:
    content, message = BAD_MODELS[name]
    file = tmp_path / "bpe.model"
    file.write_text(content)
    with pytest.raises(
        ValueError, match=rf"bpe\.model is no tokenizer of YouTokenToMe, such as bpe\.model: .*{message}"
    ):
        YouTokenToMe.read(file)


def restated_charbpe(vocab_file: Path, merges_file: Path) -> Callable[[str], list[int]]:
    """minDALL-E's encoding in the plainest way: special tokens, cleaning, words, and merges one at a time."""
    vocab = json.loads(vocab_file.read_text())
    merges = [(left, right) for left, right in map(str.split, merges_file.read_text().splitlines()[1:])]

    def cleaned(text: str) -> str:
        spaces = ("\t", "\n", "\r")
        kept = [" " if c in spaces else c for c in text if c in spaces or unicodedata.category(c)[0] != "C"]
        return "".join(f" {c} " if "\u4e00" <= c <= "\u9fff" else c.lower() for c in kept)

    def of_word(word: str) -> list[int]:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while best := next((pair for pair in merges if pair in pairwise(symbols)), None):
            i = list(pairwise(symbols)).index(best)
            symbols[i : i + 2] = ["".join(best).replace("</w>", "") + "</w>" * best[1].endswith("</w>")]
        return [vocab.get(symbol, vocab["[UNK]"]) for symbol in symbols]

    def is_mark(c: str) -> bool:
        return unicodedata.category(c)[0] == "P" or (c.isascii() and c.isprintable() and not c.isalnum() and c != " ")

    def encode(caption: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(r"(\[UNK\]|\[PAD\])", caption):
            if part in ("[UNK]", "[PAD]"):
                ids.append(vocab[part])
                continue
            words = "".join(f" {c} " if is_mark(c) else c for c in cleaned(part)).split()
            ids += [i for word in words for i in of_word(word)]
        return ids

    return encode


def test_charbpes_ids_are_those_of_its_rules_one_at_a_time(tmp_path: Path) -> None:
    files = charbpe_files(tmp_path)
    tokenizer, expected = CharBPE.read(*files), restated_charbpe(*files)
    assert tokenizer.vocab_size == len(json.loads(files[0].read_text()))
    for caption in captions():
        if len(caption) < 2500:
            assert tokenizer.encode(caption) == expected(caption), repr(caption)
    assert tokenizer.encode("A red CUBE, [PAD]")[-1] == tokenizer.pad == 0
    assert tokenizer.encode("half a pair \ud83d") == tokenizer.encode("half a pair ?")


def test_charbpes_ids_become_words_again(tmp_path: Path) -> None:
    tokenizer = CharBPE.read(*charbpe_files(tmp_path))
    ids = tokenizer.encode("A red cube on a blue cube, left")
    assert tokenizer.decode(ids) == "a red cube on a blue cube , left"
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_clips_ids_become_words_again() -> None:
    pairs = OpenAIPairs([("r", "e"), ("re", "d</w>"), ("c", "u"), ("cu", "b")])
    tokenizer = CLIPText(pairs.to_json())
    for caption in ("a red cube on 2 blue cubes , left", "é ü 一 只 猫", "😀"):
        ids = tokenizer.encode(caption)
        assert tokenizer.decode(ids) == caption
        assert tokenizer.decode([*ids, tokenizer.vocab_size - 2, tokenizer.vocab_size - 1]) == caption
    assert len(tokenizer.encode("red")) == 1
    assert tokenizer.decode([]) == ""


def test_ids_of_the_tokenizers_library_become_text_again() -> None:
    trained = Tokenizer(models.BPE(unk_token="[UNK]"))
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], initial_alphabet=alphabet)
    trained.train_from_iterator(["a red cube on a blue cube, left of it"] * 3, trainer)
    tokenizer = HuggingFaceText(trained.to_str())
    for caption in ("a red cube on a blue cube, left", " Two  spaces", "一只猫 😀", ""):
        assert tokenizer.decode(tokenizer.encode(caption)) == caption
    assert len(tokenizer.encode("a red cube")) < len("a red cube")
    assert tokenizer.decode([1]) == "[SEP]"


@pytest.mark.parametrize("kind", ["youtokentome", "charbpe"])
def test_a_bundles_file_gives_the_same_ids_and_name(tmp_path: Path, kind: str) -> None:
    tokenizer = YouTokenToMe.read(MODEL) if kind == "youtokentome" else CharBPE.read(*charbpe_files(tmp_path))
    file = tmp_path / "tokenizer.json"
    tokenizer.save(file)
    loaded = load_tokenizer(file)
    assert type(loaded) is type(tokenizer)
    assert (loaded.hash, loaded.vocab_size) == (tokenizer.hash, tokenizer.vocab_size)
    assert all(loaded.encode(caption) == tokenizer.encode(caption) for caption in captions(60))
    changed = json.loads(file.read_text())
    for damage in ({"model": 3, "vocab": [], "merges": 4}, {"model": "1 2", "vocab": {}, "merges": [["a"]]}):
        file.write_text(json.dumps({**changed, **damage}))
        with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer of .*; import the model again"):
            load_tokenizer(file)


def test_files_that_are_not_mindalles_tokenizer_are_refused(tmp_path: Path) -> None:
    vocab, merges = charbpe_files(tmp_path)
    content = json.loads(vocab.read_text())
    for wrong, message in (
        ({name: i for name, i in content.items() if name != "[PAD]"}, "ids are not 0"),
        ({("[pad]" if name == "[PAD]" else name): i for name, i in content.items()}, r"it has no \[PAD\]"),
        ({**content, "a": 5000}, "ids are not 0"),
        ([], "Bad vocabulary json file"),
    ):
        vocab.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=rf"are no tokenizer of minDALL-E.*({message})"):
            CharBPE.read(vocab, merges)
    with pytest.raises(FileNotFoundError, match=r"expected bpe-16k-vocab\.json"):
        CharBPE.read(vocab, tmp_path / "missing.txt")
