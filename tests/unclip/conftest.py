"""A bundle of DALL·E 2's parts, tiny and random, beside the CLIP of the other tests."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_weights import with_random_weights
from tiny_unclip import write_unclip

from dalle.unclip.pipeline import UnCLIP
from dvae.images import to_image
from unclip import Decoder


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
