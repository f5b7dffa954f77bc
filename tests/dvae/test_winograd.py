import pytest
import torch
from torch.nn import functional as F

from dvae.fast import winograd
from dvae.fast.winograd import Convolution3x3, Rows


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(map_HWC: torch.Tensor, dtype: torch.dtype = torch.float32) -> Rows:
    height, width, channels = map_HWC.shape
    rows = Rows.new(height, width, channels, torch.full((3000,), torch.nan, dtype=dtype))
    rows.inside.copy_(map_HWC)
    return rows


@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("width", [1, 2, 7])
def test_it_is_the_convolution_of_relu_for_every_height_and_width(height: int, width: int) -> None:
    x, weight, bias = drawn(height, width, 5), drawn(6, 5, 3, 3, seed=1), drawn(6, seed=2)
    expected = F.conv2d(x.relu().permute(2, 0, 1), weight, bias, padding=1).permute(1, 2, 0)
    values = Convolution3x3(weight, bias, torch.float32)(rows_of(x), winograd.spread)
    placed, added = rows_of(torch.zeros(height, width, 6)), rows_of(torch.ones(height, width, 6))
    winograd.place(*placed.writes(), *values)
    winograd.add(*added.writes(), *values)
    assert torch.allclose(placed.inside, expected.relu(), atol=1e-5 * float(expected.std()))
    assert torch.allclose(added.inside, expected + 1, atol=1e-5 * float(expected.std()))


def test_rows_outside_the_map_are_zero_again_after_the_border_is_cleared() -> None:
    rows = rows_of(torch.ones(6, 2, 3))
    assert rows.padded.shape == (10, 2, 3)
    for row in rows.writes():
        row.fill_(2.0)
    rows.clear_border()
    assert rows.padded[:, 0, 0].tolist() == [0, 2, 2, 2, 2, 2, 2, 0, 0, 0]


def test_tiles_read_their_rows_and_one_on_either_side() -> None:
    rows = rows_of(torch.arange(8.0)[:, None, None] + 1)
    assert torch.stack(rows.reads(), dim=1)[:, :, 0].tolist() == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 0]]


def test_bfloat16_rounds_little_more_than_a_direct_convolution() -> None:
    x, weight = drawn(16, 8, 15), drawn(32, 15, 3, 3, seed=1)
    expected = F.conv2d(x.relu().permute(2, 0, 1), weight, padding=1).permute(1, 2, 0)
    values = Convolution3x3(weight, torch.zeros(32), torch.bfloat16)(rows_of(x), winograd.spread)
    found = Rows.new(16, 8, 32, torch.zeros(18 * 8 * 32))
    winograd.add(*found.writes(), *values)
    assert (found.inside - expected).std() < 0.01 * expected.std()
