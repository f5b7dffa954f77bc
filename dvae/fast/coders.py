"""Encoder and decoder on the fast blocks, one picture after the other.

That is as fast as a batch, needs the same memory for any number of pictures, and has one set of shapes.

Shapes: B batch  H,W picture in pixels  Y,X grid of tokens  C channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.fast import winograd
from dvae.fast.blocks import DecoderBlock, EncoderBlock, Linear, Memory, bands, weights
from dvae.fast.choice import Choice
from dvae.fast.kernels import Kernels
from dvae.fast.winograd import Rows
from dvae.images import map_pixels, unmap_pixels
from dvae.model import Block, Decoder, Encoder


class FastEncoder:
    """Pictures to tokens."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype, kernels: Kernels) -> None:
        self.memory = Memory()
        self.downsampling = 2 ** sum(not isinstance(layer, Block) for layer in layers(encoder))
        weight, self.input_bias = weights(encoder.blocks.get_submodule("input"))
        # of a patch of 7 rows of 7 pixels of 3 colours
        self.input_weight = weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
        self.layers = [
            EncoderBlock(layer, dtype, kernels, self.memory) if isinstance(layer, Block) else self._pooled
            for layer in layers(encoder)
        ]
        weight, bias = weights(encoder.blocks.get_submodule("output.conv"))
        self.choice = Choice(weight[:, :, 0, 0].contiguous(), bias)

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B,Y,X) int64 of (B,3,H,W) floats."""
        with torch.inference_mode():
            tokens = [self._tokens(image.float()) for image in images]
        if not tokens:
            return torch.empty(0, *(side // self.downsampling for side in images.shape[2:]), dtype=torch.int64)
        return torch.stack(tokens)

    def _tokens(self, image: Tensor) -> Tensor:
        x = self._input(image)
        for layer in self.layers:
            x = layer(x)
        return self.choice(x.inside.relu().flatten(0, 1)).view(x.inside.shape[:2])

    def _input(self, image: Tensor) -> Rows:
        """Return the first convolution of a picture (3,H,W): the product of its patches and the kernels."""
        _, height, width = image.shape
        pixels = F.pad(map_pixels(image[None])[0].permute(1, 2, 0), (0, 0, 3, 3, 3, 3)).flatten(1)
        patches = pixels.unfold(1, 7 * 3, 3).unfold(0, 7, 1).transpose(2, 3)
        x = self.memory.rows(height, width, len(self.input_bias))
        for band_x, band_patches in zip(bands(x.inside), bands(patches, like=x.inside), strict=True):
            torch.addmm(
                self.input_bias,
                band_patches.reshape(-1, len(self.input_weight)),
                self.input_weight,
                out=band_x.flatten(0, 1),
            )
        return x

    def _pooled(self, x: Rows) -> Rows:
        """Return the largest of every 2×2 positions."""
        height, width, channels = x.inside.shape
        y = Rows.new(
            height // 2,
            width // 2,
            channels,
            torch.empty(winograd.rows_with_border(height // 2) * (width // 2) * channels, dtype=torch.float32),
        )
        pairs = torch.maximum(x.inside[0::2], x.inside[1::2])
        torch.maximum(pairs[:, 0::2], pairs[:, 1::2], out=y.inside)
        return y


class FastDecoder:
    """Tokens to pictures."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, kernels: Kernels) -> None:
        self.memory = Memory()
        weight, bias = weights(decoder.blocks.get_submodule("input"))
        self.codebook = weight[:, :, 0, 0].T + bias
        self.downsampling = 2 ** sum(not isinstance(layer, Block) for layer in layers(decoder))
        self.blocks: list[DecoderBlock] = []
        enlarge = False
        for layer in layers(decoder):
            if isinstance(layer, Block):
                self.blocks.append(DecoderBlock(layer, enlarge, dtype, kernels, self.memory))
            enlarge = not isinstance(layer, Block)
        self.output = Linear(decoder.blocks.get_submodule("output.conv"), torch.float32)
        # the locations of the colours; the scales are not needed
        self.output.weight, self.output.bias = self.output.weight[:3], self.output.bias[:3]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return (B,3,H,W) float32 in [0, 1] of (B,Y,X) int64."""
        with torch.inference_mode():
            locations = [self._locations(tokens_YX) for tokens_YX in tokens]
        if not locations:
            return torch.empty(0, 3, *(side * self.downsampling for side in tokens.shape[1:]), dtype=torch.float32)
        return unmap_pixels(torch.stack(locations).sigmoid())

    def _locations(self, tokens_YX: Tensor) -> Tensor:
        """Return μ, (3,H,W)."""
        rows_YXC = F.embedding(tokens_YX, self.codebook)
        x = self.memory.rows(*rows_YXC.shape)
        x.inside.copy_(rows_YXC)
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.output(band.relu()) for band in bands(x.inside)]).permute(2, 0, 1)


def layers(coder: Encoder | Decoder) -> Iterator[nn.Module]:
    """Yield the blocks, and the poolings or enlargements between them, in order."""
    for group in coder.blocks[1:-1].children():
        yield from group.children()
