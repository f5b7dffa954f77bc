"""Imported VQGANs beside the packages that wrote them, with random weights; `make references` installs those."""

from pathlib import Path
from typing import Any

import pytest
import torch
from references import reference
from torch import Tensor, nn
from vqgan_files import (
    detoker,
    flax,
    lightning,
    plain_decode,
    random_images,
    random_vqgan,
    taming_state,
    with_random_weights,
)

from dalle.importers.vqgan import import_vqgan
from dvae.vqgan import VQGAN, VQGANConfig

KINDS: dict[str, dict[str, Any]] = {
    "f4": {"ch_mult": (1, 2, 2), "attn_resolutions": (8,)},
    "two levels of attention": {"ch_mult": (1, 1, 2), "attn_resolutions": (16, 8), "num_res_blocks": 1},
    "no attention": {"ch_mult": (2, 1), "attn_resolutions": ()},
    "gumbel": {"ch_mult": (1, 2, 4), "attn_resolutions": (8,)},
}


class Taming(nn.Module):
    """The parts of taming's VQModel and GumbelVQ, which themselves need PyTorch Lightning."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        parts = reference("taming.modules.diffusionmodules.model")
        quantize = reference("taming.modules.vqvae.quantize")
        is_gumbel = kind == "gumbel"
        sizes = {"ch": 32, "num_res_blocks": 2, "z_channels": 24, "resolution": 32, "in_channels": 3, "out_ch": 3}
        sizes |= {"double_z": False, "dropout": 0.0} | KINDS[kind]
        code_width = 24 if is_gumbel else 12
        self.encoder, self.decoder = parts.Encoder(**sizes), parts.Decoder(**sizes)
        self.quantize = (
            quantize.GumbelQuantize(24, code_width, n_embed=40, kl_weight=1e-8, temp_init=1.0)
            if is_gumbel
            else quantize.VectorQuantizer2(40, code_width, beta=0.25)
        )
        self.quant_conv = nn.Conv2d(24, code_width, 1)
        self.post_quant_conv = nn.Conv2d(code_width, 24, 1)
        self.is_gumbel = is_gumbel

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The codes of pictures in [-1, 1]; of the Gumbel quantiser without its noise."""
        z = self.quant_conv(self.encoder(images))
        if self.is_gumbel:
            chosen: Tensor = self.quantize.proj(z).argmax(dim=1)
            return chosen
        indices: Tensor = self.quantize(z)[2][2]
        return indices.view(len(images), *z.shape[2:])

    @torch.no_grad()
    def pictures(self, tokens: Tensor) -> Tensor:
        """The pixels of codes in [-1, 1]."""
        if self.is_gumbel:
            z = self.quantize.get_codebook_entry(tokens.flatten(), (*tokens.shape, 0))
        else:
            z = self.quantize.get_codebook_entry(tokens.flatten(), (*tokens.shape, 12))
        pixels: Tensor = self.decoder(self.post_quant_conv(z))
        return pixels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_tamings_vqgans_give_the_same_tokens_and_pictures(
    tmp_path: Path, kind: str, size: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = with_random_weights(Taming(kind))
    ours = import_vqgan(lightning(theirs.state_dict(), tmp_path / "last.ckpt"), image_size=32).vqgan
    images = random_images(3, *size)
    tokens = ours.encode(images)
    assert torch.equal(tokens, theirs.tokens(images * 2 - 1))
    assert len(tokens.unique()) > 10
    expected = (theirs.pictures(tokens) / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.decode(tokens), expected, atol=1e-5, rtol=0)


MIN_DALLE = VQGANConfig(pixels="unit")


@pytest.fixture(scope="module")
def published_size() -> VQGAN:
    """A VQGAN of DALL·E mini's size, the only one that min-dalle's code has."""
    reference("min_dalle.models.vqgan_detokenizer")  # or the test is skipped
    return random_vqgan(MIN_DALLE)


TOKENS = torch.randint(0, 16384, (1, 16, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exact_pixels(published_size: VQGAN) -> Tensor:
    """What `TOKENS` stand for, in float64."""
    state = {name: value.double() for name, value in taming_state(published_size).items()}
    return plain_decode(state, TOKENS).clamp(0, 1)


@pytest.mark.parametrize("kind", ["detoker", "flax"])
def test_min_dalles_decoder_gives_the_same_pictures(
    tmp_path: Path, published_size: VQGAN, exact_pixels: Tensor, kind: str
) -> None:
    state = taming_state(published_size)
    theirs = reference("min_dalle.models.vqgan_detokenizer").VQGanDetokenizer().eval()
    names = detoker(state, tmp_path / "detoker.pt")
    theirs.load_state_dict(torch.load(names, weights_only=True))
    for module in theirs.modules():
        if isinstance(module, nn.GroupNorm):
            assert module.eps == 1e-5  # where taming and vqgan-jax have 1e-6
            module.eps = 1e-6
    file = names if kind == "detoker" else flax(state, tmp_path / "flax_model.msgpack")
    ours = import_vqgan(file).vqgan
    assert ours.config.has_encoder == (kind == "flax")
    with torch.no_grad():
        expected = theirs(False, TOKENS.flatten(1)).permute(2, 0, 1)[None] / 255
    # in 17 blocks of 128 to 512 channels, rounding alone is most of 1e-5: each is that close to what is exact
    for pixels in (ours.decode(TOKENS), expected):
        torch.testing.assert_close(pixels.double(), exact_pixels, atol=1e-5, rtol=0)
