"""The blocks of encoder and decoder: the identity path in float32, the residual branch in a type of its own.

The identity path, where rounding would change tokens, lives in memory that is kept from picture to picture and updated
in place. Large intermediate results are computed in bands: fresh memory costs more to get than to fill.

Shapes: H,W height and width of a map  C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.fast import winograd
from dvae.fast.kernels import Kernels
from dvae.fast.winograd import Convolution3x3, Rows
from dvae.model import Block, Conv2d

BAND_ELEMENTS = 2**20
"""Elements of a band of an intermediate result: a few megabytes, which a processor's cache holds."""


class Memory:
    """Float32 memory for the identity path, kept between calls; each map taken overwrites the one before."""

    def __init__(self) -> None:
        self._elements = torch.empty(0, dtype=torch.float32)

    def rows(self, height: int, width: int, channels: int) -> Rows:
        """Return a map of undefined values."""
        n = winograd.rows_with_border(height) * width * channels
        if len(self._elements) < n:
            self._elements = torch.empty(n, dtype=torch.float32)
        return Rows.new(height, width, channels, self._elements)


class Linear:
    """A 1×1 convolution, as a product of matrices."""

    def __init__(self, convolution: nn.Module, dtype: torch.dtype, gain: float = 1.0) -> None:
        weight, bias = weights(convolution)
        self.weight = (weight[:, :, 0, 0] * gain).to(dtype).contiguous()
        self.bias = (bias * gain).to(dtype)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return (…,n_out) for (…,n_in), written to `out` if that is given."""
        if out is None:
            return F.linear(x, self.weight, self.bias)
        torch.addmm(self.bias, x.flatten(0, -2), self.weight.T, out=out.flatten(0, -2))
        return out


class Branch:
    """Base of the blocks of encoder and decoder: the residual path's convolutions, with post_gain folded in."""

    def __init__(self, block: Block, dtype: torch.dtype, kernels: Kernels, memory: Memory) -> None:
        self.dtype, self.kernels, self.memory = dtype, kernels, memory
        self.skip = None if isinstance(block.id_path, nn.Identity) else Linear(block.id_path, torch.float32)

    def convolution(self, block: Block, number: int, gain: float = 1.0) -> Convolution3x3:
        """Return one of the residual path's 3×3 convolutions, with its output times `gain`."""
        weight, bias = weights(block.res_path.get_submodule(f"conv_{number}"))
        return Convolution3x3(weight * gain, bias * gain, self.dtype)

    def new(self, height: int, width: int, channels: int) -> Rows:
        """Return a new map of undefined values in the branch's type."""
        n = winograd.rows_with_border(height) * width * channels
        return Rows.new(height, width, channels, torch.empty(n, dtype=self.dtype))

    def convolved(self, x: Rows, convolution: Convolution3x3) -> Rows:
        """Return ReLU of a convolution of ReLU of a map."""
        values = convolution(x, self.kernels.spread)
        y = self.new(x.height, x.padded.shape[1], len(convolution.bias))
        self.kernels.place(*y.writes(), *values)
        y.clear_border()
        return y


class EncoderBlock(Branch):
    """A block of the encoder: kernels of 3, 3, 3 and 1."""

    def __init__(self, block: Block, dtype: torch.dtype, kernels: Kernels, memory: Memory) -> None:
        super().__init__(block, dtype, kernels, memory)
        self.convolutions = [self.convolution(block, number) for number in (1, 2, 3)]
        self.last = Linear(block.res_path.get_submodule("conv_4"), dtype, block.post_gain)

    def __call__(self, x: Rows) -> Rows:
        """Return the block's output, which replaces its input where both have the same size."""
        h = x
        for convolution in self.convolutions:
            h = self.convolved(h, convolution)
        if self.skip is not None:
            y = self.memory.rows(x.height, x.padded.shape[1], len(self.skip.bias))
            self.skip(x.inside, out=y.inside)
            x = y
        for band_x, band_h in zip(bands(x.inside), bands(h.inside, like=x.inside), strict=True):
            y_NC = band_h.flatten(0, 1) @ self.last.weight.T
            self.kernels.accumulate(band_x.flatten(0, 1), y_NC, self.last.bias)
        return x


class DecoderBlock(Branch):
    """A block of the decoder: kernels of 1, 3, 3 and 3.

    Args:
        block: the block.
        enlarge: whether to enlarge its input to double first.
        dtype: of the branch.
        kernels: compiled.
        memory: of the identity path.
    """

    def __init__(self, block: Block, enlarge: bool, dtype: torch.dtype, kernels: Kernels, memory: Memory) -> None:
        super().__init__(block, dtype, kernels, memory)
        self.enlarge = enlarge
        self.first = Linear(block.res_path.get_submodule("conv_1"), dtype)
        self.convolutions = [self.convolution(block, number) for number in (2, 3)]
        self.last = self.convolution(block, 4, block.post_gain)

    def __call__(self, x: Rows) -> Rows:
        """Return the block's output, which replaces its input."""
        height, width = x.height, x.padded.shape[1]
        h = self.new(height, width, len(self.first.bias))
        for band_x, band_h in zip(bands(x.inside), bands(h.inside, like=x.inside), strict=True):
            band_h.copy_(self.first(band_x.relu().to(self.dtype)))
        if self.skip is not None:
            skipped = self.skip(x.inside)
            factor = 2 if self.enlarge else 1
            x = self.memory.rows(factor * height, factor * width, skipped.shape[-1])
            enlarge(skipped, x.inside)
        if self.enlarge:
            small, h = h, self.new(2 * height, 2 * width, h.padded.shape[2])
            enlarge(small.inside, h.inside)
        for convolution in self.convolutions:
            h = self.convolved(h, convolution)
        self.kernels.add(*x.writes(), *self.last(h, self.kernels.spread))
        x.clear_border()
        return x


def weights(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """Return copies of weight and bias in float32, without gradients."""
    assert isinstance(convolution, Conv2d)
    assert convolution.bias is not None
    weight, bias = convolution.weight.detach(), convolution.bias.detach()
    return weight.to(torch.float32, copy=True), bias.to(torch.float32, copy=True)


def bands(x: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split a map (H,W,…) into bands of rows of `BAND_ELEMENTS`, or into as many rows as `like` is split into."""
    like = x if like is None else like
    bands: tuple[Tensor, ...] = torch.split(x, max(1, BAND_ELEMENTS // like[0].numel()))
    return bands


def enlarge(small: Tensor, large: Tensor) -> None:
    """Copy every position of (H,W,C) to those of (H,W,C) or of (2H,2W,C)."""
    factor = len(large) // len(small)
    height, width, channels = small.shape
    large.view(height, factor, width, factor, channels).copy_(small[:, None, :, None])
