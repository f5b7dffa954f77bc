import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dvae import DVAE, DVAEConfig
from dvae.images import map_pixels, unmap_pixels

SMALL = DVAEConfig(n_hid=8, n_init=4, n_groups=3, n_blocks=2, vocab_size=32, image_size=16)


def small(seed: int = 0, config: DVAEConfig = SMALL) -> DVAE:
    return DVAE(config, generator=torch.Generator().manual_seed(seed)).eval()


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def test_the_default_configuration_has_the_published_parameters() -> None:
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    assert sum(weight.numel() for weight in dvae.encoder.parameters()) == 53_786_240
    assert sum(weight.numel() for weight in dvae.decoder.parameters()) == 43_829_766
    assert (len(dvae.encoder.state_dict()), len(dvae.decoder.state_dict())) == (74, 76)
    assert (dvae.config.downsampling, dvae.config.grid, dvae.config.n_layers) == (8, 32, 8)


def test_the_published_shapes_have_their_published_names() -> None:
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    encoder, decoder = dvae.encoder.state_dict(), dvae.decoder.state_dict()
    assert encoder["blocks.group_4.block_1.res_path.conv_1.weight"].shape == (512, 1024, 3, 3)
    assert encoder["blocks.group_4.block_1.res_path.conv_4.weight"].shape == (2048, 512, 1, 1)
    assert encoder["blocks.output.conv.weight"].shape == (8192, 2048, 1, 1)
    assert decoder["blocks.input.weight"].shape == (128, 8192, 1, 1)
    assert decoder["blocks.group_1.block_1.id_path.weight"].shape == (2048, 128, 1, 1)
    assert decoder["blocks.group_1.block_1.res_path.conv_4.weight"].shape == (2048, 512, 3, 3)
    assert decoder["blocks.output.conv.weight"].shape == (6, 256, 1, 1)
    assert sorted(name for name in encoder if "id_path.weight" in name) == [
        f"blocks.group_{g}.block_1.id_path.weight" for g in (2, 3, 4)
    ]


def test_the_residual_gain_is_one_over_the_squared_depth() -> None:
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    gains = {module.post_gain for module in dvae.modules() if hasattr(module, "post_gain")}
    assert gains == {1 / 64}


def test_weights_start_with_a_variance_of_one_over_the_fan_in_and_no_bias() -> None:
    dvae = small(config=DVAEConfig(n_hid=64, n_init=64, n_groups=2, n_blocks=1, vocab_size=256, image_size=16))
    for name, weight in dvae.named_parameters():
        if name.endswith("bias"):
            assert weight.abs().max() == 0
        elif weight.numel() > 5000:
            assert weight.std().item() == pytest.approx(weight[0].numel() ** -0.5, rel=0.05)


def test_the_generator_alone_decides_the_weights() -> None:
    before = torch.get_rng_state()
    first, second, other = small(3), small(3), small(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.encoder.blocks.input.weight, other.encoder.blocks.input.weight)


@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_pictures_of_any_multiple_of_the_downsampling_become_tokens_and_pictures(n_groups: int) -> None:
    dvae = small(config=dataclasses.replace(SMALL, n_groups=n_groups, n_blocks=1))
    f = dvae.config.downsampling
    images = pictures(2, 3, 3 * f, 2 * f)
    before = images.clone()
    tokens = dvae.encode(images)
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (2, 3, 2))
    assert 0 <= tokens.min() <= tokens.max() < 32
    decoded = dvae.decode(tokens)
    assert (decoded.dtype, decoded.shape) == (torch.float32, images.shape)
    assert 0 <= decoded.min() <= decoded.max() <= 1
    assert not decoded.requires_grad
    assert torch.equal(images, before)


def test_tokens_are_the_most_likely_ones_of_mapped_pixels() -> None:
    dvae, images = small(), pictures(2, 3, 16, 16)
    assert torch.equal(dvae.encode(images), dvae.encoder(map_pixels(images)).argmax(dim=1))


