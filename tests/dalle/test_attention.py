import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle.attention import KINDS, keys, layer_kinds, mask, stored_mask

# A stream of 6 text positions and a 4×4 grid: one line per query, one digit per key, 1 where attention is allowed.

ROW = """
    100000 0000 0000 0000 0000
    110000 0000 0000 0000 0000
    111000 0000 0000 0000 0000
    111100 0000 0000 0000 0000
    111110 0000 0000 0000 0000
    111111 0000 0000 0000 0000
    111111 1000 0000 0000 0000
    111111 1100 0000 0000 0000
    111111 1110 0000 0000 0000
    111111 1111 0000 0000 0000
    111111 1111 1000 0000 0000
    111111 0111 1100 0000 0000
    111111 0011 1110 0000 0000
    111111 0001 1111 0000 0000
    111111 0000 1111 1000 0000
    111111 0000 0111 1100 0000
    111111 0000 0011 1110 0000
    111111 0000 0001 1111 0000
    111111 0000 0000 1111 1000
    111111 0000 0000 0111 1100
    111111 0000 0000 0011 1110
    111111 0000 0000 0001 1111
"""
COLUMN = """
    100000 0000 0000 0000 0000
    110000 0000 0000 0000 0000
    111000 0000 0000 0000 0000
    111100 0000 0000 0000 0000
    111110 0000 0000 0000 0000
    111111 0000 0000 0000 0000
    111111 1000 0000 0000 0000
    111111 0100 0000 0000 0000
    111111 0010 0000 0000 0000
    111111 0001 0000 0000 0000
    111111 1000 1000 0000 0000
    111111 0100 0100 0000 0000
    111111 0010 0010 0000 0000
    111111 0001 0001 0000 0000
    111111 1000 1000 1000 0000
    111111 0100 0100 0100 0000
    111111 0010 0010 0010 0000
    111111 0001 0001 0001 0000
    111111 1000 1000 1000 1000
    111111 0100 0100 0100 0100
    111111 0010 0010 0010 0010
    111111 0001 0001 0001 0001
"""
CONV = """
    100000 0000 0000 0000 0000
    110000 0000 0000 0000 0000
    111000 0000 0000 0000 0000
    111100 0000 0000 0000 0000
    111110 0000 0000 0000 0000
    111111 0000 0000 0000 0000
    111111 1000 0000 0000 0000
    111111 1100 0000 0000 0000
    111111 0110 0000 0000 0000
    111111 1011 0000 0000 0000
    111111 1101 1000 0000 0000
    111111 1110 1100 0000 0000
    111111 0111 0110 0000 0000
    111111 0011 1011 0000 0000
    111111 0001 1101 1000 0000
    111111 0000 1110 1100 0000
    111111 0000 0111 0110 0000
    111111 0000 0011 1011 0000
    111111 0000 0001 1101 1000
    111111 0000 0000 1110 1100
    111111 0000 0000 0111 0110
    111111 0000 0000 0011 1011
"""
DENSE = """
    100000 0000 0000 0000 0000
    110000 0000 0000 0000 0000
    111000 0000 0000 0000 0000
    111100 0000 0000 0000 0000
    111110 0000 0000 0000 0000
    111111 0000 0000 0000 0000
    111111 1000 0000 0000 0000
    111111 1100 0000 0000 0000
    111111 1110 0000 0000 0000
    111111 1111 0000 0000 0000
    111111 1111 1000 0000 0000
    111111 1111 1100 0000 0000
    111111 1111 1110 0000 0000
    111111 1111 1111 0000 0000
    111111 1111 1111 1000 0000
    111111 1111 1111 1100 0000
    111111 1111 1111 1110 0000
    111111 1111 1111 1111 0000
    111111 1111 1111 1111 1000
    111111 1111 1111 1111 1100
    111111 1111 1111 1111 1110
    111111 1111 1111 1111 1111
"""

DRAWN = {"row": ROW, "column": COLUMN, "conv": CONV, "dense": DENSE}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_a_small_stream_are_as_drawn(kind):
    drawn = [[int(digit) for digit in line.replace(" ", "")] for line in DRAWN[kind].split("\n") if line.strip()]
    assert mask(kind, 6, 4, 3).int().tolist() == drawn


@pytest.mark.parametrize(("kind", "n"), [("row", 33), ("column", 32), ("conv", 61), ("dense", 1024)])
def test_the_last_position_of_the_papers_grid_sees_so_many_image_positions(kind, n):
    assert len(keys(kind, 1023, 32, 11)) == n
    assert mask(kind, 256, 32, 11)[-1].sum() == 256 + n


def test_the_papers_64_layers_are_47_row_16_column_and_a_last_conv():
    kinds = layer_kinds(64)
    assert [kinds.count(kind) for kind in ("row", "column", "conv")] == [47, 16, 1]
    assert kinds[-1] == "conv"
    assert kinds[:8] == ("row", "column", "row", "row", "row", "column", "row", "row")


@given(st.sampled_from(KINDS), st.integers(2, 8), st.integers(1, 7), st.sampled_from([1, 3, 5, 11]))
def test_masks_of_every_size_are_causal_see_themselves_and_all_text(kind, text_len, grid, kernel):
    allowed = mask(kind, text_len, grid, kernel)
    assert not allowed.triu(1).any()
    assert allowed.diagonal().all()
    assert allowed[text_len:, :text_len].all()
    assert torch.equal(allowed[:text_len, :text_len], torch.ones(text_len, text_len).tril().bool())


@given(st.sampled_from(KINDS), st.integers(1, 7), st.sampled_from([1, 3, 5, 11]))
def test_keys_list_what_the_mask_draws(kind, grid, kernel):
    allowed = mask(kind, 2, grid, kernel)[2:, 2:]
    for position in range(grid * grid):
        assert keys(kind, position, grid, kernel) == allowed[position].nonzero()[:, 0].tolist()


def test_a_mask_first_used_in_inference_mode_can_be_trained_with_later():
    with torch.inference_mode():
        stored = stored_mask("row", 3, 3, 5, torch.device("cpu"))
    assert not stored.is_inference()


def test_unknown_kinds_even_kernels_and_no_layers_are_refused():
    with pytest.raises(ValueError, match="unknown attention kind 'diagonal'"):
        mask("diagonal", 4, 4)
    with pytest.raises(ValueError, match="must be odd"):
        mask("conv", 4, 4, 4)
    with pytest.raises(ValueError, match=r"n_layers \(0\)"):
        layer_kinds(0)
