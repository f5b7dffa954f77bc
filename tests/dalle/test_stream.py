import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle.stream import (
    IGNORED,
    Stream,
    image_inputs,
    n_text_ids,
    null_caption,
    pad_id,
    start_id,
    start_of_image_id,
    text_row,
    text_rows,
    text_targets,
)


def test_the_papers_stream_has_1280_positions():
    assert Stream().length == 1280
    assert Stream().n_image == 1024


def test_image_positions_are_in_raster_order():
    stream = Stream(4, 3)
    assert stream.rows().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert stream.columns().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("text_len", "grid"), [(1, 4), (0, 4), (4, 0)])
def test_a_stream_without_room_is_refused(text_len, grid):
    with pytest.raises(ValueError, match="must be at least"):
        Stream(text_len, grid)


@given(st.integers(257, 20_000), st.integers(2, 300))
def test_no_text_id_means_two_things(vocab, text_len):
    special = [start_id(vocab), *(pad_id(vocab, t) for t in range(text_len))]
    assert len(set(special)) == text_len + 1
    assert min(special) >= vocab
    assert max(special) == n_text_ids(vocab, text_len) - 1


def test_start_of_image_is_no_image_token():
    assert start_of_image_id(8192) not in range(8192)


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(2, 8))
def test_rows_start_with_start_and_pad_to_their_length(ids, text_len):
    row = text_row(ids, 10, text_len)
    n = min(len(ids), text_len - 1)
    assert len(row) == text_len
    assert row[: n + 1] == [10, *ids[:n]]
    assert row[n + 1 :] == [11 + t for t in range(n + 1, text_len)]


def test_rows_of_several_captions_are_those_of_each():
    captions = [[], [3], [1, 2, 3, 4], [5] * 9]
    rows = text_rows(captions, 10, 5)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [text_row(ids, 10, 5) for ids in captions]
    assert text_rows([], 10, 5).shape == (0, 5)


def test_the_null_caption_is_start_and_pads():
    assert null_caption(10, 4).tolist() == [10, 12, 13, 14]


def test_text_targets_are_the_following_bpe_ids_and_never_pads():
    text = torch.tensor([[10, 3, 0, 14], [10, 12, 13, 14], [10, 1, 2, 3]])
    assert text_targets(text, 10).tolist() == [
        [3, 0, IGNORED, IGNORED],
        [IGNORED] * 4,
        [1, 2, 3, IGNORED],
    ]


def test_image_positions_are_fed_the_token_before():
    assert image_inputs(torch.tensor([[5, 6, 7]]), 8).tolist() == [[8, 5, 6]]
    assert image_inputs(torch.empty((2, 0), dtype=torch.int64), 8).shape == (2, 0)
