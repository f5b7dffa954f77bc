"""Every fast path of attention is held to `masked_attention`, forward and gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from dalle.attention import KINDS, Attend, Kind, mask, masked_attention
from dalle.sparse_attention import block_attention, block_mask_attention, sparse_attention, two_part_attention

FAST = {"two_part": two_part_attention, "block": block_attention, "chosen": sparse_attention}
SIZES = [(6, 4, 3), (2, 5, 11), (9, 3, 5), (4, 1, 3), (37, 8, 11), (5, 17, 7)]
"""(text_len, grid, kernel): text longer and shorter than what a window reaches back, odd lengths, a grid of one."""


def inputs(text_len: int, grid: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    """Queries, keys and values of 3 heads as a projection leaves them, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, batch, text_len + grid * grid, 3, 16)
    return list(torch.randn(shape, generator=generator).to(dtype).transpose(2, 3).unbind(0))


def forward_and_backward(attend: Attend, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize(("text_len", "grid", "kernel"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_every_fast_path_is_masked_attention_forward_and_backward(
    path: str, kind: Kind, text_len: int, grid: int, kernel: int, dtype: torch.dtype, tolerance: float
) -> None:
    given = inputs(text_len, grid, dtype)
    fast = partial(FAST[path], kind=kind, text_len=text_len, grid=grid, kernel=kernel)
    slow = partial(masked_attention, mask_SS=mask(kind, text_len, grid, kernel))
    for ours, reference in zip(forward_and_backward(fast, *given), forward_and_backward(slow, *given), strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_dense_attention_is_masked_attention() -> None:
    q, k, v, _ = inputs(7, 4)
    ours = sparse_attention(q, k, v, kind="dense", text_len=7, grid=4)
    torch.testing.assert_close(ours, masked_attention(q, k, v, mask("dense", 7, 4)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid", "kernel"), SIZES[:4])
def test_block_masks_of_flex_attention_are_the_masks(kind: Kind, text_len: int, grid: int, kernel: int) -> None:
    q, k, v, _ = inputs(text_len, grid)
    ours = block_mask_attention(q, k, v, kind=kind, text_len=text_len, grid=grid, kernel=kernel)
    reference = masked_attention(q, k, v, mask(kind, text_len, grid, kernel))
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_gradients_in_float64_are_those_of_finite_differences(kind: Kind) -> None:
    q, k, v, _ = (x.double().requires_grad_() for x in inputs(3, 3, batch=1))
    for path in (two_part_attention, block_attention):
        assert torch.autograd.gradcheck(
            partial(path, kind=kind, text_len=3, grid=3, kernel=3), (q, k, v), fast_mode=True
        )


def test_scores_far_above_what_an_exponential_can_hold_change_nothing() -> None:
    q, k, v, upstream = inputs(6, 4)
    q, k = 30 * q, 30 * k  # scores up to thousands; a float32 exponential ends at 88
    fast = partial(two_part_attention, kind="row", text_len=6, grid=4, kernel=3)
    slow = partial(masked_attention, mask_SS=mask("row", 6, 4, 3))
    for ours, reference in zip(
        forward_and_backward(fast, q, k, v, upstream), forward_and_backward(slow, q, k, v, upstream), strict=True
    ):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, reference, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compilation_goes_through_without_a_break_and_changes_nothing(dtype: torch.dtype) -> None:
    given = inputs(9, 16, dtype)
    for kind in ("row", "column", "conv"):
        eager = partial(sparse_attention, kind=kind, text_len=9, grid=16)
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        for ours, reference in zip(
            forward_and_backward(compiled, *given), forward_and_backward(eager, *given), strict=True
        ):
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid"), [(19, 8), (37, 8), (64, 16), (256, 32)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
def test_attention_on_a_gpu_is_masked_attention_forward_and_backward(
    kind: Kind, text_len: int, grid: int, dtype: torch.dtype, tolerance: float
) -> None:
    given = [x.cuda() for x in inputs(text_len, grid, dtype)]
    fast = partial(sparse_attention, kind=kind, text_len=text_len, grid=grid)
    slow = partial(masked_attention, mask_SS=mask(kind, text_len, grid, device="cuda"))
    for ours, reference in zip(forward_and_backward(fast, *given), forward_and_backward(slow, *given), strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
