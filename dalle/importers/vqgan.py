"""Published VQGANs, of taming-transformers, ruDALLE, minDALL-E and DALL·E mini; nothing in their files is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.importers.licence import stated_licence
from dalle.importers.vqgan_names import Style, VQGANWeights, find_vqgan
from dvae.vqgan import VQGAN, Pixels, VQGANConfig
from storage.checkpoints.tensors import open_tensors, sha256, summary
from storage.models.directory import load_weights

IMAGE_SIZE = 256
"""Side in pixels of the pictures of all published ones; the weights do not show it."""
FORMATS: dict[Style, str] = {
    "taming": "as taming-transformers has it",
    "flax": "as vqgan-jax has it",
    "detoker": "min-dalle's decoder alone",
}
PIXELS: dict[Style, Pixels] = {"taming": "signed", "flax": "unit", "detoker": "unit"}
"""How pixels are scaled where the weights are used; they do not show it. DALL·E mini encodes pixels of [0, 1] and
clips what it decodes to them (borisdayma/dalle-mini at f0be4de, tools/dataset and tools/inference)."""
LICENCES: dict[Style, str] = {
    "taming": "not stated in this file: MIT is the code of taming-transformers; see the page that it is from",
    "flax": "not stated in this file: Apache-2.0 on DALL·E mini's pages; see the page that it is from",
    "detoker": "not stated in this file: MIT on min-dalle's page",
}


@dataclass(frozen=True, kw_only=True)
class ImportedVQGAN:
    """A VQGAN, and what is to be said about it."""

    vqgan: VQGAN
    """On the CPU, in evaluation mode, float32."""
    weights: Path
    """The file that was read."""
    sha256: str
    """Of that file."""
    format: str
    """Of that file, in words."""
    pixels_origin: str
    """Where the range of pixels comes from."""
    left: Sequence[str]
    """Names of what was not used."""
    licence: str
    """Of the weights, as far as it is known here."""

    def __str__(self) -> str:
        """Return several lines for people."""
        config = self.vqgan.config
        n_parameters = sum(parameter.numel() for parameter in self.vqgan.parameters())
        name = f"VQGAN f{config.downsampling}" + ("" if config.has_encoder else ", the decoder alone")
        chosen = "by the largest logit" if config.quantiser == "gumbel" else "by the smallest distance"
        pixels = "[-1, 1]" if config.pixels == "signed" else "[0, 1]"
        return "\n".join(
            [
                f"read:     {self.weights}, {self.format}, sha256 {self.sha256[:16]}…",
                f"model:    {name}, {n_parameters:,} parameters, {config.vocab_size:,} codes, chosen {chosen}",
                f"assumed:  pictures of {config.image_size} pixels, so {config.grid}×{config.grid} tokens; pixels in "
                f"{pixels} ({self.pixels_origin})",
                f"left:     {summary(list(self.left), depth=2) or 'nothing'}",
                f"licence:  {self.licence}",
            ]
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """Kept beside the weights."""
        return {
            "source": self.weights.name,
            "source_sha256": self.sha256,
            "source_format": self.format,
            "licence": self.licence,
        }


def import_vqgan(
    source: Path | str, *, prefix: str | None = None, pixels: Pixels | None = None, image_size: int = IMAGE_SIZE
) -> ImportedVQGAN:
    """Read a published VQGAN; its sizes follow from the weights.

    Args:
        source: the file.
        prefix: what the names of its weights begin with, such as "weights.vae.model."; None to find it.
        pixels: the range in which the weights are used; None as their kind of file has it.
        image_size: side in pixels of the pictures it is for, which the weights do not show.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is something else, damaged, names code, or is a VQGAN that is computed in another way.
    """
    path = Path(source)
    tensors = open_tensors(path)
    weights = find_vqgan(tensors, prefix)
    return ImportedVQGAN(
        vqgan=read_vqgan(weights, pixels=pixels, image_size=image_size),
        weights=path,
        sha256=sha256(path),
        format=f"{tensors.format}, {FORMATS[weights.style]}",
        pixels_origin="as given" if pixels else "as all in this format are used here",
        left=tensors.unused(),
        licence=stated_licence(path) or LICENCES[weights.style],
    )


def read_vqgan(weights: VQGANWeights, *, pixels: Pixels | None = None, image_size: int = IMAGE_SIZE) -> VQGAN:
    """Return the VQGAN that weights are of; arguments and errors as `import_vqgan`."""
    path = weights.part.path
    try:
        config = _config(weights, pixels or PIXELS[weights.style], image_size)
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}: it is cut, or of another kind of VQGAN") from error
    except ValueError as error:
        raise ValueError(f"{path} has impossible sizes: {error}; expected a VQGAN") from error
    with torch.device("meta"):
        vqgan = VQGAN(config)
    load_weights(vqgan, _state(vqgan, weights), path)
    return vqgan.eval()


def _config(weights: VQGANWeights, pixels: Pixels, image_size: int) -> VQGANConfig:
    """Return the sizes as the weights show them."""
    n_levels = weights.count("decoder.up.{}.block.0.conv1.weight")
    widths = [weights.shape(f"decoder.up.{i}.block.0.conv1.weight")[0] for i in range(n_levels)]
    has_encoder = "encoder.conv_in.weight" in weights
    finest = "encoder.conv_in.weight" if has_encoder else "decoder.up.0.block.0.conv1.weight"
    width = weights.shape(finest)[0]
    if odd := [other for other in widths if other % width]:
        raise ValueError(f"a level has {odd[0]} channels, which is no multiple of {width}")
    vocab_size, code_width = weights.shape("quantize.embedding.weight")
    return VQGANConfig(
        width=width,
        multiples=tuple(other // width for other in widths),
        n_blocks=weights.count("decoder.up.0.block.{}.conv1.weight") - 1,
        attention=tuple(i for i in range(n_levels) if f"decoder.up.{i}.attn.0.q.weight" in weights),
        z_channels=weights.shape("decoder.conv_in.weight")[1],
        code_width=code_width,
        vocab_size=vocab_size,
        image_size=image_size,
        quantiser="gumbel" if weights.is_gumbel else "nearest",
        pixels=pixels,
        has_encoder=has_encoder,
    )


def _state(vqgan: VQGAN, weights: VQGANWeights) -> dict[str, Tensor]:
    """Return the weights, one read after the other.

    Raises:
        ValueError: one is missing, or one is left that belongs to another kind of VQGAN.
    """
    state: dict[str, Tensor] = {}
    for name in vqgan.state_dict():
        if name not in weights:
            raise ValueError(
                f"{weights.part.path} has no {weights.source(name)}: it is cut, or of another kind of VQGAN"
            )
        state[name] = weights[name]
    weights.refuse_unknown()
    return state
