"""A bundle of DALL·E 2's parts, tiny and random, beside the CLIP of the other tests."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from random_weights import with_random_weights

from dalle.unclip.pipeline import UnCLIP
from dvae.images import to_image
from storage.models.directory import directory_hash
from unclip import Decoder, Prior, Upsampler
from unclip.decoder import DecoderConfig
from unclip.prior import PriorConfig
from unclip.upsampler import UpsamplerConfig

CLIP_SIZES: dict[str, Any] = {"embed_dim": 8, "text_width": 16, "text_len": 24}
PRIOR = PriorConfig(width=32, n_layers=1, n_heads=2, scale=1.5, **CLIP_SIZES)
DECODER = DecoderConfig(
    image_size=8,
    out_channels=3,
    width=32,
    multiples=(1,),
    n_blocks=1,
    attention=(),
    head_width=32,
    context_width=16,
    dropout=0.0,
    prediction="v",
    scale=1.5,
    **CLIP_SIZES,
)
UPSAMPLER = UpsamplerConfig(
    image_size=16, input_size=8, crop=8, width=32, multiples=(1,), n_blocks=1, dropout=0.0, prediction="v"
)


def write_unclip(path: Path, clip: Path, *, clip_hash: str | None = None, **changes: Any) -> Path:
    """Write a bundle of DALL·E 2 alone; changes are of the prior's and the decoder's configurations."""
    shutil.copytree(clip, path / "clip")
    metadata = {"clip_hash": clip_hash or directory_hash(path / "clip")} if clip_hash != "" else {}
    with_random_weights(Prior(replace(PRIOR, **changes))).save(path / "prior", metadata)
    with_random_weights(Decoder(replace(DECODER, **changes))).save(path / "decoder", metadata)
    with_random_weights(Upsampler(UPSAMPLER)).save(path / "upsampler-16")
    return path


@pytest.fixture(scope="session")
def unclip_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a bundle of DALL·E 2 alone; not to be changed."""
    return write_unclip(tmp_path_factory.mktemp("unclip") / "tiny", bundle / "clip")


@pytest.fixture
def unclip_copy(unclip_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(unclip_bundle, tmp_path / "unclip"))


@pytest.fixture
def editing_bundle(unclip_copy: Path) -> Path:
    """A bundle whose decoder reads known pixels."""
    decoder = Decoder.load(unclip_copy / "decoder")
    with_random_weights(decoder.inpainting()).save(unclip_copy / "decoder", decoder.metadata)
    return unclip_copy


@pytest.fixture
def karlo_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A bundle as an import makes it: embeddings not of unit length, no word of the CLIP."""
    return write_unclip(tmp_path / "karlo", bundle / "clip", clip_hash="", normalised=False)


@pytest.fixture(scope="session")
def unclip(unclip_bundle: Path) -> UnCLIP:
    """The bundle, loaded."""
    return UnCLIP.load(unclip_bundle)


@pytest.fixture(scope="session")
def small_unclip(unclip_bundle: Path) -> UnCLIP:
    """The same without its upsampler."""
    return UnCLIP.load(unclip_bundle, size=8)


@pytest.fixture(scope="session")
def pictures() -> tuple[Image.Image, Image.Image]:
    """Two pictures of noise, wider than high."""
    drawn = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    return to_image(drawn[0]), to_image(drawn[1])
