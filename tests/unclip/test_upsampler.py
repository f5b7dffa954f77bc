import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import with_random_weights
from torch import Tensor

from dvae.images import to_image, to_tensor
from unclip.degradation import crop_pair, small_picture
from unclip.sampling import Noise
from unclip.upsampler import Upsampler, UpsamplerConfig, upsample, upsampler_loss

TINY = UpsamplerConfig(
    image_size=16, input_size=8, crop=8, width=32, multiples=(1, 2), n_blocks=1, dropout=0.0, prediction="v"
)


def tiny(config: UpsamplerConfig = TINY) -> Upsampler:
    torch.manual_seed(0)
    return with_random_weights(Upsampler(config))


def images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def picture(side: int = 48) -> Image.Image:
    y, x = np.mgrid[:side, :side] / side
    return Image.fromarray((np.stack([x, y, (x > y) * 0.8], axis=2) * 255).astype(np.uint8))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_small_picture_becomes_a_large_one_of_any_size() -> None:
    upsampler = tiny()
    large = upsample(upsampler, images(2, 8), Noise.of(0, "", range(2)), steps=3)
    assert large.shape == (2, 3, 16, 16)
    assert 0 <= large.min() < large.max() <= 1
    torch.testing.assert_close(
        upsample(upsampler, images(2, 8)[1:], Noise.of(0, "", [1]), steps=3)[0], large[1], atol=1e-4, rtol=0
    )
    assert upsample(upsampler, images(1, 12), Noise.of(0, "", [0]), steps=1).shape == (1, 3, 24, 24)
    assert not torch.allclose(upsample(upsampler, images(2, 8, seed=1), Noise.of(0, "", range(2)), steps=3), large)
    with pytest.raises(ValueError, match="1 rows of noise for 2 pictures"):
        upsample(upsampler, images(2, 8), Noise.of(0, "", [0]))


def test_what_is_read_is_the_8_bit_picture_enlarged_bilinearly() -> None:
    small = images(1, 8) * 2 - 1
    read = tiny().enlarged(small)
    from_8_bits = to_tensor(to_image((small[0] + 1) / 2)) * 2 - 1
    expected = torch.nn.functional.interpolate(from_8_bits[None], (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(read, expected, atol=1e-6, rtol=0)


def test_the_loss_is_a_function_of_its_seed_and_reads_the_small_picture() -> None:
    upsampler = tiny()
    loss, metrics = upsampler_loss(upsampler, images(4, 8), images(4, 4, seed=1), seed=0)
    assert torch.equal(loss, upsampler_loss(upsampler, images(4, 8), images(4, 4, seed=1), seed=0)[0])
    assert loss != upsampler_loss(upsampler, images(4, 8), images(4, 4, seed=2), seed=0)[0]
    assert loss != upsampler_loss(upsampler, images(4, 8), images(4, 4, seed=1), seed=1)[0]
    assert set(metrics) == {"mse", "t"}


def test_an_overlapping_crop_gives_nearly_what_the_whole_picture_gives() -> None:
    # not the same: normalisation sees the crop
    upsampler = tiny(replace(TINY, image_size=128, input_size=64, n_blocks=1))
    noise, small = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)), images(1, 64) * 2 - 1
    timesteps, at = torch.tensor([300]), slice(16, 80)
    whole = upsampler(noise, timesteps, upsampler.enlarged(small))
    crop = upsampler(noise[..., at, at], timesteps, upsampler.enlarged(small)[..., at, at])
    inner = slice(24, 40)
    error = (crop[..., inner, inner] - whole[..., at, at][..., inner, inner]).square().mean()
    assert float(error / whole.square().mean()) < 0.05


def test_the_last_step_may_be_another_networks() -> None:
    upsampler = tiny(replace(TINY, has_last=True))
    assert upsampler.last is not None
    noise, small = Noise.of(0, "", [0]), images(1, 8)
    one, two = (upsample(upsampler, small, noise, steps=steps) for steps in (1, 2))
    with torch.no_grad():
        for weight in upsampler.unet.parameters():
            weight.zero_()
    assert torch.equal(upsample(upsampler, small, noise, steps=1), one)
    assert not torch.allclose(upsample(upsampler, small, noise, steps=2), two)


def test_both_crops_show_the_same() -> None:
    large = picture()
    small = small_picture(large, 24, "none", rng())
    for seed in range(20):
        cut, cut_small = crop_pair(large, small, 16, rng(seed))
        assert cut.shape == (3, 16, 16)
        assert cut_small.shape == (3, 8, 8)
        torch.testing.assert_close(torch.nn.functional.avg_pool2d(cut, 2), cut_small, atol=1.01 / 255, rtol=0)
    centre, _ = crop_pair(large, small, 16, None)
    assert torch.equal(centre, to_tensor(large)[:, 16:32, 16:32])
    whole, _ = crop_pair(large, small, 48, rng())
    assert torch.equal(whole, to_tensor(large))


def test_half_of_the_small_pictures_are_blurred_by_a_gaussian() -> None:
    plain = small_picture(picture(), 24, "none", rng())
    drawn = [small_picture(picture(), 24, "blur", rng(seed)) for seed in range(60)]
    blurred = [each for each in drawn if each.tobytes() != plain.tobytes()]
    assert 20 <= len(blurred) <= 40
    assert len({each.tobytes() for each in blurred}) == 1
    weights = torch.exp(-torch.arange(-1, 2).float().square() / (2 * 0.36))
    kernel = (torch.outer(weights, weights) / weights.sum() ** 2).expand(3, 1, 3, 3)
    padded = torch.nn.functional.pad(to_tensor(plain)[None], (1, 1, 1, 1), mode="replicate")
    expected = torch.nn.functional.conv2d(padded, kernel, groups=3)[0]
    torch.testing.assert_close(to_tensor(blurred[0]), expected, atol=1.01 / 255, rtol=0)


def test_bsr_is_a_function_of_its_generator_and_keeps_what_is_shown() -> None:
    plain = to_tensor(small_picture(picture(), 24, "none", rng()))
    drawn = [small_picture(picture(), 24, "bsr", rng(seed)) for seed in range(12)]
    assert drawn[0].tobytes() == small_picture(picture(), 24, "bsr", rng(0)).tobytes()
    assert len({each.tobytes() for each in drawn}) == 12
    errors = [float((to_tensor(each) - plain).square().mean().sqrt()) for each in drawn]
    assert all(0.002 < error < 0.12 for error in errors)
    file = io.BytesIO()
    drawn[0].save(file, "PNG")
    assert drawn[0].size == (24, 24)


def test_a_saved_upsampler_is_the_same(tmp_path: Path) -> None:
    upsampler = tiny(replace(TINY, has_last=True, enlarging="bicubic"))
    upsampler.save(tmp_path / "upsampler-16")
    loaded = Upsampler.load(tmp_path / "upsampler-16")
    assert loaded.config == upsampler.config
    noise = Noise.of(0, "", [0])
    torch.testing.assert_close(
        upsample(loaded, images(1, 8), noise, steps=2, sampler="ddpm"),
        upsample(upsampler, images(1, 8), noise, steps=2, sampler="ddpm"),
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention": (1,)}, "no attention"),
        ({"middle_attention": True}, "no attention"),
        ({"in_channels": 3}, "6 channels"),
        ({"input_size": 5}, "multiple of input_size"),
        ({"crop": 20}, "crop"),
        ({"degradation": "rain"}, "none, blur, bsr"),
    ],
)
def test_impossible_upsamplers_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)  # type: ignore[arg-type]
