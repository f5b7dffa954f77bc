from dataclasses import replace

import pytest
import torch
from random_weights import with_random_weights
from torch import Tensor

from unclip.decoder import Decoder, DecoderConfig
from unclip.unet import Attention, UNet, UNetConfig, timestep_embedding
from unclip.upsampler import Upsampler, UpsamplerConfig

TINY = UNetConfig(
    image_size=8,
    width=32,
    multiples=(1, 2),
    n_blocks=1,
    attention=(1,),
    head_width=16,
    context_width=12,
    dropout=0.0,
)


def tiny(config: UNetConfig = TINY) -> UNet:
    return with_random_weights(UNet(config))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def millions(model: torch.nn.Module) -> int:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)


def test_the_papers_networks_have_the_published_sizes() -> None:
    with torch.device("meta"):
        assert millions(Decoder(DecoderConfig())) == 2253
        plain = UpsamplerConfig(scale_shift=False)
        assert millions(Upsampler(plain)) == 692
        second = replace(
            plain, image_size=1024, input_size=256, crop=256, width=192, n_blocks=2, multiples=(1, 1, 2, 2, 4, 4)
        )
        assert millions(Upsampler(second)) == 267


def test_a_timestep_becomes_cosines_before_sines() -> None:
    told = timestep_embedding(torch.tensor([0, 1, 999]), 8)
    assert torch.equal(told[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    frequencies = 10_000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(
        told[2], torch.cat([(999 * frequencies).cos(), (999 * frequencies).sin()]), atol=1e-4, rtol=0
    )


def test_attention_is_one_softmax_over_the_context_and_the_picture() -> None:
    attention = with_random_weights(Attention(32, 16, 12))
    x, context = normal(2, 32, 3, 3), normal(2, 5, 12, seed=1)
    mask = torch.tensor([[True] * 5, [True, True, False, False, True]])
    h = attention.norm(x).flatten(2).transpose(1, 2)
    assert attention.context_kv is not None
    expected = torch.empty(2, 9, 32)
    for row in range(2):
        seen = context[row, mask[row]]
        q, k, v = attention.qkv(h[row]).chunk(3, dim=1)
        context_k, context_v = attention.context_kv(seen).chunk(2, dim=1)
        for head in range(2):
            at = slice(16 * head, 16 * head + 16)
            keys, values = torch.cat([context_k, k])[:, at], torch.cat([context_v, v])[:, at]
            expected[row, :, at] = (q[:, at] @ keys.T / 4).softmax(dim=1) @ values
    expected = x + attention.out(expected).transpose(1, 2).view_as(x)
    torch.testing.assert_close(attention(x, context, mask), expected)


def test_everything_that_it_is_told_matters_and_padding_does_not() -> None:
    unet = tiny()
    x, timesteps, context = normal(2, 3, 8, 8), torch.tensor([3, 700]), normal(2, 4, 12, seed=1)
    embedding, mask = normal(2, 128, seed=2), torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    out = unet(x, timesteps, embedding, context, mask)
    assert out.shape == (2, 6, 8, 8)
    padded = context.clone()
    padded[1, 2:] = 9.0
    torch.testing.assert_close(unet(x, timesteps, embedding, padded, mask), out)
    for changed in (
        unet(x + 0.1, timesteps, embedding, context, mask),
        unet(x, timesteps + 1, embedding, context, mask),
        unet(x, timesteps, embedding + 0.1, context, mask),
        unet(x, timesteps, embedding, context + 0.1, mask),
        unet(x, timesteps, embedding, context),
    ):
        assert (changed - out)[1].abs().max() > 1e-3
    torch.testing.assert_close(
        unet(x[1:], timesteps[1:], embedding[1:], context[1:, :2]), out[1:], atol=1e-5, rtol=1e-4
    )


def test_it_begins_by_predicting_nothing() -> None:
    torch.manual_seed(0)
    assert not UNet(TINY)(normal(1, 3, 8, 8), torch.tensor([5]), context=normal(1, 2, 12)).any()


@pytest.mark.parametrize("scale_shift", [True, False])
def test_layers_computed_again_give_the_same_gradients(scale_shift: bool) -> None:
    gradients = []
    for again in (False, True):
        unet = tiny(replace(TINY, scale_shift=scale_shift)).requires_grad_()
        unet.activation_checkpointing = again
        unet(normal(1, 3, 8, 8), torch.tensor([5]), context=normal(1, 2, 12)).square().sum().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert first is not None
        torch.testing.assert_close(second, first)


def test_bfloat16_weights_give_about_the_same() -> None:
    x, timesteps, context = normal(1, 3, 8, 8), torch.tensor([400]), normal(1, 2, 12)
    exact = tiny()(x, timesteps, context=context)
    rounded = tiny().bfloat16()(x, timesteps, context=context.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).square().mean() / exact.square().mean()) < 0.01


def test_any_size_that_halves_is_taken_and_others_are_refused() -> None:
    unet = tiny()
    assert unet(normal(1, 3, 6, 10), torch.tensor([5]), context=normal(1, 2, 12)).shape == (1, 6, 6, 10)
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\), H and W multiples of 2"):
        unet(normal(1, 3, 7, 8), torch.tensor([5]))


@pytest.mark.parametrize(
    "wrong",
    [{"width": 40}, {"multiples": ()}, {"attention": (1, 0)}, {"head_width": 24}, {"image_size": 7}, {"dropout": 1.0}],
)
def test_impossible_sizes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "head_width" not in wrong else "multiples of 24"):
        replace(TINY, **wrong)  # type: ignore[arg-type]
