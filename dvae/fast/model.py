"""A copy of a dVAE for use only, made for speed: on a CPU several times as fast as the model that it is made of.

What it does differently there, in the order of what it brings:

1. The 3×3 convolutions need half of the multiplications (dvae/fast/winograd.py), with compiled transforms.
2. The residual branches multiply in `dtype`, bfloat16 by default. The identity path (input convolution, 1×1
   convolutions, the sum itself), where rounding would change tokens, stays in float32, and so do both output
   convolutions and the codebook.
3. The 1×1 convolutions that follow an enlargement are moved before it, tokens are looked up.
4. The logits of the vocabulary are computed in bfloat16, and again in float32 for those that may be the largest: a
   bound on the rounding says which. So the choice is the one that float32 makes.
5. The identity path lives in memory that is kept from picture to picture, is updated in place, and large intermediate
   results are computed in bands: memory that is fresh costs more to get than to fill.

Pictures are computed one after the other: that is as fast as a batch, needs the same memory for any number, and there
is one set of shapes. The compiled transforms take any size of picture, so that nothing is compiled again (but once for
grids of at most four rows, whose one tile of rows torch.compile treats as a case of its own).

Shapes: B batch  H,W picture in pixels  Y,X grid of tokens  C channels  V vocabulary  N positions.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.fast import winograd
from dvae.fast.winograd import Convolution3x3, Kernel, Rows
from dvae.images import map_pixels, unmap_pixels
from dvae.model import DVAE, Block, Conv2d, Decoder, DVAEConfig, Encoder, check_images, check_tokens

logger = logging.getLogger(__name__)

_LEAST_WIDTH = 128
"""Of `n_hid`, from which on compiling pays: at 128 as fast or up to 1.3 times as fast as the plain model in the same
type, at 64 slower, because small convolutions cost less than the calls."""
_BAND_ELEMENTS = 2**20
"""Elements of an intermediate result that is computed in bands; a few megabytes, which a processor's cache holds."""
_MAX_CANDIDATES = 16
"""Candidates for the largest logit, on average over the positions; with more, all logits are computed in float32."""


class FastDVAE:
    """What `optimised` returns: `encode` and `decode` of a dVAE, with the same contract. For one thread at a time.

    Args:
        config: the sizes.
        encode: `DVAE.encode` for pictures that have been checked.
        decode: `DVAE.decode` for tokens that have been checked.
    """

    def __init__(
        self, config: DVAEConfig, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]
    ) -> None:
        self.config = config
        self._encode, self._decode = encode, decode

    def encode(self, images: Tensor) -> Tensor:
        """Return the most likely token of every position; see `DVAE.encode`."""
        check_images(self.config, images)
        return self._encode(images)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the mode of the pixels' location; see `DVAE.decode`."""
        check_tokens(self.config, tokens)
        return self._decode(tokens)


