"""The VQGANs of the family: pictures to a grid of tokens and back, for use with published weights.

Sources: Esser et al. 2021 (taming-transformers, CompVis/taming-transformers at 3ba01b2), whose names the weights keep;
its Gumbel quantiser as ai-forever/ru-dalle at 0255cec uses it, by argmax.

The encoder shrinks the picture by convolutions of stride 2 and ends in vectors; each is replaced by the closest code.
The decoder enlarges the codes. Both are stacks of residual blocks with group normalisation, with attention at the
coarse levels.

Shapes: B batch  C channels  H,W picture in pixels  Y,X grid of tokens  P positions  V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.model import check_images, check_tokens
from storage.models.directory import load_directory, load_weights, save_directory

KIND = "vqgan"
GROUPS = 32
"""Of all normalisations; widths are multiples of it."""
NORM_EPSILON = 1e-6
MAX_LEVELS, MAX_WIDTH = 16, 1 << 16
SCORES_AT_ONCE = 1 << 24
"""Scores of codes that are in memory at once: 64 MiB."""
BYTES_PER_ACTIVATION = 32
"""Peak memory of a picture per activation of the finest level; measured, see `VQGANConfig.bytes_per_picture`."""

Quantiser = Literal["nearest", "gumbel"]
Pixels = Literal["signed", "unit"]


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes of a VQGAN; the defaults are those of f16 with 16,384 codes, 76,073,859 parameters."""

    width: int = 128
    """Channels of the finest level; a multiple of 32."""
    multiples: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each level, the finest first, in multiples of `width`; the picture is halved between levels."""
    n_blocks: int = 2
    """Residual blocks of a level in the encoder; the decoder has one more."""
    attention: tuple[int, ...] = (4,)
    """Levels, 0 the finest, in which attention follows every block."""
    z_channels: int = 256
    """Channels that the encoder ends with and the decoder begins with."""
    code_width: int = 256
    """Numbers of a code."""
    vocab_size: int = 16384
    """Number of codes."""
    image_size: int = 256
    """Side in pixels of the square pictures it was trained on; it takes any multiple of `downsampling`."""
    quantiser: Quantiser = "nearest"
    """How a code is chosen: the nearest one, or the one with the largest logit."""
    pixels: Pixels = "signed"
    """The range of pixels that the weights are used with: signed is [-1, 1], as almost all are; unit is [0, 1], as in
    DALL·E mini."""
    has_encoder: bool = True
    """Whether it has the half that turns pictures into tokens."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("width", "n_blocks", "z_channels", "code_width", "image_size")}
        sizes |= {"vocab_size": self.vocab_size} | {f"multiples[{i}]": m for i, m in enumerate(self.multiples)}
        for name, value in sizes.items():
            if type(value) is not int or not value >= 1:
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least 1")
        if self.width % GROUPS:
            raise ValueError(f"width ({self.width}) must be a multiple of {GROUPS}, the groups of a normalisation")
        if max(self.widths, default=0) > MAX_WIDTH:
            raise ValueError(f"a level has {max(self.widths)} channels: expected at most {MAX_WIDTH}")
        if not 1 <= len(self.multiples) <= MAX_LEVELS:
            raise ValueError(f"multiples must be 1 to {MAX_LEVELS} numbers: each level halves the picture")
        if self.attention != tuple(level for level in range(len(self.multiples)) if level in self.attention):
            raise ValueError(f"attention ({self.attention}) must be rising numbers of levels from 0")
        for name, kinds in (("quantiser", Quantiser), ("pixels", Pixels)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be {' or '.join(get_args(kinds))}")
        if type(self.has_encoder) is not bool:
            raise ValueError(f"has_encoder ({self.has_encoder!r}) must be true or false")
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of {self.downsampling}, "
                f"by which {len(self.multiples)} levels shrink a picture"
            )

    @property
    def widths(self) -> list[int]:
        """Channels of each level, the finest first."""
        return [self.width * multiple for multiple in self.multiples]

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side: 16 by default."""
        return int(2 ** (len(self.multiples) - 1))

    @property
    def grid(self) -> int:
        """Tokens along a side of a picture of `image_size`: 16 by default."""
        return self.image_size // self.downsampling

    @property
    def bytes_per_picture(self) -> int:
        """Peak memory of encoding or decoding a picture in float32, beside the weights; measured on a CPU."""
        return int(BYTES_PER_ACTIVATION * max(w / 4**i for i, w in enumerate(self.widths)) * self.image_size**2)


class Block(nn.Module):
    """A residual block: two 3×3 convolutions, each after normalisation and swish."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(n_in), _conv(n_in, n_out)
        self.norm2, self.conv2 = _norm(n_out), _conv(n_out, n_out)
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,n_out,Y,X) for (B,n_in,Y,X)."""
        branch = self.conv2(_swish(self.norm2(self.conv1(_swish(self.norm1(x))))))
        output: Tensor = branch.add_(self.nin_shortcut(x))
        return output


class Attention(nn.Module):
    """Attention of every position to all, with one head, added to its input."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = _norm(n)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,C,Y,X) for (B,C,Y,X)."""
        normed_B1PC = self.norm(x).flatten(2).transpose(1, 2)[:, None]
        # as a linear layer's, their channels lie side by side for any batch, and no weights of P·P are stored
        q_B1PC, k_B1PC, v_B1PC = (_linear(layer, normed_B1PC) for layer in (self.q, self.k, self.v))
        out_BPC = _linear(self.proj_out, F.scaled_dot_product_attention(q_B1PC, k_B1PC, v_B1PC)[:, 0])
        return x + out_BPC.transpose(1, 2).reshape(x.shape)


