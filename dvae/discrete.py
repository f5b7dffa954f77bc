"""DALLE-pytorch's own discrete VAE (lucidrains/DALLE-pytorch at 58c1e1a, dalle_pytorch.py).

The encoder halves the picture with 4×4 convolutions of stride 2 and ends in the logits of the tokens; the decoder
begins with a token's row of the codebook and mirrors it. Residual blocks, if there are any, are at the size of the
grid. Pixels are in [-1, 1] inside. The names of the weights are those of its files.

Shapes: B batch  C channels  H,W picture in pixels  Y,X grid of tokens  V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.model import check_images, check_tokens
from storage.models.directory import load_directory, load_weights, save_directory

KIND = "discrete-vae"
"""Kind of the model's directory, in its config.json."""
MAX_LAYERS = 24


@dataclass(frozen=True, kw_only=True)
class DiscreteVAEConfig:
    """Sizes of a DiscreteVAE."""

    vocab_size: int
    """Number of different image tokens."""
    image_size: int
    """Side in pixels of the square pictures it was trained on; it takes any multiple of `downsampling`."""
    n_layers: int
    """Convolutions that halve the picture."""
    n_blocks: int
    """Residual blocks in the encoder, and in the decoder."""
    hidden: int
    """Width of all layers."""
    codebook_width: int
    """Width of a token's row of the codebook."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "image_size", "n_layers", "hidden", "codebook_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.n_blocks < 0 or self.n_layers > MAX_LAYERS:
            raise ValueError(f"n_blocks ({self.n_blocks}) must be at least 0, n_layers ({self.n_layers}) at most 24")
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of {self.downsampling}, "
                f"by which {self.n_layers} layers shrink a picture"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side."""
        return int(2**self.n_layers)

    @property
    def grid(self) -> int:
        """Tokens along a side of a picture of `image_size`."""
        return self.image_size // self.downsampling

    @property
    def bytes_per_picture(self) -> int:
        """Peak memory of encoding or decoding a picture in float32, beside the weights: an upper bound by layers."""
        widest = self.hidden * (self.image_size // 2) ** 2
        return 4 * (4 * widest + 9 * self.image_size**2 + 2 * self.vocab_size * self.grid**2)


class Block(nn.Module):
    """A residual block: two 3×3 convolutions and a 1×1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,C,Y,X) for (B,C,Y,X)."""
        output: Tensor = self.net(x) + x
        return output


class DiscreteVAE(nn.Module):
    """A discrete VAE: `encode` turns pictures into tokens, `decode` tokens into pictures."""

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden
        self.codes = nn.Embedding(config.vocab_size, config.codebook_width)
        blocks = range(config.n_blocks)
        widths = [3] + [width] * config.n_layers
        halved = [_with_relu(nn.Conv2d(a, b, 4, 2, 1)) for a, b in pairwise(widths)]
        self.encoder = nn.Sequential(*halved, *(Block(width) for _ in blocks), nn.Conv2d(width, config.vocab_size, 1))
        first = [nn.Conv2d(config.codebook_width, width, 1)] if config.n_blocks else []
        widths = [width if config.n_blocks else config.codebook_width] + [width] * config.n_layers
        doubled = [_with_relu(nn.ConvTranspose2d(a, b, 4, 2, 1)) for a, b in pairwise(widths)]
        self.decoder = nn.Sequential(*first, *(Block(width) for _ in blocks), *doubled, nn.Conv2d(width, 3, 1))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the most likely token of every position.

        Args:
            images: (B,3,H,W) floats in [0, 1]; H and W multiples of `config.downsampling`.

        Returns:
            (B,H/f,W/f) int64 in 0 … V-1.

        Raises:
            ValueError: the pictures have another shape or are not floats.
        """
        check_images(self.config.downsampling, images)
        logits_BVYX: Tensor = self.encoder((images.to(self.codes.weight.dtype) - 0.5) / 0.5)
        return logits_BVYX.argmax(dim=1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Return pictures.

        Args:
            tokens: (B,Y,X) int64 in 0 … V-1.

        Returns:
            (B,3,f·Y,f·X) float32 in [0, 1].

        Raises:
            ValueError: the tokens have another shape or type, or are not in the vocabulary.
        """
        check_tokens(self.config.vocab_size, tokens)
        rows_BCYX = F.embedding(tokens, self.codes.weight).permute(0, 3, 1, 2)
        pixels: Tensor = self.decoder(rows_BCYX)
        return (pixels.float() * 0.5 + 0.5).clamp(0, 1)

    @property
    def codebook(self) -> Tensor:
        """A row for each token, float32 (V,C)."""
        return self.codes.weight.float()

    def decoding_products(self, grid: int) -> int:
        """Return the multiplications, about, of decoding a picture with `grid` tokens along a side."""
        products, side = 0, grid
        for layer in self.decoder:
            products += side**2 * sum(weight.numel() for weight in layer.parameters())
            side *= 2 if isinstance(layer, nn.Sequential) else 1
        return products

    def save(self, path: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the model as a directory; see `save_directory`."""
        save_directory(path, KIND, self.config, self.state_dict(), metadata=metadata)

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> Self:
        """Read a directory written by `save`, for use (in evaluation mode).

        Raises:
            FileNotFoundError: there is no such model at `path`.
            ValueError: the directory holds something else or is damaged.
        """
        config, state, _ = load_directory(path, KIND, DiscreteVAEConfig)
        with torch.device("meta"):
            vae = cls(config)
        load_weights(vae, state, path)
        return vae.to(device).eval()


def _with_relu(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, nn.ReLU())