def optimised(dvae: DVAE, *, dtype: torch.dtype = torch.bfloat16, compile: bool = True) -> FastDVAE:
    """Return a copy of a dVAE for use, made for speed. Later changes of the dVAE do not reach it.

    On a CPU it is as the module's description says, if the dVAE is wide enough to gain from that (`n_hid` of at least
    128) and its encoder's kernels are the paper's. Compiling takes about 20 seconds, and a few where torch's cache on
    disk has the result of an earlier time. With the default sizes the copy takes 0.7 GiB (in float32 0.9), and a call
    at most 0.2 GiB, of which it keeps the half. Other dVAEs, and those on another device, are copied plainly: weights
    in `dtype`, in channels-last order.

    Args:
        dvae: the model.
        dtype: torch.float32 for the same tokens and pictures but for rounding; torch.bfloat16 to multiply in it.
        compile: False to copy plainly in any case. That is also what happens, after a warning in the log, when
            compiling fails, as it does where there is no C++ compiler.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}, expected torch.float32 or torch.bfloat16")
    config = dvae.config
    on_cpu = next(dvae.parameters()).device.type == "cpu"
    pays = on_cpu and config.n_hid >= _LEAST_WIDTH and config.encoder_kernel == 3
    kernels = _compiled_kernels(dtype) if compile and pays else None
    if kernels is None:
        plain = _plain_copy(dvae, dtype)
        return FastDVAE(dvae.config, plain.encode, plain.decode)
    encode = _FastEncoder(dvae.encoder, dtype, kernels)
    decode = _FastDecoder(dvae.decoder, dtype, kernels)
    return FastDVAE(dvae.config, encode, decode)


def pictures_at_once(config: DVAEConfig, budget_bytes: int) -> int:
    """Return how many pictures `DVAE.encode` or `DVAE.decode` may be given in memory of this size; at least 1.

    For float32, beside the weights; `optimised`, compiled, needs the memory of one picture for any number.

    Measured on a CPU as the peak of the resident memory over the memory before: 4.0 to 5.5 times the activations of
    the widest layer, the higher for small pictures, of which the allocator keeps more; and the logits where they are
    larger than that. With the default sizes a picture takes 284 MiB to decode and is counted with 352.

    Args:
        config: the sizes.
        budget_bytes: memory for everything that is made between a call and its return.
    """
    widest = config.n_hid * config.image_size**2
    logits = config.vocab_size * config.grid**2
    bytes_per_picture = 4 * max(5.5 * widest, 3.5 * widest + 1.2 * logits)
    return max(1, int(budget_bytes / bytes_per_picture))


def _plain_copy(dvae: DVAE, dtype: torch.dtype) -> DVAE:
    """Return a copy in channels-last order whose convolutions, but for codebook and output, have weights in `dtype`."""
    plain: DVAE = copy.deepcopy(dvae).eval().requires_grad_(False)
    cast(Conv2d, plain.decoder.blocks.get_submodule("output.conv")).in_float32 = True
    for module in plain.modules():
        if isinstance(module, Conv2d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)
            if not module.in_float32:
                module.to(dtype)
    return plain


@dataclass(frozen=True, kw_only=True)
class _Kernels:
    """The functions that are compiled."""

    spread: Kernel
    place: Kernel
    add: Kernel
    accumulate: Kernel


def _accumulate(x: Tensor, y: Tensor, bias: Tensor) -> None:
    """Add (N,C) and (C) to (N,C) of another type, for which torch has no fast loop."""
    x.add_(y.float() + bias.float())


@functools.cache
def _compiled(function: Kernel) -> Kernel:
    """Return a function compiled for any size; cached, so that all copies share what is compiled."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def _compiled_kernels(dtype: torch.dtype) -> _Kernels | None:
    """Return the kernels, already compiled for `dtype`; None, after a warning, when that fails."""
    kernels = _Kernels(
        spread=_compiled(winograd.spread),
        place=_compiled(winograd.place),
        add=_compiled(winograd.add),
        accumulate=_compiled(_accumulate),
    )
    try:
        _try_out(kernels, dtype)
    # what the stages of torch.compile raise, and what starting a C++ compiler does
    except (RuntimeError, OSError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("the fast dVAE cannot be compiled (%s) and runs uncompiled, more slowly", reason)
        return None
    return kernels


def _try_out(kernels: _Kernels, dtype: torch.dtype) -> None:
    """Run every kernel once, which compiles it; on a map that is large enough to be worth two threads."""
    height, width, channels = 96, 40, 64
    n = winograd.rows_with_border(height) * width * channels
    # torch.compile notes which tensors are made for inference only and which begin at the same place: as in use
    convolution = Convolution3x3(torch.zeros(channels, channels, 3, 3), torch.zeros(channels), dtype)
    with torch.inference_mode():
        stream = Rows.new(height, width, channels, torch.zeros(n))
        branch = Rows.new(height, width, channels, torch.zeros(n, dtype=dtype))
        kernels.place(*branch.writes(), *convolution(stream, kernels.spread))
        kernels.add(*stream.writes(), *convolution(branch, kernels.spread))
        product = branch.inside.flatten(0, 1).clone()
        kernels.accumulate(stream.inside.flatten(0, 1), product, convolution.bias)


class _Memory:
    """Float32 memory for the identity path, kept between calls; what is taken replaces what was taken before."""

    def __init__(self) -> None:
        self._elements = torch.empty(0)

    def rows(self, height: int, width: int, channels: int) -> Rows:
        """Return a map of undefined values."""
        n = winograd.rows_with_border(height) * width * channels
        if len(self._elements) < n:
            self._elements = torch.empty(n)
        return Rows.new(height, width, channels, self._elements)


class _Linear:
    """A 1×1 convolution, as a product of matrices."""

    def __init__(self, convolution: nn.Module, dtype: torch.dtype, gain: float = 1.0) -> None:
        weight, bias = _weights(convolution)
        self.weight = (weight[:, :, 0, 0] * gain).to(dtype).contiguous()
        self.bias = (bias * gain).to(dtype)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return (…,n_out) for (…,n_in), written to `out` if that is given."""
        if out is None:
            return F.linear(x, self.weight, self.bias)
        torch.addmm(self.bias, x.flatten(0, -2), self.weight.T, out=out.flatten(0, -2))
        return out


class _Branch:
    """What the blocks of encoder and decoder share: the residual path's convolutions, with post_gain folded in."""

    def __init__(self, block: Block, dtype: torch.dtype, kernels: _Kernels, memory: _Memory) -> None:
        self.dtype, self.kernels, self.memory = dtype, kernels, memory
        self.skip = None if isinstance(block.id_path, nn.Identity) else _Linear(block.id_path, torch.float32)

    def convolution(self, block: Block, number: int, gain: float = 1.0) -> Convolution3x3:
        """Return one of the residual path's 3×3 convolutions, with its output times `gain`."""
        weight, bias = _weights(block.res_path.get_submodule(f"conv_{number}"))
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


class _EncoderBlock(_Branch):
    """A block of the encoder: kernels of 3, 3, 3 and 1."""

    def __init__(self, block: Block, dtype: torch.dtype, kernels: _Kernels, memory: _Memory) -> None:
        super().__init__(block, dtype, kernels, memory)
        self.convolutions = [self.convolution(block, number) for number in (1, 2, 3)]
        self.last = _Linear(block.res_path.get_submodule("conv_4"), dtype, block.post_gain)

    def __call__(self, x: Rows) -> Rows:
        """Return the block's output, which replaces its input where both have the same size."""
        h = x
        for convolution in self.convolutions:
            h = self.convolved(h, convolution)
        if self.skip is not None:
            y = self.memory.rows(x.height, x.padded.shape[1], len(self.skip.bias))
            self.skip(x.inside, out=y.inside)
            x = y
        for band_x, band_h in zip(_bands(x.inside), _bands(h.inside, like=x.inside), strict=True):
            y_NC = band_h.flatten(0, 1) @ self.last.weight.T
            self.kernels.accumulate(band_x.flatten(0, 1), y_NC, self.last.bias)
        return x


class _DecoderBlock(_Branch):
    """A block of the decoder: kernels of 1, 3, 3 and 3.

    Args:
        block: the block.
        enlarge: its input is to be enlarged to double first.
        dtype: of the branch.
        kernels: compiled.
        memory: of the identity path.
    """

    def __init__(self, block: Block, enlarge: bool, dtype: torch.dtype, kernels: _Kernels, memory: _Memory) -> None:
        super().__init__(block, dtype, kernels, memory)
        self.enlarge = enlarge
        self.first = _Linear(block.res_path.get_submodule("conv_1"), dtype)
        self.convolutions = [self.convolution(block, number) for number in (2, 3)]
        self.last = self.convolution(block, 4, block.post_gain)

    def __call__(self, x: Rows) -> Rows:
        """Return the block's output, which replaces its input."""
        height, width = x.height, x.padded.shape[1]
        h = self.new(height, width, len(self.first.bias))
        for band_x, band_h in zip(_bands(x.inside), _bands(h.inside, like=x.inside), strict=True):
            band_h.copy_(self.first(band_x.relu().to(self.dtype)))
        if self.skip is not None:
            skipped = self.skip(x.inside)
            factor = 2 if self.enlarge else 1
            x = self.memory.rows(factor * height, factor * width, skipped.shape[-1])
            _enlarge(skipped, x.inside)
        if self.enlarge:
            small, h = h, self.new(2 * height, 2 * width, h.padded.shape[2])
            _enlarge(small.inside, h.inside)
        for convolution in self.convolutions:
            h = self.convolved(h, convolution)
        self.kernels.add(*x.writes(), *self.last(h, self.kernels.spread))
        x.clear_border()
        return x


class _FastEncoder:
    """Pictures to tokens, one picture after the other."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype, kernels: _Kernels) -> None:
        self.memory = _Memory()
        self.downsampling = 2 ** sum(not isinstance(layer, Block) for layer in _layers(encoder))
        weight, self.input_bias = _weights(encoder.blocks.get_submodule("input"))
        # of a patch of 7 rows of 7 pixels of 3 colours
        self.input_weight = weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
        self.layers = [
            _EncoderBlock(layer, dtype, kernels, self.memory) if isinstance(layer, Block) else self._pooled
            for layer in _layers(encoder)
        ]
        self.choice = _Choice(encoder.blocks.get_submodule("output.conv"))

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
        for band_x, band_patches in zip(_bands(x.inside), _bands(patches, like=x.inside), strict=True):
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
            torch.empty(winograd.rows_with_border(height // 2) * (width // 2) * channels),
        )
        pairs = torch.maximum(x.inside[0::2], x.inside[1::2])
        torch.maximum(pairs[:, 0::2], pairs[:, 1::2], out=y.inside)
        return y


class _FastDecoder:
    """Tokens to pictures, one picture after the other."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, kernels: _Kernels) -> None:
        self.memory = _Memory()
        weight, bias = _weights(decoder.blocks.get_submodule("input"))
        self.codebook = weight[:, :, 0, 0].T + bias
        self.downsampling = 2 ** sum(not isinstance(layer, Block) for layer in _layers(decoder))
        self.blocks: list[_DecoderBlock] = []
        enlarge = False
        for layer in _layers(decoder):
            if isinstance(layer, Block):
                self.blocks.append(_DecoderBlock(layer, enlarge, dtype, kernels, self.memory))
            enlarge = not isinstance(layer, Block)
        self.output = _Linear(decoder.blocks.get_submodule("output.conv"), torch.float32)
        # the locations of the colours; the scales are not needed
        self.output.weight, self.output.bias = self.output.weight[:3], self.output.bias[:3]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return (B,3,H,W) float32 in [0, 1] of (B,Y,X) int64."""
        with torch.inference_mode():
            locations = [self._locations(tokens_YX) for tokens_YX in tokens]
        if not locations:
            return torch.empty(0, 3, *(side * self.downsampling for side in tokens.shape[1:]))
        return unmap_pixels(torch.stack(locations).sigmoid())

    def _locations(self, tokens_YX: Tensor) -> Tensor:
        """Return μ, (3,H,W)."""
        rows_YXC = F.embedding(tokens_YX, self.codebook)
        x = self.memory.rows(*rows_YXC.shape)
        x.inside.copy_(rows_YXC)
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.output(band.relu()) for band in _bands(x.inside)]).permute(2, 0, 1)


class _Choice:
    """The encoder's output convolution and the token with the largest logit, as float32 chooses it.

    For features h, rows w of the weights and their roundings h', w' to bfloat16, h·w differs from h'·w' by at most
    |h|·|w - w'| + |h - h'|·|w'|, besides the rounding of the sum. Logits that are further below the largest one than
    that cannot become the largest; the few others are computed again.
    """

    def __init__(self, convolution: nn.Module) -> None:
        weight, self.bias = _weights(convolution)
        self.weight = weight[:, :, 0, 0].contiguous()
        self.rounded_weight, self.rounded_bias = self.weight.bfloat16(), self.bias.bfloat16()
        norms = self.rounded_weight.float().norm(dim=1)
        # 1e-4: of summing thousands of products in float32, and of these norms
        self.weight_error = float(((self.weight - self.rounded_weight.float()).norm(dim=1) + 1e-4 * norms).max())
        self.weight_norm = float(norms.max())
        self.bias_error = float((self.bias - self.rounded_bias.float()).abs().max())

    def __call__(self, h_NC: Tensor) -> Tensor:
        """Return the tokens (N) of features after the last ReLU, float32."""
        rounded_NC = h_NC.bfloat16()
        logits_NV = F.linear(rounded_NC, self.rounded_weight, self.rounded_bias)
        highest_N1 = logits_NV.amax(dim=1, keepdim=True).float()
        error_N1 = (
            h_NC.norm(dim=1, keepdim=True) * self.weight_error
            + (h_NC - rounded_NC.float()).norm(dim=1, keepdim=True) * self.weight_norm
            + self.bias_error
        )
        # both the largest and a candidate may be off by that, and by half a unit in the last of bfloat16's 8 places
        threshold_N1 = highest_N1 - 2 * error_N1 - 2**-7 * (highest_N1.abs() + error_N1)
        is_candidate_NV = logits_NV >= threshold_N1.bfloat16().float()
        position, token = is_candidate_NV.nonzero(as_tuple=True)
        if len(position) > _MAX_CANDIDATES * len(h_NC):
            return F.linear(h_NC, self.weight, self.bias).argmax(dim=1)
        logits = (h_NC[position] * self.weight[token]).sum(dim=1) + self.bias[token]
        best_N = torch.full((len(h_NC),), -torch.inf).scatter_reduce_(0, position, logits, "amax")
        is_best = logits == best_N[position]
        return torch.empty(len(h_NC), dtype=torch.int64).scatter_(0, position[is_best], token[is_best])


def _weights(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """Return copies of weight and bias in float32, without gradients."""
    assert isinstance(convolution, Conv2d)
    assert convolution.bias is not None
    weight, bias = convolution.weight.detach(), convolution.bias.detach()
    return weight.to(torch.float32, copy=True), bias.to(torch.float32, copy=True)


def _layers(coder: Encoder | Decoder) -> Iterator[nn.Module]:
    """Yield the blocks, and the poolings or enlargements between them, in order."""
    for group in coder.blocks[1:-1].children():
        yield from group.children()


def _bands(x: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split a map (H,W,…) into bands of rows of `_BAND_ELEMENTS`, or into as many rows as `like` is split into."""
    like = x if like is None else like
    bands: tuple[Tensor, ...] = torch.split(x, max(1, _BAND_ELEMENTS // like[0].numel()))
    return bands


def _enlarge(small: Tensor, large: Tensor) -> None:
    """Copy every position of (H,W,C) to those of (H,W,C) or of (2H,2W,C)."""
    factor = len(large) // len(small)
    height, width, channels = small.shape
    large.view(height, factor, width, factor, channels).copy_(small[:, None, :, None])
