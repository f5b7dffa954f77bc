"""What turns pictures into a grid of tokens and back: any of the models that may lie in a bundle's folder `dvae`."""

from pathlib import Path
from typing import Protocol

import torch

from dvae import discrete, model, vqgan
from dvae.discrete import DiscreteVAE
from dvae.model import DVAE
from dvae.vqgan import VQGAN
from storage.models.directory import directory_kind

Codec = DVAE | VQGAN | DiscreteVAE
"""Any of them: `encode` pictures (B,3,H,W) in [0, 1] to tokens (B,Y,X), `decode` tokens; their config is a
`CodecConfig`."""
_CODECS: dict[str, type[DVAE | VQGAN | DiscreteVAE]] = {
    model.KIND: DVAE,
    vqgan.KIND: VQGAN,
    discrete.KIND: DiscreteVAE,
}


class CodecConfig(Protocol):
    """What the configurations of all codecs tell."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures it was trained on."""

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side."""

    @property
    def grid(self) -> int:
        """Tokens along a side of a picture of `image_size`."""

    @property
    def bytes_per_picture(self) -> int:
        """Peak memory of encoding or decoding a picture of `image_size` in float32, beside the weights."""


def load_codec(path: Path | str, device: torch.device | str = "cpu") -> Codec:
    """Read a directory of any codec, for use (in evaluation mode).

    Raises:
        FileNotFoundError: there is none at `path`.
        ValueError: the directory holds something else or is damaged.
    """
    kind = _CODECS.get(directory_kind(path, expected=model.KIND), DVAE)
    return kind.load(path, device)
