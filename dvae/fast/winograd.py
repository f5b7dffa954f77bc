"""3×3 convolutions with half of the multiplications: Winograd's minimal filtering over rows, F(4,3).

Four rows of the output come from six rows of the input. Along a column of a picture they are the product of two
polynomials, which six values determine. So the input becomes six maps, its values at the points 0, ±3/4, ±4/3 and
infinity (`spread`); each is convolved with a 1×3 kernel, the kernel's values at that point; and the results are
interpolated (`collect`): 6 × 3 products for 4 rows in place of 4 × 9.

Exact but for rounding: in float32 the error is that of a direct convolution (4e-7 of the standard deviation of the
output); in bfloat16, with transforms in float32, about 6e-3 instead of 3e-3. These points rounded best of those tried.
The transforms are many small operations, and pay only if compiled into one pass.

Source: Lavin & Gray 2016, arXiv 1509.09308, 3 and 4, in one dimension; the transforms are Toom-Cook's for these points.

Shapes: H,W height and width  C channels  T tiles of four rows, of which the last may be incomplete  L = W·C.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 4
"""Rows of a tile of the output; the tile of the input has two more."""
_A, _B = 3 / 4, 4 / 3
"""The points are 0, ±_A, ±_B and infinity; with _A · _B = 1 a term of the transforms has the factor 1."""
_A2, _B2 = _A**2, _B**2

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Rows:
    """A map between rows of zeros: one above it; below it, at least one, and enough to complete the last tile."""

    padded: Tensor
    """(1 + 4T + 1,W,C), contiguous."""
    height: int
    """H, rows of the map."""

    @classmethod
    def new(cls, height: int, width: int, channels: int, memory: Tensor) -> Self:
        """Return a map of undefined values inside its rows of zeros.

        Args:
            height: H.
            width: W.
            channels: C.
            memory: one-dimensional; its first elements are used.
        """
        size = (rows_with_border(height), width, channels)
        rows = cls(memory[: size[0] * width * channels].view(size), height)
        rows.clear_border()
        return rows

    @property
    def inside(self) -> Tensor:
        """The map without its border, (H,W,C), contiguous."""
        return self.padded[1 : 1 + self.height]

    def clear_border(self) -> None:
        """Zero the rows outside the map, which writing whole tiles may have changed."""
        self.padded[0].zero_()
        self.padded[1 + self.height :].zero_()

    def reads(self) -> list[Tensor]:
        """Rows 0 … 5 of the input of every tile, each (T,L)."""
        flat = self.padded.flatten(1)
        return [flat[row : row + len(flat) - 5 : TILE] for row in range(TILE + 2)]

    def writes(self) -> list[Tensor]:
        """Rows 0 … 3 of the output of every tile, each (T,L)."""
        flat = self.padded.flatten(1)
        return [flat[1 + row : len(flat) - 1 : TILE] for row in range(TILE)]


def rows_with_border(height: int) -> int:
    """Return how many rows a map of this height has in `Rows`."""
    return 2 + -(-height // TILE) * TILE


def spread(
    d0: Tensor, d1: Tensor, d2: Tensor, d3: Tensor, d4: Tensor, d5: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return the six values of ReLU of the input, each (T,L) in `dtype`, of rows 0 … 5 of every tile."""
    d0, d1, d2, d3, d4, d5 = (d.float().relu() for d in (d0, d1, d2, d3, d4, d5))
    even_a, odd_a = d4 - _B2 * d2, _A * (d3 - _B2 * d1)
    even_b, odd_b = d4 - _A2 * d2, _B * (d3 - _A2 * d1)
    values = (
        d0 - (_A2 + _B2) * d2 + d4,
        even_a + odd_a,
        even_a - odd_a,
        even_b + odd_b,
        even_b - odd_b,
        d1 - (_A2 + _B2) * d3 + d5,
    )
    return tuple(value.to(dtype) for value in values)


def collect(
    m0: Tensor, m1: Tensor, m2: Tensor, m3: Tensor, m4: Tensor, m5: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows 0 … 3 of the output of every tile, float32 (T,L), of the six convolved values and the bias (L)."""
    m0, m1, m2, m3, m4, m5, bias = (m.float() for m in (m0, m1, m2, m3, m4, m5, bias))
    even_a, odd_a = m1 + m2, _A * (m1 - m2)
    even_b, odd_b = m3 + m4, _B * (m3 - m4)
    return (
        m0 + even_a + even_b + bias,
        odd_a + odd_b + bias,
        _A2 * even_a + _B2 * even_b + bias,
        _A2 * odd_a + _B2 * odd_b + m5 + bias,
    )


def place(y0: Tensor, y1: Tensor, y2: Tensor, y3: Tensor, *values: Tensor) -> None:
    """Write ReLU of `collect`'s rows to the rows of a map."""
    for y, row in zip((y0, y1, y2, y3), collect(*values), strict=True):
        y.copy_(row.relu())


def add(y0: Tensor, y1: Tensor, y2: Tensor, y3: Tensor, *values: Tensor) -> None:
    """Add `collect`'s rows to the rows of a map."""
    for y, row in zip((y0, y1, y2, y3), collect(*values), strict=True):
        y.add_(row)


class Convolution3x3:
    """A 3×3 convolution of ReLU of its input, with zeros around it.

    Args:
        weight: (n_out,n_in,3,3).
        bias: (n_out).
        dtype: of the multiplications.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        values = torch.einsum("vi,ocij->vocj", _kernel_values(), weight.double())
        self.weights = [value.unsqueeze(2).to(dtype).contiguous(memory_format=torch.channels_last) for value in values]
        self.bias = bias.to(dtype)

    def __call__(self, x: Rows, spread_kernel: Kernel) -> list[Tensor]:
        """Return arguments of `place` and `add`: the six convolved values, each (T,L), and the bias of every column.

        Args:
            x: the input.
            spread_kernel: `spread`, compiled.
        """
        width, n_in = x.padded.shape[1:]
        convolved = [
            F.conv2d(value.view(1, -1, width, n_in).permute(0, 3, 1, 2), weight, padding=(0, 1))
            for value, weight in zip(spread_kernel(*x.reads(), self.bias.dtype), self.weights, strict=True)
        ]
        return [m[0].permute(1, 2, 0).flatten(1) for m in convolved] + [self.bias.repeat(width)]


def _kernel_values() -> Tensor:
    """Return the matrix (6,3) that turns a column of a kernel into its values at the points."""
    scale_a, scale_b = 2 * _A2 * (_A2 - _B2), 2 * _B2 * (_B2 - _A2)
    rows = [[1.0, 0.0, 0.0]]
    rows += [[1 / scale_a, sign * _A / scale_a, _A2 / scale_a] for sign in (1, -1)]
    rows += [[1 / scale_b, sign * _B / scale_b, _B2 / scale_b] for sign in (1, -1)]
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
