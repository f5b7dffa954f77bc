"""Attention alone: ours against fused attention with the dense mask, which computes the same, and causal, which does
not.

Two samples, 8 heads of 64, 256 text and 32×32 image positions; queries, keys and values as views of one projection,
as a layer hands them over.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measure
from benchmarks.measure import Options, Report
from dalle.attention import Attend, Kind, mask, masked_attention
from dalle.sparse_attention import sparse_attention

BATCH, HEADS, D_HEAD, TEXT_LEN, GRID, KERNEL = 2, 8, 64, 256, 32, 11
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "dense")
DENSE, CAUSAL, OURS = "dense mask", "causal", "ours"


def ways(kind: Kind, grid: int) -> dict[str, Attend]:
    """Return the ways to attend, by name: (q, k, v), each (B, H, S, K) -> (B, H, S, K)."""
    return {
        DENSE: partial(masked_attention, mask_SS=mask(kind, TEXT_LEN, grid, KERNEL)),
        CAUSAL: partial(F.scaled_dot_product_attention, is_causal=True),
        OURS: partial(sparse_attention, kind=kind, text_len=TEXT_LEN, grid=grid, kernel=KERNEL),
    }


def runs(attend: Attend, grid: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return a forward pass, and a forward and backward pass."""
    length = TEXT_LEN + grid**2
    qkv_BSXHK = torch.randn(BATCH, length, 3, HEADS, D_HEAD).to(dtype).requires_grad_()
    gradient_BHSK = torch.randn(BATCH, HEADS, length, D_HEAD).to(dtype)

    def output() -> Tensor:
        return attend(*qkv_BSXHK.permute(2, 0, 3, 1, 4).unbind(0))

    def forward() -> Tensor:
        with torch.no_grad():
            return output()

    def both() -> Tensor:
        return torch.autograd.grad(output(), qkv_BSXHK, gradient_BHSK)[0]

    return forward, both


def time(options: Options, report: Report) -> None:
    """Milliseconds of every kind, forward and with backward, in float32 and bfloat16."""
    rows: list[list[str | float]] = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for kind in KINDS:
            subjects: dict[str, Callable[[], object]] = {}
            for way, attend in ways(kind, GRID).items():
                subjects[way], subjects[f"{way}, both"] = runs(attend, GRID, dtype)
            times = measure.in_turns(subjects, options.n(9), warmup=2, label=f"{kind}, {name}")
            report.samples[f"{kind}, {name}"] = times
            ms = {way: 1000 * median(seconds) for way, seconds in times.items()}
            cells = [ms[key] for way in (DENSE, CAUSAL, OURS) for key in (way, f"{way}, both")]
            ratios = [measure.ratio(times, f"{way}, both", f"{OURS}, both") for way in (DENSE, CAUSAL)]
            rows.append([f"{kind}, {name}", *cells, *ratios])
            if dtype == torch.float32 and kind in ("row", "column"):
                what = f"attention, {kind}, forward + backward, float32, B={BATCH}"
                report.line(what, "dense-masked SDPA", ratios[0], 2.8)
                report.line(what, "causal SDPA", ratios[1], 1.8)
    columns = ["", *(f"{way}{what}" for way in (DENSE, CAUSAL, OURS) for what in ("", " + backward"))]
    report.table("Attention alone, ms", [*columns, "× dense", "× causal"], rows)


def grids(options: Options, report: Report) -> None:
    """Milliseconds of row attention, forward and backward, by grid."""
    rows = []
    for grid in (16, 32, 48, 64):
        subjects = {way: runs(attend, grid, torch.float32)[1] for way, attend in ways("row", grid).items()}
        times = measure.in_turns(subjects, options.n(3), label=f"row, grid {grid}")
        report.samples[f"row, grid {grid}"] = times
        rows.append([grid, *(1000 * median(times[way]) for way in subjects), measure.ratio(times, DENSE, OURS)])
    report.table("Row attention by grid, forward + backward, ms", ["grid", DENSE, CAUSAL, OURS, "× dense"], rows)


if __name__ == "__main__":
    measure.main("attention", __doc__, {"time": time, "grids": grids})
