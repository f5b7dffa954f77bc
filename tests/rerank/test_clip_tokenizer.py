import json
import logging
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models
from tokenizers.trainers import BpeTrainer

from rerank.tokenizer import CLIPTokenizer

CAPTIONS = [
    f"a {colour} {thing} on a {shade} table"
    for colour in ("red", "blue", "green")
    for thing in ("cat", "cube")
    for shade in ("dark", "light")
]
FOREIGN = [
    "红色的猫坐在桌子上",
    "красный кот",
    "قطة حمراء",
    "👩‍👩‍👧 and 🐈!",
    "naïve café, 5 €",
    "\x00\x07",
    "ɐ\u0301\u200bz",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.train(CAPTIONS, 300)


def test_a_row_is_start_ids_end_then_zeros(tokenizer):
    row = tokenizer.tokenize(["a red cat"], 12)[0].tolist()
    ids = tokenizer.encode("a red cat")
    assert 0 < len(ids) < 10
    assert row == [tokenizer.start_id, *ids, tokenizer.end_id] + [0] * (10 - len(ids))


def test_no_id_means_two_things(tokenizer):
    bpe_ids = set(tokenizer._pairs.vocab.values())
    assert bpe_ids == set(range(tokenizer.vocab_size - 2))
    assert tokenizer.start_id not in bpe_ids
    assert tokenizer.end_id == tokenizer.vocab_size - 1 == tokenizer.start_id + 1


def test_end_is_the_first_highest_id_even_if_the_caption_uses_the_pad_id(tokenizer):
    ids = tokenizer.encode("!!!")
    assert 0 in ids  # id 0 is the byte "!", and also fills the row
    row_L = tokenizer.tokenize(["!!!"], 20)[0]
    assert row_L.argmax().item() == len(ids) + 1
    assert tokenizer.decode(row_L.tolist()) == "!!!"


@pytest.mark.parametrize("spelled", ["<|endoftext|>", "<|startoftext|>", "<end_of_text>"])
def test_a_caption_cannot_spell_a_special_token(tokenizer, spelled):
    assert max(tokenizer.encode(f"a cat {spelled} b")) < tokenizer.start_id


def test_a_cut_caption_keeps_its_end_and_is_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = tokenizer.tokenize(["a cat", "zebra " * 2000, "zebra " * 50], 8)
    assert rows.shape == (3, 8)
    assert (rows == tokenizer.end_id).sum(dim=1).tolist() == [1, 1, 1]
    assert rows[1, -1] == rows[2, -1] == tokenizer.end_id
    assert "2 of 3 captions were cut" in caplog.text
    assert tokenizer.tokenize_counting(["a cat", "zebra " * 50], 8)[1] == 1


def test_a_caption_that_just_fits_is_not_cut(tokenizer):
    caption = "zebra zebra"
    length = len(tokenizer.encode(caption)) + 2
    assert tokenizer.tokenize_counting([caption], length)[1] == 0
    assert tokenizer.tokenize_counting([caption], length - 1)[1] == 1


@pytest.mark.parametrize("caption", FOREIGN)
def test_any_script_round_trips_though_only_english_was_trained(tokenizer, caption):
    row = tokenizer.tokenize([caption], 200)[0].tolist()
    assert tokenizer.decode(row) == caption.lower()


def test_case_width_and_white_space_do_not_matter(tokenizer):
    assert tokenizer.encode("  A\tRed\n\n ＣＡＴ ") == tokenizer.encode("a red cat")


@pytest.mark.parametrize("caption", ["", "  \n\u3000"])
def test_an_empty_caption_is_start_and_end(tokenizer, caption):
    assert tokenizer.tokenize([caption], 4).tolist() == [[tokenizer.start_id, tokenizer.end_id, 0, 0]]


@pytest.mark.slow
def test_training_gives_the_same_tokenizer_in_another_process(tokenizer):
    code = (
        "import sys; from rerank.tokenizer import CLIPTokenizer;"
        f"sys.stdout.write(CLIPTokenizer.train({CAPTIONS!r}, 300).to_json())"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert other.stdout == tokenizer.to_json()


def test_training_learns_words_and_few_captions_give_a_smaller_vocabulary():
    tokenizer = CLIPTokenizer.train(iter(CAPTIONS), 5000)
    assert 258 < tokenizer.vocab_size < 5000
    assert len(tokenizer.encode("a red cat on a dark table")) == 7


def test_json_and_file_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    for other in (CLIPTokenizer.load(tmp_path / "t.json"), CLIPTokenizer.from_json(tokenizer.to_json())):
        assert other.to_json() == tokenizer.to_json()
        assert other.tokenize(CAPTIONS, 20).equal(tokenizer.tokenize(CAPTIONS, 20))


def test_wrong_files_are_refused_in_words(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no CLIP tokenizer at"):
        CLIPTokenizer.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"bad\.json"):
        CLIPTokenizer.load(tmp_path / "bad.json")
    for text in ("", "{}", "[]", Tokenizer(models.BPE()).to_str()):
        with pytest.raises(ValueError, match="tokenizer"):
            CLIPTokenizer.from_json(text)


def test_a_tokenizer_with_added_tokens_or_missing_bytes_is_refused(tokenizer):
    bpe = Tokenizer.from_str(tokenizer.to_json())
    bpe.add_special_tokens(["<end>"])
    with pytest.raises(ValueError, match="<end>"):
        CLIPTokenizer.from_json(bpe.to_str())
    bpe = Tokenizer.from_str(tokenizer.to_json())
    bpe.train_from_iterator(["abc"], trainer=BpeTrainer(vocab_size=50, show_progress=False))
    with pytest.raises(ValueError, match="bytes have no id"):
        CLIPTokenizer.from_json(bpe.to_str())


def test_bad_arguments_are_refused(tokenizer):
    with pytest.raises(ValueError, match="at least 258"):
        CLIPTokenizer.train(CAPTIONS, 257)
    with pytest.raises(ValueError, match="no captions"):
        CLIPTokenizer.train([], 300)
    with pytest.raises(ValueError, match="single string"):
        tokenizer.tokenize("a cat", 8)
    with pytest.raises(ValueError, match="at least 3"):
        tokenizer.tokenize(["a cat"], 2)
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a \ud83d cat")
    with pytest.raises(ValueError, match="got bytes"):
        tokenizer.encode(b"a cat")


MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("'", "s</w>"), ("a", "n")]


@pytest.fixture(scope="module")
def openai() -> CLIPTokenizer:
    return CLIPTokenizer.openai(MERGES)


def test_openais_ids_are_bytes_bytes_at_the_end_of_a_word_then_merges(openai):
    assert openai.vocab_size == 514 + len(MERGES)
    red, cat, an = (512 + MERGES.index(pair) for pair in MERGES if pair[0] in ("re", "ca", "a"))
    assert openai.encode("red cat") == [red, cat]
    assert openai.encode("an") == [64, 256 + 77]  # "an</w>" is no merge: the last letter of a word is another symbol
    assert openai.encode("ana") == [an, 256 + 64]
    assert openai.encode("cat's 12!!") == [cat, 512 + 4, 256 + 16, 256 + 17, 0, 256]
    assert openai.tokenize(["red"], 5).tolist() == [[openai.start_id, red, openai.end_id, 0, 0]]


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("  Red\n\tCAT ", "red cat"),
        ("itâ€™s", "it's"),
        ("“red” ﬁsh", '"red" fish'),
        ("&amp;lt;b&amp;gt; &eacute;", "<b> é"),
        ("ΣΑΣ", "σας"),
        ("猫 🐈", "猫 🐈"),
        ("", ""),
        ("<|endoftext|>", "<| endoftext |>"),
    ],
)
def test_openais_cleaning_mends_unescapes_and_lowers(openai, caption, clean):
    assert openai.encode(caption) == openai.encode(clean)
    assert openai.decode(openai.encode(caption)) == clean.replace('"red"', '" red "').replace("<b>", "< b >").replace(
        "it's", "it 's"
    )
    assert all(number < openai.start_id for number in openai.encode(caption))


def test_the_file_says_which_kind_of_tokenizer_it_is(openai, tokenizer, tmp_path):
    openai.save(tmp_path / "t.json")
    assert CLIPTokenizer.load(tmp_path / "t.json").tokenize(CAPTIONS, 30).equal(openai.tokenize(CAPTIONS, 30))
    changed = json.loads(openai.to_json())
    changed["pre_tokenizer"] = json.loads(tokenizer.to_json())["pre_tokenizer"]
    for text in (json.dumps(changed), '{"model": {"end_of_word_suffix": "</w>"}}'):
        with pytest.raises(ValueError, match="not CLIP's tokenizer"):
            CLIPTokenizer.from_json(text)
    for merges, message in (([("r", "e"), ("r", "e")], "symbol that is there"), ([("xx", "y")], "not those of a BPE")):
        with pytest.raises(ValueError, match=message):
            CLIPTokenizer.openai(merges)
