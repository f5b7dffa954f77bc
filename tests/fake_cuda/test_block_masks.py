"""FlexAttention's block masks say of every block of 128×128 what the reference mask says of its queries and keys."""

import pytest
import torch
from phantom import CAN_PRETEND, phantom_gpu
from torch import Tensor

from dalle.attention import Kind, mask
from dalle.sparse_attention import _block_mask

BLOCK = 128
PAPER = (256, 32, 11)
LAYOUTS = [PAPER, (64, 16, 11), (19, 8, 3), (37, 8, 11), (2, 1, 1)]


def blocks_of(kind: Kind, text_len: int, grid: int, kernel: int) -> tuple[Tensor, Tensor]:
    """Return how many pairs of each block the reference allows, and how many there are; (queries, keys) of blocks."""
    allowed = mask(kind, text_len, grid, kernel)
    n = -(-len(allowed) // BLOCK)
    counts = []
    for pairs in (allowed, torch.ones_like(allowed)):
        padded = torch.zeros(n * BLOCK, n * BLOCK)
        padded[: len(allowed), : len(allowed)] = pairs
        counts.append(padded.view(n, BLOCK, n, BLOCK).sum(dim=(1, 3)))
    return counts[0], counts[1]


def listed(numbers: Tensor, indices: Tensor, n: int) -> Tensor:
    """Return a table of blocks, bool (n, n), from the lists of each row."""
    table = torch.zeros(n, n, dtype=torch.bool)
    for row, (count, places) in enumerate(zip(numbers[0, 0], indices[0, 0], strict=True)):
        table[row, places[:count].long()] = True
    return table


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_blocks_are_skipped_whole_or_mixed_as_the_reference_has_them(kind: Kind, layout: tuple[int, int, int]) -> None:
    allowed, all_pairs = blocks_of(kind, *layout)
    found = _block_mask(kind, *layout, torch.device("cpu"))
    n = len(allowed)
    mixed = listed(found.kv_num_blocks, found.kv_indices, n)
    full = listed(found.full_kv_num_blocks, found.full_kv_indices, n)
    assert not (mixed & full).any()
    assert torch.equal(mixed | full, allowed > 0)
    assert (allowed[full] == all_pairs[full]).all()
    # the backward pass goes through the keys' blocks, by lists of its own
    assert torch.equal(listed(found.q_num_blocks, found.q_indices, n).T, mixed)
    assert torch.equal(listed(found.full_q_num_blocks, found.full_q_indices, n).T, full)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_within_a_mixed_block_the_mask_is_the_reference(kind: Kind) -> None:
    text_len, grid, kernel = 37, 8, 3
    found = _block_mask(kind, text_len, grid, kernel, torch.device("cpu"))
    reference = mask(kind, text_len, grid, kernel)
    place = torch.arange(len(reference))
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(found.mask_mod(zero, zero, place[:, None], place[None, :]), reference)


@pytest.mark.parametrize(("kind", "computed"), [("row", 34), ("conv", 40), ("column", 55)])
def test_at_the_papers_size_a_kernel_computes_so_many_of_the_55_causal_blocks(kind: Kind, computed: int) -> None:
    allowed, _ = blocks_of(kind, *PAPER)
    assert int((allowed > 0).sum()) == computed
    assert len(allowed) * (len(allowed) + 1) // 2 == 55


@pytest.mark.slow
@pytest.mark.skipif(not CAN_PRETEND, reason="needs Linux and g++")
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_block_masks_of_a_gpu_have_the_shapes_of_the_cpus(kind: Kind) -> None:
    layout = (21, 8, 3)
    expected = _block_mask(kind, *layout, torch.device("cpu"))
    with phantom_gpu():
        found = _block_mask(kind, *layout, torch.device("cuda", 0))
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices"):
        assert getattr(found, name).shape == getattr(expected, name).shape
        assert getattr(found, name).device.type == "cuda"
