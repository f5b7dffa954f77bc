"""The discrete VAE: pictures to a grid of tokens and back.

Sources: Ramesh et al. 2021, 2.1, A.1 and A.3; openai/DALL-E at 5be4b23 for what the paper leaves open.

The encoder shrinks the picture by pooling and predicts, for every position of the grid, the logits of a
categorical over the vocabulary. The decoder begins with a 1×1 convolution over that vocabulary, which is
the codebook, and ends with the statistics of the logit-Laplace likelihood. Both are stacks of
pre-activation bottleneck blocks without any normalisation.

Shapes: B batch  C channels  H,W picture in pixels  Y,X grid of tokens  V vocabulary.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.images import map_pixels, unmap_pixels
from storage.models.directory import ADDED_LATER, load_directory, load_weights, save_directory

KIND = "dvae"
MAX_GROUPS = 24
_DECODER_KERNELS = (1, 3, 3, 3)


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Sizes of a dVAE.

    The defaults are the paper's: 53,786,240 parameters in the encoder and 43,829,766 in the decoder.
    """

    n_hid: int = 256
    """Width of the encoder's first group; each later group is twice as wide. A multiple of 4."""
    n_init: int = 128
    """Width of the codebook: the channels that the decoder's input convolution makes of a token."""
    n_groups: int = 4
    """Groups of blocks in the encoder and in the decoder; the picture is halved between groups."""
    n_blocks: int = 2
    """Residual blocks per group."""
    vocab_size: int = 8192
    """Number of different image tokens."""
    image_size: int = 256
    """Side in pixels of the square pictures it is trained on; it takes any multiple of `downsampling`."""
    encoder_kernel: int = field(default=3, metadata=ADDED_LATER)
    """Side of the kernels in the encoder's blocks, 3 in the paper. With 1, a token depends only on its own pixels and
    the three around them, and a small transformer learns such tokens in fewer steps."""

    def __post_init__(self) -> None:
        for name, least in {
            "n_hid": 4,
            "n_init": 1,
            "n_groups": 1,
            "n_blocks": 1,
            "vocab_size": 2,
            "image_size": 1,
            "encoder_kernel": 1,
        }.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least {least}")
        if self.n_groups > MAX_GROUPS:
            raise ValueError(f"n_groups ({self.n_groups}) must be at most {MAX_GROUPS}: each halves the picture")
        if self.encoder_kernel % 2 == 0:
            raise ValueError(f"encoder_kernel ({self.encoder_kernel}) must be odd: a kernel has a centre")
        if self.n_hid % 4:
            raise ValueError(
                f"n_hid ({self.n_hid}) must be a multiple of 4: a block's bottleneck is a quarter of its width"
            )
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of {self.downsampling}, "
                f"by which {self.n_groups} groups shrink a picture"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side: 8 in the paper."""
        return int(2 ** (self.n_groups - 1))

    @property
    def grid(self) -> int:
        """Tokens along a side of a picture of `image_size`: 32 in the paper."""
        return self.image_size // self.downsampling

    @property
    def bytes_per_picture(self) -> int:
        """Peak memory of encoding or decoding a picture in float32, beside the weights.

        Measured on a CPU as the rise of the peak resident memory: 4.0 to 5.5 times the activations of the widest layer,
        more for small pictures, of which the allocator keeps more; and the logits where they are larger. With the
        default sizes a picture takes 284 MiB to decode and is counted with 352.
        """
        widest = self.n_hid * self.image_size**2
        logits = self.vocab_size * self.grid**2
        return int(4 * max(5.5 * widest, 3.5 * widest + 1.2 * logits))

    @property
    def n_layers(self) -> int:
        """Blocks in the encoder, and in the decoder: 8 in the paper."""
        return self.n_groups * self.n_blocks


class Conv2d(nn.Conv2d):
    """A convolution that keeps the size of the picture.

    Args:
        n_in: channels in.
        n_out: channels out.
        kernel: odd side of the kernel.
        in_float32: compute in float32 even under autocast and with weights of a lower precision.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, *, in_float32: bool = False) -> None:
        super().__init__(n_in, n_out, kernel, padding=(kernel - 1) // 2)
        self.in_float32 = in_float32

    def reset_parameters(self) -> None:
        """Do nothing: `DVAE` initialises all of its convolutions in one place, with its generator."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,n_out,H,W) for (B,n_in,H,W)."""
        assert self.bias is not None
        if not self.in_float32:
            return super().forward(x.to(self.weight.dtype))
        # the meta device, on which shapes are planned, has no autocast to switch off
        has_autocast = torch.amp.is_autocast_available(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if has_autocast else nullcontext():
            output: Tensor = self._conv_forward(x.float(), self.weight.float(), self.bias.float())
            return output


class Block(nn.Module):
    """A residual block: four convolutions, each after a ReLU, at a quarter of the width.

    Args:
        n_in: channels in.
        n_out: channels out; where they differ, the skip path is a 1×1 convolution.
        kernels: sides of the four kernels.
        post_gain: factor on the residual path; small, so that a deep stack starts near the identity (A.1).
    """

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], post_gain: float) -> None:
        super().__init__()
        self.post_gain = post_gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, n_out // 4, n_out // 4, n_out // 4, n_out)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,n_out,H,W) for (B,n_in,H,W)."""
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.post_gain)

    def forward_enlarged(self, x: Tensor) -> Tensor:
        """Return (B,n_out,2H,2W) for (B,n_in,H,W): `forward` of `x` enlarged to double, nearest.

        Only for a block whose first kernel is 1×1: such a convolution and a ReLU commute with copying positions, so
        the first convolution of both paths is computed at a quarter of them.
        """
        first, rest = self.res_path[:2], self.res_path[2:]
        return torch.add(_enlarged(self.id_path(x)), rest(_enlarged(first(x))), alpha=self.post_gain)


