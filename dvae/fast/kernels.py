"""The functions that are compiled, for any size of picture, so that nothing is compiled again.

Grids of at most four rows are the exception: torch.compile treats their one tile of rows as a case of its own.

Shapes: N positions  C channels.
"""

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dvae.fast import winograd
from dvae.fast.winograd import Convolution3x3, Kernel, Rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The compiled functions."""

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


def compiled_kernels(dtype: torch.dtype) -> Kernels | None:
    """Return the kernels, already compiled for `dtype`; None, after a warning, when that fails."""
    kernels = Kernels(
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


def _try_out(kernels: Kernels, dtype: torch.dtype) -> None:
    """Run every kernel once, which compiles it; on a map that is large enough to be worth two threads."""
    height, width, channels = 96, 40, 64
    n = winograd.rows_with_border(height) * width * channels
    # torch.compile notes which tensors are made for inference only and which begin at the same place: as in use
    zeros = functools.partial(torch.zeros, dtype=torch.float32)
    convolution = Convolution3x3(zeros(channels, channels, 3, 3), zeros(channels), dtype)
    with torch.inference_mode():
        stream = Rows.new(height, width, channels, zeros(n))
        branch = Rows.new(height, width, channels, torch.zeros(n, dtype=dtype))
        kernels.place(*branch.writes(), *convolution(stream, kernels.spread))
        kernels.add(*stream.writes(), *convolution(branch, kernels.spread))
        product = branch.inside.flatten(0, 1).clone()
        kernels.accumulate(stream.inside.flatten(0, 1), product, convolution.bias)
