import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle.stream import pad_id, start_id
from dalle.tokenizer import Tokenizer

CAPTIONS = [
    f"A {size} {colour} {shape} {place} of a picture"
    for size in ("small", "large")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "triangle", "square")
    for place in ("at the top", "on the left", "in the middle")
]
TOKENIZER = Tokenizer.train(CAPTIONS, 320)


def test_training_twice_gives_the_same_tokenizer():
    again = Tokenizer.train(CAPTIONS, 320)
    assert again.hash == TOKENIZER.hash
    assert len(TOKENIZER.hash) == 16
    assert Tokenizer.train(CAPTIONS, 300).hash != TOKENIZER.hash


def test_vocabulary_has_the_size_wanted_or_what_the_captions_allow():
    assert TOKENIZER.vocab_size == 320
    assert 257 <= Tokenizer.train(["ab ab"], 16_384).vocab_size < 270


def test_common_words_become_single_tokens():
    assert len(TOKENIZER.encode("red circle")) < len("red circle") / 2


def test_case_and_white_space_do_not_matter():
    assert TOKENIZER.encode("  A RED\t\ncircle ") == TOKENIZER.encode("a red circle")
    assert TOKENIZER.decode(TOKENIZER.encode("  A RED\t\ncircle ")) == "a red circle"


@pytest.mark.parametrize("caption", ["", "   ", "\n\t\u00a0"])
def test_a_caption_with_nothing_in_it_has_no_ids(caption):
    assert TOKENIZER.encode(caption) == []


@given(st.text())
def test_decoding_gives_the_normalised_caption_whatever_the_text(caption):
    ids = TOKENIZER.encode(caption)
    assert TOKENIZER.decode(ids) == TOKENIZER.normalise(caption)
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


@given(st.text(), st.sampled_from([0.1, 0.5, 1.0]), st.integers(0, 2**32))
def test_dropout_changes_the_ids_but_not_the_text(caption, dropout, seed):
    ids = TOKENIZER.encode(caption, dropout=dropout, rng=np.random.default_rng(seed))
    assert TOKENIZER.decode(ids) == TOKENIZER.normalise(caption)


@given(st.one_of(st.sampled_from(CAPTIONS), st.text(max_size=20)))
def test_merging_with_next_to_no_dropout_equals_the_library(caption):
    ids = TOKENIZER.encode(caption, dropout=1e-300, rng=np.random.default_rng(0))
    assert ids == TOKENIZER.encode(caption)


def test_lone_surrogates_are_no_error():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a?b"


def test_full_dropout_spells_bytes():
    ids = TOKENIZER.encode("red circle", dropout=1.0, rng=np.random.default_rng(0))
    assert len(ids) == len("red circle")


def test_dropout_is_a_function_of_its_rng():
    def ids(seed):
        return TOKENIZER.encode(CAPTIONS[0], dropout=0.3, rng=np.random.default_rng(seed))

    assert ids(1) == ids(1)
    assert len({tuple(ids(seed)) for seed in range(20)}) > 5


def test_a_word_of_ten_thousand_characters_is_encoded_with_dropout_in_no_time():
    caption = "red" * 3334
    ids = TOKENIZER.encode(caption, dropout=0.1, rng=np.random.default_rng(0))
    assert TOKENIZER.decode(ids) == caption


def test_dropout_without_rng_or_out_of_range_is_refused():
    with pytest.raises(ValueError, match="needs an rng"):
        TOKENIZER.encode("red", dropout=0.1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        TOKENIZER.encode("red", dropout=1.5, rng=np.random.default_rng(0))


def test_text_is_start_ids_and_one_pad_per_position():
    V = TOKENIZER.vocab_size
    ids = TOKENIZER.encode("red circle")
    text, n_cut = TOKENIZER.text(["red circle", ""], 8)
    assert text.dtype == torch.int64
    assert n_cut == 0
    assert text[0].tolist() == [start_id(V), *ids, *(pad_id(V, t) for t in range(1 + len(ids), 8))]
    assert text[1].tolist() == [V, *(V + 1 + t for t in range(1, 8))]


def test_several_captions_have_the_rows_of_each():
    text, n_cut = TOKENIZER.text(CAPTIONS[:9], 5)
    each = [TOKENIZER.text([caption], 5) for caption in CAPTIONS[:9]]
    assert torch.equal(text, torch.cat([row for row, _ in each]))
    assert n_cut == sum(n for _, n in each)


def test_longer_captions_are_cut_and_counted():
    long = "red blue green yellow circle square triangle"
    ids = TOKENIZER.encode(long)
    text, n_cut = TOKENIZER.text([long, "red", long], 4)
    assert n_cut == 2
    assert text[0].tolist() == [TOKENIZER.vocab_size, *ids[:3]]
    _, n_cut = TOKENIZER.text([long], len(ids) + 1)
    assert n_cut == 0


def test_text_with_dropout_takes_one_rng_per_caption():
    captions = CAPTIONS[:3]
    text, _ = TOKENIZER.text(captions, 40, dropout=0.5, rngs=[np.random.default_rng(k) for k in range(3)])
    alone, _ = TOKENIZER.text(captions[2:], 40, dropout=0.5, rngs=[np.random.default_rng(2)])
    assert torch.equal(text[2:], alone)
    with pytest.raises(ValueError, match="1 rngs for 3 captions"):
        TOKENIZER.text(captions, 40, dropout=0.5, rngs=[np.random.default_rng(0)])


def test_save_and_load_give_the_same_tokenizer(tmp_path):
    file = tmp_path / "bundle" / "tokenizer.json"
    TOKENIZER.save(file)
    loaded = Tokenizer.load(file)
    assert loaded.hash == TOKENIZER.hash
    assert loaded.encode(CAPTIONS[3]) == TOKENIZER.encode(CAPTIONS[3])
    rngs = [np.random.default_rng(0), np.random.default_rng(0)]
    assert loaded.encode("a red", dropout=0.5, rng=rngs[0]) == TOKENIZER.encode("a red", dropout=0.5, rng=rngs[1])
    assert [path.name for path in file.parent.iterdir()] == ["tokenizer.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    TOKENIZER.save(file)
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Tokenizer.train(CAPTIONS, 300).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_missing_and_damaged_files_are_named(tmp_path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*dalle-train tokenizer"):
        Tokenizer.load(file)
    TOKENIZER.save(file)
    text = file.read_text(encoding="utf-8")
    for damaged in (b"", b"{}", b"[1]", text.encode()[: len(text) // 2], b"\xff\xfe\x00"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            Tokenizer.load(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["model"].update(dropout=0.1),
        lambda saved: saved.update(normalizer=None),
        lambda saved: saved["pre_tokenizer"].update(add_prefix_space=True),
        lambda saved: saved["model"]["vocab"].pop("a"),
    ],
)
def test_another_kind_of_tokenizer_is_refused(tmp_path, change):
    file = tmp_path / "tokenizer.json"
    TOKENIZER.save(file)
    saved = json.loads(file.read_text(encoding="utf-8"))
    change(saved)
    file.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another kind|damaged"):
        Tokenizer.load(file)


def test_training_needs_captions_and_room_for_a_merge():
    with pytest.raises(ValueError, match="no captions"):
        Tokenizer.train([])
    with pytest.raises(ValueError, match="at least 257"):
        Tokenizer.train(CAPTIONS, 256)


def test_only_bpe_ids_can_be_decoded():
    with pytest.raises(ValueError, match="BPE ids are 0 to 319"):
        TOKENIZER.decode([1, TOKENIZER.vocab_size])
