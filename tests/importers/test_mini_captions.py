"""DALL·E mini's captions and ids beside its own program's, and Hugging Face's."""

import importlib.util
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from mini_files import vocabulary

from dalle.family.texts.mini_captions import normalised
from dalle.family.tokenizers import load_tokenizer
from dalle.importers.mini.vocabulary import read_vocabulary

WORDS = (
    "It's¦DON'T stop¦a dog¦&amp;amp;¦<b>¦</b>¦<person>¦’s¦naïve¦â€™¦ΣΑΣ¦ﬁ¦½¦3.14¦1,000,000¦12/05/2021¦e.g. this¦a.b.c¦"
    "U.S.A.¦http://x.y/z?q=1¦https://t.co¦[12]¦well-known¦50%¦R&B¦$5¦a/b¦*star*¦#hashtag¦#two_words¦_x_¦\\n¦`code`¦"
    "\"quoted\"¦''¦...¦!!!!!¦?!¦,,,¦ , ¦aaaaaaa¦xviii¦1111111¦----¦(in brackets)¦{x}¦~¦猫¦кошка¦👩‍👩‍👧¦🏳️‍🌈¦🐱¦❤️¦☃¦"
    "\u200b¦\u3000¦\t¦\n¦we've¦they'll¦'tis¦&lt;p&gt;¦&#39;s¦aaa¦\x1c¦İ¦ǅ¦<person> and <person>¦|¦;:"
)
PARTS = [*WORDS.split("¦"), "x" * 90, "word " * 30]
RANGES = [(32, 127), (32, 1500), (0x900, 0x1100), (0x2000, 0x3100), (0x4E00, 0x9FFF), (0x1F300, 0x1FA00)]


def captions(n: int) -> list[str]:
    drawn = random.Random(0)
    made = []
    for number in range(n):
        words = drawn.choices(PARTS, k=drawn.randint(1, 8))
        if number % 3 == 0:
            first, last = drawn.choice(RANGES)
            words.append("".join(chr(drawn.randrange(first, last)) for _ in range(drawn.randint(1, 20))))
        made.append(drawn.choice([" ", "", ", "]).join(words))
    return made


def their_normaliser(monkeypatch: pytest.MonkeyPatch) -> Any:
    """borisdayma/dalle-mini's, alone, without its list of words and without chance."""
    found = [Path(folder) / "dalle_mini/model/text.py" for folder in sys.path]
    file = next((path for path in found if path.is_file()), None)
    if file is None:
        pytest.skip("dalle-mini is not installed: `make references` does it")
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    spec = importlib.util.spec_from_file_location("their_text", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.random, "choices", lambda population, weights: population[:1])
    normaliser = module.TextNormalizer.__new__(module.TextNormalizer)
    normaliser._hashtag_processor = lambda word: word
    return normaliser


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning", "ignore::RuntimeWarning")
def test_captions_are_normalised_as_by_their_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = their_normaliser(monkeypatch)
    wrong = [caption for caption in captions(600) if normalised(caption) != theirs(caption)]
    assert not wrong


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", " "),
        ("A RED Cube, on a blue cube.", " a red cube, on a blue cube"),
        ("It's 3.14 &amp; 1,000,000 dogs!!!!!", " it's 3.14 & 1000000 dogs"),
        ("12/05/2021 (well-known) R&B 50%", " 12/05/2021, well known, r & b 50 %"),
        ("<b>bold</b> http://x.y/z [3]", " bold"),
        ("#two_words 'quoted' wooooow", ' two words " quoted " wow'),
    ],
)
def test_what_ascii_captions_become(caption: str, expected: str) -> None:
    assert normalised(caption) == expected


def test_other_letters_and_emoji_become_ascii() -> None:
    pytest.importorskip("emoji")
    pytest.importorskip("unidecode")
    assert normalised("naïve 🐱 кошка") == " naive, cat face, koshka"


def test_without_its_packages_captions_in_ascii_are_read_and_others_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "emoji", None)
    assert normalised("a cat") == " a cat"
    message = r"'naïve' has characters .* emoji is not installed: pip install 'dalle\[import\]'"
    with pytest.raises(ValueError, match=message):
        normalised("naïve")


def test_ids_are_those_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = vocabulary(tmp_path)
    tokenizer, _ = read_vocabulary(folder)
    theirs = transformers.BartTokenizer.from_pretrained(str(folder))
    start, end = tokenizer.vocab["<s>"], tokenizer.vocab["</s>"]
    for caption in captions(500):
        ids = tokenizer.encode(caption)
        assert [start, *ids, end] == theirs(normalised(caption)).input_ids, caption
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.hash == tokenizer.hash
    assert again.encode("a red cube 1,000") == tokenizer.encode("a red cube 1,000")
    assert not set(tokenizer.encode("<s></s><pad><unk>")) & {0, 1, 2, 3}


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for text in ('{"kind": "bart"}', '{"kind": "bart", "normalises": true, "vocab": [], "merges": []}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer of DALL·E mini"):
            load_tokenizer(file)
