import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dvae.vqgan
from dvae import DVAE
from dvae.codec import load_codec
from dvae.fast.model import optimised, pictures_at_once
from dvae.vqgan import VQGAN, VQGANConfig

TINY = VQGANConfig(
    width=32, multiples=(1, 2), n_blocks=1, attention=(1,), z_channels=16, code_width=8, vocab_size=50, image_size=16
)


def tiny(config: VQGANConfig = TINY) -> VQGAN:
    torch.manual_seed(0)
    vqgan = VQGAN(config).eval().requires_grad_(False)
    if vqgan.quant_conv is not None:
        vqgan.quant_conv.weight.mul_(5)
    return vqgan


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantiser", ["nearest", "gumbel"])
def test_a_picture_has_the_same_tokens_alone_and_among_64(quantiser: str) -> None:
    vqgan = tiny(replace(TINY, quantiser=quantiser))
    batch = images(64, 3, 16, 16)
    tokens = vqgan.encode(batch)
    assert tokens.shape == (64, 8, 8)
    assert len(tokens.unique()) > 10
    assert torch.equal(torch.cat([vqgan.encode(image[None]) for image in batch]), tokens)
    torch.testing.assert_close(vqgan.decode(tokens[:1]), vqgan.decode(tokens)[:1], atol=1e-5, rtol=0)


def test_codes_are_searched_in_bands_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    vqgan = tiny()
    expected = vqgan.encode(images(3, 3, 16, 16))
    for at_once in (1, 50, 130):
        monkeypatch.setattr(dvae.vqgan, "SCORES_AT_ONCE", at_once)
        assert torch.equal(vqgan.encode(images(3, 3, 16, 16)), expected)


def test_of_equal_codes_the_first_is_taken() -> None:
    vqgan = tiny()
    vqgan.quantize.embedding.weight[30:40] = vqgan.quantize.embedding.weight[:10]
    tokens = vqgan.encode(images(8, 3, 16, 16))
    assert (tokens < 10).any()
    assert not ((tokens >= 30) & (tokens < 40)).any()


@pytest.mark.parametrize("size", [(4, 2), (16, 40)])
def test_any_multiple_of_the_downsampling_is_taken(size: tuple[int, int]) -> None:
    vqgan = tiny()
    tokens = vqgan.encode(images(1, 3, *size))
    assert tokens.shape == (1, size[0] // 2, size[1] // 2)
    pictures = vqgan.decode(tokens)
    assert pictures.shape == (1, 3, *size)
    assert pictures.dtype == torch.float32
    assert 0 <= pictures.min() < pictures.max() <= 1


def test_wrong_pictures_and_tokens_are_refused_in_words() -> None:
    vqgan = tiny()
    with pytest.raises(ValueError, match="pictures of 15×16 pixels, expected multiples of 2"):
        vqgan.encode(images(1, 3, 15, 16))
    with pytest.raises(ValueError, match="tokens from 0 to 50, expected 0 … 49"):
        vqgan.decode(torch.tensor([[[0, 50]]]))


def test_inputs_are_not_changed_and_no_gradients_are_kept() -> None:
    vqgan = VQGAN(TINY)
    given = images(1, 3, 16, 16)
    tokens = vqgan.encode(given)
    assert torch.equal(given, images(1, 3, 16, 16))
    kept = tokens.clone()
    assert not vqgan.decode(tokens).requires_grad
    assert torch.equal(tokens, kept)


def test_a_codec_is_loaded_by_its_kind(tmp_path: Path, bundle: Path) -> None:
    vqgan = tiny()
    vqgan.save(tmp_path / "vqgan", metadata={"source": "a test"})
    loaded = load_codec(tmp_path / "vqgan")
    assert isinstance(loaded, VQGAN)
    assert loaded.config == TINY
    assert torch.equal(loaded.codebook, vqgan.codebook)
    assert torch.equal(loaded.encode(images(2, 3, 16, 16)), vqgan.encode(images(2, 3, 16, 16)))
    assert isinstance(load_codec(bundle / "dvae"), DVAE)
    with pytest.raises(ValueError, match="holds a clip, not a dvae"):
        load_codec(bundle / "clip")
    with pytest.raises(FileNotFoundError, match=r"no dvae in .* or `dalle import-vqgan` for published weights"):
        load_codec(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds a vqgan, not a dvae"):
        DVAE.load(tmp_path / "vqgan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 48}, r"width \(48\) must be a multiple of 32"),
        ({"width": 0}, r"width \(0\) must be a whole number of at least 1"),
        ({"multiples": []}, "multiples must be 1 to 16 numbers"),
        ({"multiples": [1] * 17}, "multiples must be 1 to 16 numbers"),
        ({"multiples": [1, "x"]}, "multiples is 'x', of type str; expected a whole number"),
        ({"multiples": [1, 1 << 20]}, "a level has 33554432 channels: expected at most 65536"),
        ({"attention": [2]}, r"attention \(\(2,\)\) must be rising numbers of levels"),
        ({"quantiser": "best"}, r"quantiser \('best'\) must be nearest or gumbel"),
        ({"pixels": "percent"}, r"pixels \('percent'\) must be signed or unit"),
        ({"has_encoder": 1}, r"has_encoder \(1\) must be true or false"),
        ({"image_size": 15}, r"image_size \(15\) must be a multiple of 2"),
        ({"vocab_size": 1 << 30}, "vocab_size is above"),
        ({"n_blocks": 3}, "do not fit its configuration"),
        ({"n_blocks": 1 << 20}, "says n_blocks 1,048,576, but"),
    ],
)
def test_impossible_configurations_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    tiny().save(tmp_path / "vqgan")
    file = tmp_path / "vqgan" / "config.json"
    content = json.loads(file.read_text())
    content["config"] |= changes
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_codec(tmp_path / "vqgan")


def test_a_vqgan_is_used_as_it_is_where_a_dvae_would_be_made_faster() -> None:
    vqgan = tiny()
    copy = optimised(vqgan, dtype=torch.bfloat16)
    tokens = vqgan.encode(images(1, 3, 16, 16))
    assert torch.equal(copy.encode(images(1, 3, 16, 16)), tokens)
    assert torch.equal(copy.decode(tokens), vqgan.decode(tokens))


@pytest.mark.slow
def test_the_counted_memory_of_a_picture_holds_for_both_halves(
    rise_of_memory: Callable[[Callable[[], object]], int],
) -> None:
    config = replace(TINY, multiples=(1, 1, 2), attention=(2,), image_size=256)
    vqgan, counted = tiny(config), config.bytes_per_picture
    assert pictures_at_once(config, 10 * counted) == 10
    assert VQGANConfig().bytes_per_picture < 300 << 20
    tokens = torch.zeros(4, 64, 64, dtype=torch.int64)
    for call in (lambda: vqgan.decode(tokens), lambda: vqgan.encode(images(4, 3, 256, 256))):
        rise = rise_of_memory(call)
        assert rise < 4 * counted