class Resample(nn.Module):
    """Pictures to half or to double their size."""

    def __init__(self, n: int, factor: Literal["half", "double"]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(n, n, 3, stride=2) if factor == "half" else _conv(n, n)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,C,Y/2,X/2) or (B,C,2Y,2X) for (B,C,Y,X)."""
        # the border of zeros is on the right and below only
        x = F.pad(x, (0, 1, 0, 1)) if self.factor == "half" else F.interpolate(x, scale_factor=2.0, mode="nearest")
        output: Tensor = self.conv(x)
        return output


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention or not, and the way to the next resolution."""

    def __init__(self, n_in: int, n_out: int, n_blocks: int, *, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(n_in if b == 0 else n_out, n_out) for b in range(n_blocks))
        self.attn = nn.ModuleList(Attention(n_out) for _ in range(n_blocks if attends else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,n_out,…) for (B,n_in,Y,X)."""
        for b, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[b](x)
        output: Tensor = self.upsample(self.downsample(x))
        return output


class Middle(nn.Module):
    """A block, attention and a block at the coarsest resolution."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(n, n), Attention(n), Block(n, n)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,C,Y,X) for (B,C,Y,X)."""
        output: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return output


class Encoder(nn.Module):
    """Pictures to vectors, a vector for each position of the grid."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = _conv(3, config.width)
        self.down = nn.ModuleList()
        for i, (n_in, n_out) in enumerate(zip([config.width, *widths], widths, strict=False)):
            level = Level(n_in, n_out, config.n_blocks, attends=i in config.attention)
            if i < len(widths) - 1:
                level.downsample = Resample(n_out, "half")
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv(widths[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,z,Y,X) for (B,3,H,W)."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        output: Tensor = self.conv_out(_swish(self.norm_out(self.mid(x))))
        return output


class Decoder(nn.Module):
    """Vectors to pictures."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = _conv(config.z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        # numbered as the encoder's, the finest first, though the coarsest is computed first
        self.up = nn.ModuleList()
        for i, (n_in, n_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            level = Level(n_in, n_out, config.n_blocks + 1, attends=i in config.attention)
            if i > 0:
                level.upsample = Resample(n_out, "double")
            self.up.append(level)
        self.norm_out, self.conv_out = _norm(widths[0]), _conv(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,3,H,W) for (B,z,Y,X)."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        output: Tensor = self.conv_out(_swish(self.norm_out(x)))
        return output


class Codebook(nn.Module):
    """The codes, and how one is chosen for a vector: both ways are the largest of V scores, linear in the vector."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.code_width)
        has_logits = config.has_encoder and config.quantiser == "gumbel"
        self.proj = nn.Conv2d(config.code_width, config.vocab_size, 1) if has_logits else None

    def forward(self, z_BCYX: Tensor) -> Tensor:
        """Return the number of each vector's code, (B,C,Y,X) to int64 (B,Y,X); of equal ones the first."""
        codes_VC, bias_V = self.embedding.weight, None
        if self.proj is not None:
            codes_VC, bias_V = self.proj.weight[:, :, 0, 0], self.proj.bias
        else:
            # |z - e|² = |z|² - 2 (z·e - |e|²/2), and |z|² is the same for all
            bias_V = -codes_VC.square().sum(dim=1) / 2
        rows_PC = z_BCYX.permute(0, 2, 3, 1).flatten(0, 2)
        bands = torch.split(rows_PC, max(1, SCORES_AT_ONCE // len(codes_VC)))
        tokens_P = torch.cat([F.linear(band, codes_VC, bias_V).argmax(dim=1) for band in bands])
        return tokens_P.view(len(z_BCYX), *z_BCYX.shape[2:])


class VQGAN(nn.Module):
    """A VQGAN: `encode` turns pictures into tokens, `decode` tokens into pictures. It is not trained here.

    Args:
        config: the sizes.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if config.has_encoder else None
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_width, 1) if config.has_encoder else None
        self.quantize = Codebook(config)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.z_channels, 1)
        self.decoder = Decoder(config)

    @property
    def codebook(self) -> Tensor:
        """The codes, float32 (V,C)."""
        return self.quantize.embedding.weight.detach().float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the code of every position.

        Args:
            images: (B,3,H,W) floats in [0, 1]; H and W multiples of `config.downsampling`.

        Returns:
            (B,H/f,W/f) int64 in 0 … V-1.

        Raises:
            ValueError: the pictures have another shape or are not floats, or there is no encoder.
        """
        check_images(self.config.downsampling, images)
        if self.encoder is None or self.quant_conv is None:
            raise ValueError(
                "this VQGAN has no encoder, it only decodes: to turn pictures into tokens, import one with both halves "
                "(`dalle import-vqgan`), such as the VQGAN that DALL·E mini's decoder was taken from"
            )
        x = images.float() * 2 - 1 if self.config.pixels == "signed" else images.float()
        # convolutions are fastest in channels-last order, and keep it from layer to layer
        z_BCYX = self.quant_conv(self.encoder(x.contiguous(memory_format=torch.channels_last)))
        tokens: Tensor = self.quantize(z_BCYX)
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Return the pictures that tokens stand for.

        Args:
            tokens: (B,Y,X) int64 in 0 … V-1.

        Returns:
            (B,3,f·Y,f·X) float32 in [0, 1].

        Raises:
            ValueError: the tokens have another shape or type, or are not in the vocabulary.
        """
        check_tokens(self.config.vocab_size, tokens)
        # permuted, they are in channels-last order
        z_BCYX = self.post_quant_conv(self.quantize.embedding(tokens).permute(0, 3, 1, 2))
        pixels: Tensor = self.decoder(z_BCYX)
        return (pixels / 2 + 0.5 if self.config.pixels == "signed" else pixels).clamp(0, 1)

    def decoding_products(self, grid: int) -> int:
        """Return the multiplications, about, of decoding a picture with `grid` tokens along a side."""
        coarsest = len(self.config.multiples) - 1
        parts = [(coarsest, self.decoder.mid), *((i, level) for i, level in enumerate(self.decoder.up))]
        return sum((grid * 2 ** (coarsest - i)) ** 2 * sum(w.numel() for w in part.parameters()) for i, part in parts)

    def save(self, path: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the model as a directory; see `save_directory`."""
        save_directory(path, KIND, self.config, self.state_dict(), metadata=metadata)

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> Self:
        """Read a directory written by `save`, for use (in evaluation mode).

        Raises:
            FileNotFoundError: there is no VQGAN at `path`.
            ValueError: the directory holds something else or is damaged.
        """
        config, state, _ = load_directory(path, KIND, VQGANConfig)
        with torch.device("meta"):
            vqgan = cls(config)
        load_weights(vqgan, state, path)
        return vqgan.to(device).eval()


def _conv(n_in: int, n_out: int) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1)


def _linear(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return a 1×1 convolution of rows (…,C)."""
    return F.linear(x, layer.weight[:, :, 0, 0], layer.bias)


def _norm(n: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, n, eps=NORM_EPSILON)


def _swish(x: Tensor) -> Tensor:
    """Return x·sigmoid(x), in its place."""
    return F.silu(x, inplace=True)
