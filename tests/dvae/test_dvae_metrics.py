import math

import pytest
import torch

from dvae.metrics import bits_per_pixel, code_usage, ms_ssim, psnr, ssim


def pictures(size: int, n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_every_picture_gets_its_own_psnr() -> None:
    images = torch.full((3, 3, 16, 16), 0.5)
    others = images + torch.tensor([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    values = psnr(images, others)
    assert values[:2].tolist() == [pytest.approx(20.0, abs=1e-3), pytest.approx(40.0, abs=1e-3)]
    assert values[2] == math.inf


@pytest.mark.parametrize("n", [1, 3])
def test_similarity_is_1_for_equal_pictures_and_falls_with_noise(n: int) -> None:
    images = pictures(64, n)
    noisy = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for measure in (ssim, ms_ssim):
        equal, less = measure(images, images), measure(images, noisy)
        assert tuple(equal.shape) == (n,)
        assert torch.allclose(equal, torch.ones(n))
        assert (less < 0.99).all()


@pytest.mark.parametrize("side", [11, 21, 22, 43, 44, 64, 98, 99, 175, 176])
def test_ms_ssim_uses_the_scales_that_fit(side: int) -> None:
    images = pictures(side, 1)
    value = ms_ssim(images, (images + 0.1).clamp(0, 1))
    assert value is not None
    assert 0 < value.item() < 1


def test_ms_ssim_of_too_small_pictures_is_none() -> None:
    assert ms_ssim(pictures(10), pictures(10)) is None
    assert ssim(pictures(8), pictures(8)).tolist() == [pytest.approx(1.0)] * 2


def test_pairs_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected two equal shapes \(batch, 3, height, width\)"):
        psnr(pictures(16), pictures(8))


def test_code_usage_counts_different_tokens_and_their_evenness() -> None:
    even = code_usage(torch.arange(8).repeat(5).reshape(2, 4, 5), 16)
    assert (even.used, even.perplexity, even.entropy) == (8, pytest.approx(8.0), pytest.approx(math.log(8)))
    one = code_usage(torch.full((3, 3), 7), 16)
    assert (one.used, one.perplexity, one.entropy) == (1, 1.0, 0.0)
    uneven = code_usage(torch.tensor([0, 0, 0, 1]), 2)
    assert uneven.used == 2
    assert 1 < uneven.perplexity < 2


def test_code_usage_refuses_foreign_tokens_and_none() -> None:
    with pytest.raises(ValueError, match=r"tokens from 0 to 16, expected 0 … 15"):
        code_usage(torch.tensor([0, 16]), 16)
    with pytest.raises(ValueError, match="no tokens"):
        code_usage(torch.tensor([], dtype=torch.int64), 16)


def test_the_paper_spends_a_fifth_of_a_bit_on_a_pixel() -> None:
    assert bits_per_pixel(32 * 32, 8192, 256 * 256) == pytest.approx(13 / 64)