class Encoder(nn.Module):
    """Pictures to logits over the vocabulary; the last convolution is always computed in float32."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = [config.n_hid * 2**g for g in range(config.n_groups)]
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, config.n_hid, 7))
        n_in, kernel = config.n_hid, config.encoder_kernel
        for g, n_out in enumerate(widths):
            group = _group(config, n_in, n_out, (kernel, kernel, kernel, 1))
            if g < config.n_groups - 1:
                group["pool"] = nn.MaxPool2d(2)
            blocks[f"group_{g + 1}"] = nn.Sequential(group)
            n_in = n_out
        blocks["output"] = _output(n_in, config.vocab_size, in_float32=True)
        self.blocks = nn.Sequential(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every position.

        Args:
            x: (B,3,H,W) pictures after `map_pixels`.

        Returns:
            (B,V,Y,X) float32 logits.
        """
        output: Tensor = self.blocks(x)
        return output


class Decoder(nn.Module):
    """Probabilities of tokens to statistics of pixels; the first convolution is always computed in float32.

    `blocks` is the plain graph. `forward` computes the same with the 1×1 convolutions that follow an enlargement moved
    before it: 258 instead of 308 GFLOP a picture with the default sizes.
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = [config.n_hid * 2**g for g in reversed(range(config.n_groups))]
        blocks: OrderedDict[str, nn.Module] = OrderedDict(
            input=Conv2d(config.vocab_size, config.n_init, 1, in_float32=True)
        )
        n_in = config.n_init
        for g, n_out in enumerate(widths):
            group = _group(config, n_in, n_out, _DECODER_KERNELS)
            if g < config.n_groups - 1:
                group["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
            blocks[f"group_{g + 1}"] = nn.Sequential(group)
            n_in = n_out
        blocks["output"] = _output(n_in, 6, in_float32=False)
        self.blocks = nn.Sequential(blocks)

    def forward(self, probabilities: Tensor) -> Tensor:
        """Return the likelihood's statistics for distributions over the vocabulary.

        Args:
            probabilities: (B,V,Y,X) floats that sum to 1 over V: one-hot, or relaxed.

        Returns:
            (B,6,H,W) float32: the location μ of red, green and blue, then the logarithm of the scale b of
            each.
        """
        return self.from_rows(self.rows(probabilities))

    @property
    def codebook(self) -> Tensor:
        """The first convolution's output for each token alone, float32 (V,C)."""
        convolution = self.blocks.get_submodule("input")
        assert isinstance(convolution, Conv2d)
        assert convolution.bias is not None
        return convolution.weight.float()[:, :, 0, 0].T + convolution.bias.float()

    def rows(self, probabilities: Tensor) -> Tensor:
        """Return mixtures of the codebook's rows with these weights, (B,V,Y,X) to (B,C,Y,X) float32."""
        mixture: Tensor = self.blocks.get_submodule("input")(probabilities)
        return mixture

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Return `forward` of one-hot probabilities, without making them.

        The input convolution of a one-hot vector is a row of the codebook: a lookup instead of a product
        with V-1 zeros.

        Args:
            tokens: (B,Y,X) int64 in 0 … V-1.

        Returns:
            (B,6,H,W) float32, as `forward`.
        """
        rows_BYXC = F.embedding(tokens, self.codebook)
        # permuted, they are in channels-last order, in which convolutions are fastest, and stay so from layer to layer
        return self.from_rows(rows_BYXC.permute(0, 3, 1, 2))

    def from_rows(self, x: Tensor) -> Tensor:
        """Return the statistics for rows of the codebook (B,C,Y,X), enlarging after the 1×1 convolutions."""
        is_smaller = False
        for group in self.blocks[1:-1].children():
            for layer in group.children():
                if isinstance(layer, nn.Upsample):
                    is_smaller = True
                    continue
                assert isinstance(layer, Block)
                x = layer.forward_enlarged(x) if is_smaller else layer(x)
                is_smaller = False
        output: Tensor = self.blocks[-1](x).float()
        return output


class DVAE(nn.Module):
    """A discrete VAE: `encode` turns pictures into tokens, `decode` tokens into pictures.

    Training goes through `encoder` and `decoder` (see dvae/loss.py), which take mapped pixels and relaxed
    tokens.

    Args:
        config: the sizes.
        generator: of the random weights; torch's global one if not given.
    """

    def __init__(self, config: DVAEConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for module in self.modules():
            if isinstance(module, Conv2d):
                _initialise(module, generator)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the most likely token of every position: argmax, without noise (footnote 6 of the paper).

        Args:
            images: (B,3,H,W) floats in [0, 1]; H and W multiples of `config.downsampling`.

        Returns:
            (B,H/f,W/f) int64 in 0 … V-1.

        Raises:
            ValueError: the pictures have another shape or are not floats.
        """
        check_images(self.config.downsampling, images)
        # convolutions are fastest in channels-last order, and keep it from layer to layer
        x = map_pixels(images).contiguous(memory_format=torch.channels_last)
        codes: Tensor = self.encoder(x).argmax(dim=1)
        return codes

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Return the mode of the pixels' location, x̂ = unmap(sigmoid(μ)), which ignores the scale (A.3).

        Args:
            tokens: (B,Y,X) int64 in 0 … V-1.

        Returns:
            (B,3,f·Y,f·X) float32 in [0, 1].

        Raises:
            ValueError: the tokens have another shape or type, or are not in the vocabulary.
        """
        check_tokens(self.config.vocab_size, tokens)
        return unmap_pixels(self.decoder.from_tokens(tokens)[:, :3].sigmoid())

    @property
    def codebook(self) -> Tensor:
        """A row for each token, float32 (V,C): the decoder's first convolution of it."""
        return self.decoder.codebook

    def decoding_products(self, grid: int) -> int:
        """Return the multiplications, about, of decoding a picture with `grid` tokens along a side."""
        groups = [self.decoder.blocks.get_submodule(f"group_{g + 1}") for g in range(self.config.n_groups)]
        return sum((grid * 2**g) ** 2 * sum(w.numel() for w in group.parameters()) for g, group in enumerate(groups))

    def save(self, path: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the model as a directory; see `save_directory`."""
        save_directory(path, KIND, self.config, self.state_dict(), metadata=metadata)

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> Self:
        """Read a directory written by `save`, for use (in evaluation mode).

        Raises:
            FileNotFoundError: there is no dVAE at `path`.
            ValueError: the directory holds something else or is damaged.
        """
        config, state, _ = load_directory(path, KIND, DVAEConfig)
        with torch.device("meta"):
            dvae = cls(config)
        load_weights(dvae, state, path)
        return dvae.to(device).eval()


def check_images(f: int, images: Tensor) -> None:
    """Raise ValueError unless `images` are (B,3,H,W) floats, H and W multiples of the downsampling f."""
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3:
        raise ValueError(
            f"encode was given pictures of shape {shape}, expected (batch, 3, height, width): RGB, channels first"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"encode was given {images.dtype} pictures, expected floats in [0, 1]: divide 8-bit pixels by 255"
        )
    if 0 in shape[2:] or shape[2] % f or shape[3] % f:
        raise ValueError(
            f"encode was given pictures of {shape[2]}×{shape[3]} pixels, expected multiples of {f}: resize or crop them"
        )


def check_tokens(vocab_size: int, tokens: Tensor) -> None:
    """Raise ValueError unless `tokens` are (B,Y,X) int64 in 0 … vocab_size - 1."""
    if tokens.ndim != 3 or tokens.dtype != torch.int64 or 0 in tokens.shape[1:]:
        raise ValueError(
            f"decode was given {tokens.dtype} tokens of shape {tuple(tokens.shape)}, "
            "expected int64 of shape (batch, rows, columns)"
        )
    if tokens.numel():
        low, high = torch.stack(tokens.aminmax()).tolist()  # at once: a GPU is waited for once
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"decode was given tokens from {low} to {high}, expected 0 … {vocab_size - 1}: "
                "do they come from another dVAE, or from a stream with text?"
            )


def _enlarged(x: Tensor) -> Tensor:
    """Return (B,C,2H,2W) for (B,C,H,W): every position copied to four."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _group(config: DVAEConfig, n_in: int, n_out: int, kernels: tuple[int, ...]) -> OrderedDict[str, nn.Module]:
    """Return the blocks of one resolution."""
    post_gain = 1 / config.n_layers**2
    return OrderedDict(
        (f"block_{b + 1}", Block(n_in if b == 0 else n_out, n_out, kernels, post_gain)) for b in range(config.n_blocks)
    )


def _output(n_in: int, n_out: int, *, in_float32: bool) -> nn.Sequential:
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, n_out, 1, in_float32=in_float32)))


@torch.no_grad()
def _initialise(convolution: Conv2d, generator: torch.Generator | None) -> None:
    """Draw weights from N(0, 1/fan-in) and set biases to 0, as the released package does."""
    assert convolution.bias is not None
    fan_in = convolution.weight[0].numel()
    convolution.weight.normal_(std=1 / math.sqrt(fan_in), generator=generator)
    convolution.bias.zero_()
