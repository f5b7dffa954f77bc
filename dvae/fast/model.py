"""A copy of a dVAE for use only, several times as fast on a CPU as the model it is made of.

1. The 3×3 convolutions take half of the multiplications, with compiled transforms (winograd.py, kernels.py).
2. The residual branches multiply in `dtype`, bfloat16 by default; the identity path (input convolution, 1×1
   convolutions, the sum itself), both output convolutions and the codebook stay in float32 (blocks.py).
3. The identity path is updated in place, and large results are computed in bands (blocks.py).
4. The logits of the vocabulary are computed in bfloat16, and in float32 for those that may be the largest (choice.py).
5. The 1×1 convolutions that follow an enlargement come before it, and tokens are looked up (coders.py).
"""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from dvae.codec import Codec, CodecConfig
from dvae.fast.coders import FastDecoder, FastEncoder
from dvae.fast.kernels import compiled_kernels
from dvae.model import DVAE, Conv2d, check_images, check_tokens

MIN_WIDTH = 128
"""Smallest `n_hid` for which compiling pays: at 128 up to 1.3 times as fast as the plain model in the same type, at 64
slower, because small convolutions cost less than the calls."""


class FastDVAE:
    """A dVAE's `encode` and `decode` with the same contract; for one thread at a time.

    Args:
        config: the sizes, of a dVAE or another codec.
        encode: `DVAE.encode` for pictures that have been checked.
        decode: `DVAE.decode` for tokens that have been checked.
    """

    def __init__(
        self, config: CodecConfig, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]
    ) -> None:
        self.config = config
        self._encode, self._decode = encode, decode

    def encode(self, images: Tensor) -> Tensor:
        """Return the most likely token of every position; see `DVAE.encode`."""
        check_images(self.config.downsampling, images)
        return self._encode(images)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the mode of the pixels' location; see `DVAE.decode`."""
        check_tokens(self.config.vocab_size, tokens)
        return self._decode(tokens)


def optimised(dvae: Codec, *, dtype: torch.dtype = torch.bfloat16, compile: bool = True) -> FastDVAE:
    """Return a fast copy of a dVAE, which later changes of the dVAE do not reach; other codecs are used as they are.

    On a CPU it is as the module's description says, if the dVAE is wide enough to gain (`n_hid` of at least 128) and
    its encoder's kernels are the paper's. Compiling takes about 20 seconds the first time, then a few, thanks to
    torch's cache on disk. With the default sizes the copy takes 0.7 GiB (in float32 0.9), and a call at most 0.2 GiB,
    of which it keeps half. Other dVAEs, and those on other devices, are copied plainly: weights in `dtype`, in
    channels-last order.

    Args:
        dvae: the model.
        dtype: torch.float32 for the same tokens and pictures but for rounding; torch.bfloat16 to multiply in it.
        compile: False copies plainly in any case; so does a failed compilation, such as without a C++ compiler, after
            a warning.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}, expected torch.float32 or torch.bfloat16")
    if not isinstance(dvae, DVAE):
        return FastDVAE(dvae.config, dvae.encode, dvae.decode)
    config = dvae.config
    on_cpu = next(dvae.parameters()).device.type == "cpu"
    pays = on_cpu and config.n_hid >= MIN_WIDTH and config.encoder_kernel == 3
    kernels = compiled_kernels(dtype) if compile and pays else None
    if kernels is None:
        plain = _plain_copy(dvae, dtype)
        return FastDVAE(dvae.config, plain.encode, plain.decode)
    encode = FastEncoder(dvae.encoder, dtype, kernels)
    decode = FastDecoder(dvae.decoder, dtype, kernels)
    return FastDVAE(dvae.config, encode, decode)


def pictures_at_once(config: CodecConfig, budget_bytes: int) -> int:
    """Return how many pictures `encode` or `decode` can take in memory of this size; at least 1.

    For float32, beside the weights; a compiled `optimised` copy needs the memory of one picture for any number.

    Args:
        config: the sizes.
        budget_bytes: memory of a call.
    """
    return max(1, budget_bytes // config.bytes_per_picture)


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