def test_looking_tokens_up_equals_decoding_one_hot_probabilities() -> None:
    dvae = small()
    tokens = torch.randint(32, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stats = dvae.decoder(F.one_hot(tokens, 32).permute(0, 3, 1, 2).float())
    assert torch.allclose(dvae.decoder.from_tokens(tokens), stats, atol=1e-6)
    assert torch.allclose(dvae.decode(tokens), unmap_pixels(stats[:, :3].sigmoid()), atol=1e-6)


@pytest.mark.parametrize("n_groups", [1, 2, 3, 4])
@pytest.mark.parametrize("n_blocks", [1, 2])
def test_the_decoder_computes_what_its_plain_graph_computes_with_the_same_gradients(
    n_groups: int, n_blocks: int
) -> None:
    decoder = small(config=dataclasses.replace(SMALL, n_groups=n_groups, n_blocks=n_blocks)).decoder
    p = torch.rand(2, 32, 3, 2, generator=torch.Generator().manual_seed(0)).softmax(dim=1).requires_grad_()
    weights = [p, *decoder.parameters()]
    plain, found = decoder.blocks(p), decoder(p)
    assert torch.allclose(found, plain, atol=1e-5 * plain.detach().std().item())
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    for expected, gradient in zip(
        torch.autograd.grad(plain, weights, upstream), torch.autograd.grad(found, weights, upstream), strict=True
    ):
        assert torch.allclose(gradient, expected, atol=1e-5 * float(expected.abs().max()))


def test_the_order_of_the_pictures_in_memory_changes_no_token() -> None:
    dvae, images = small(), pictures(2, 3, 16, 16)
    assert torch.equal(
        dvae.encode(images.contiguous(memory_format=torch.channels_last)),
        dvae.encoder(map_pixels(images)).argmax(dim=1),
    )


def test_the_convolutions_beside_the_relaxation_compute_in_float32_under_autocast() -> None:
    dvae = small()
    seen = {}
    for name in (
        "encoder.blocks.input",
        "encoder.blocks.output.conv",
        "decoder.blocks.input",
        "decoder.blocks.output.conv",
    ):
        dvae.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: seen.update({name: y.dtype}))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = dvae.encoder(map_pixels(pictures(1, 3, 16, 16)))
        stats = dvae.decoder(logits.softmax(dim=1))
    assert seen == {
        "encoder.blocks.input": torch.bfloat16,
        "encoder.blocks.output.conv": torch.float32,
        "decoder.blocks.input": torch.float32,
        "decoder.blocks.output.conv": torch.bfloat16,
    }
    assert (logits.dtype, stats.dtype) == (torch.float32, torch.float32)


def test_weights_in_bfloat16_work_too() -> None:
    dvae = small().bfloat16()
    assert dvae.encoder(map_pixels(pictures(1, 3, 16, 16))).dtype == torch.float32
    assert dvae.decode(dvae.encode(pictures(1, 3, 16, 16))).dtype == torch.float32


def test_a_saved_model_computes_the_same(tmp_path: Path) -> None:
    dvae = small()
    dvae.save(tmp_path / "dvae", metadata={"step": 1})
    loaded = DVAE.load(tmp_path / "dvae")
    images = pictures(1, 3, 16, 16)
    assert loaded.config == dvae.config
    assert not loaded.training
    assert torch.equal(loaded.encode(images), dvae.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), dvae.decode(dvae.encode(images)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 16, 16), r"shape \(3, 16, 16\), expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 16, 16, 3), r"expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "torch.uint8 pictures, expected floats"),
        (torch.zeros(1, 3, 16, 18), "16×18 pixels, expected multiples of 4"),
        (torch.zeros(1, 3, 0, 16), "0×16 pixels, expected multiples of 4"),
    ],
)
def test_encode_says_what_it_expected(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().encode(images)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.int64), r"shape \(4, 4\), expected int64 of shape \(batch, rows, columns\)"),
        (torch.zeros(1, 4, 4), "torch.float32 tokens"),
        (torch.full((1, 4, 4), 32), r"tokens from 32 to 32, expected 0 … 31"),
        (torch.full((1, 4, 4), -1), r"tokens from -1 to -1, expected 0 … 31"),
        (torch.zeros(1, 0, 4, dtype=torch.int64), r"shape \(1, 0, 4\), expected int64"),
    ],
)
def test_decode_says_what_it_expected(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().decode(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_hid": 10}, r"n_hid \(10\) must be a multiple of 4"),
        ({"n_blocks": 0}, r"n_blocks \(0\) must be a whole number of at least 1"),
        ({"vocab_size": 1}, r"vocab_size \(1\) must be a whole number of at least 2"),
        ({"n_init": 1.5}, r"n_init \(1.5\) must be a whole number"),
        ({"image_size": 18}, r"image_size \(18\) must be a multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_kernels_of_1_let_a_token_tell_of_its_own_pixels_and_three_around_them() -> None:
    torch.manual_seed(0)
    dvae = DVAE(dataclasses.replace(SMALL, encoder_kernel=1, image_size=32))
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    dvae.encoder(images)[0, :, 3, 4].sum().backward()
    assert images.grad is not None
    rows, columns = images.grad[0].abs().sum(dim=0).nonzero(as_tuple=True)
    assert 4 * 3 - 3 <= int(rows.min()) <= int(rows.max()) <= 4 * 3 + 3 + 3
    assert 4 * 4 - 3 <= int(columns.min()) <= int(columns.max()) <= 4 * 4 + 3 + 3


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder_kernel \(2\) must be odd"):
        dataclasses.replace(SMALL, encoder_kernel=2)
