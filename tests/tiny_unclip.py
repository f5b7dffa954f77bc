"""A tiny bundle of DALL·E 2 with random weights, beside the CLIP of another bundle."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from random_weights import with_random_weights

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


def write_unclip(path: Path, clip: Path, *, clip_hash: str | None = None, side: int = 8, **changes: Any) -> Path:
    """Write a bundle of DALL·E 2 alone, of pictures of `side` pixels and of twice that.

    Changes are of the prior's and the decoder's configurations.
    """
    shutil.copytree(clip, path / "clip")
    metadata = {"clip_hash": clip_hash or directory_hash(path / "clip")} if clip_hash != "" else {}
    with_random_weights(Prior(replace(PRIOR, **changes))).save(path / "prior", metadata)
    with_random_weights(Decoder(replace(DECODER, image_size=side, **changes))).save(path / "decoder", metadata)
    upsampler = replace(UPSAMPLER, image_size=2 * side, input_size=side, crop=side)
    with_random_weights(Upsampler(upsampler)).save(path / f"upsampler-{2 * side}")
    return path
