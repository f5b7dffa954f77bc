"""The training step: forward, backward and AdamW on given tokens, ours against DALLE-pytorch and the arithmetic.

Width 512, 8 layers, 8 heads, 256 text and 32×32 image tokens, vocabularies 16,384 and 8,192. All optimizers are
torch's fused AdamW with float32 states. DALLE-pytorch is as shipped: full attention, or its sparse types in turn; its
MLP has 1.5 times the arithmetic of ours, and its vocabularies are one. "bf16" is autocast on float32 weights.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import measure, peers
from benchmarks.measure import MIB, PRODUCTS_FLOPS, Options, Report
from dalle.loss import training_loss
from dalle.model import DALLE, DALLEConfig
from dalle.stream import start_id
from training.plan.flops import training_flops

SHAPE = DALLEConfig(n_layers=8, d_model=512, n_heads=8)
GRIDS = (16, 24, 32, 40)

OURS, BEST, OURS_BF16 = "ours, float32", "ours, best", "ours, bf16"
FULL, SPARSE, SPARSE_BF16 = "DALLE-pytorch, full", "DALLE-pytorch, sparse", "DALLE-pytorch, sparse, bf16"
FLOAT32, BFLOAT16 = "products, float32", "products, bfloat16"

Step = Callable[[], float]
"""One training step; returns the loss."""


def our_step(
    config: DALLEConfig, batch: int, *, bf16: bool = False, compiled: bool = False, device: str = "cpu"
) -> Step:
    """Return our step: float32 in eager mode, or bf16 under autocast, or that with compiled layers, our best."""
    model = DALLE(config).to(device)
    if compiled:
        model.compile_layers()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    text = torch.randint(config.text_vocab, (batch, config.text_len), device=device)
    text[:, 0] = start_id(config.text_vocab)
    image_tokens = torch.randint(config.image_vocab, (batch, config.grid**2), device=device)

    def step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = training_loss(model, text, image_tokens).total
        return _update(loss, optimizer)

    return step


def their_step(config: DALLEConfig, batch: int, attn_types: tuple[str, ...], *, bf16: bool = False) -> Step:
    """Return DALLE-pytorch's step."""
    model = peers.dalle_pytorch(config, attn_types)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
    text = torch.randint(1, config.text_vocab, (batch, config.text_len))
    image_tokens = torch.randint(config.image_vocab, (batch, config.grid**2))

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(text, image_tokens, return_loss=True)
        return _update(loss, optimizer)

    return step


def _update(loss: Any, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


STEPS: dict[str, Callable[[DALLEConfig, int], Step]] = {
    FULL: lambda config, batch: their_step(config, batch, ("full",)),
    SPARSE: lambda config, batch: their_step(config, batch, peers.SPARSE_TYPES),
    SPARSE_BF16: lambda config, batch: their_step(config, batch, peers.SPARSE_TYPES, bf16=True),
    OURS: our_step,
    OURS_BF16: lambda config, batch: our_step(config, batch, bf16=True),
    BEST: lambda config, batch: our_step(config, batch, bf16=True, compiled=True),
}
"""What is compared, by name; benchmarks/memory.py looks here, too."""


def time(batch: int, options: Options, report: Report) -> None:
    """Seconds of a step, and what bounds them."""
    flops = training_flops(SHAPE)
    report.notes.append(f"floor: {flops / 1e9:.0f} GFLOP a sample, divided by the rate of a 2048³ matrix product")
    steps: dict[str, Callable[[], object]] = {name: make(SHAPE, batch) for name, make in STEPS.items()}
    steps |= {FLOAT32: measure.products(torch.float32), BFLOAT16: measure.products(torch.bfloat16)}
    times = measure.in_turns(steps, options.n(5), limit_s=60.0 * batch, label=f"step, {batch} a batch")
    report.samples[f"step, batch {batch}"] = times
    seconds = {name: median(values) for name, values in times.items()}
    rows: list[list[measure.Cell]] = [
        [name, seconds[name], batch / seconds[name], *(measure.ratio(times, peer, name) for peer in (FULL, SPARSE))]
        for name in STEPS
    ]
    columns = ["", "s/step", "samples/s", f"× {FULL}", f"× {SPARSE}"]
    report.table(f"Training step, batch {batch}", columns, rows)
    what = f"training step, float32, B={batch}"
    report.line(what, FULL, measure.ratio(times, FULL, OURS), 2.8)
    report.line(what, SPARSE, measure.ratio(times, SPARSE, OURS), 2.2)
    report.line(what, "arithmetic floor", _fraction(times, OURS, FLOAT32, batch), 0.8, unit=" of it")
    what = f"training step, our best, B={batch}"
    report.line(what, SPARSE, measure.ratio(times, SPARSE, BEST), 4.5)
    report.line(what, SPARSE_BF16, measure.ratio(times, SPARSE_BF16, BEST), 3.0)
    report.line(what, "bf16 floor", _fraction(times, BEST, BFLOAT16, batch), 0.7, unit=" of it")


def _fraction(times: measure.Times, name: str, product: str, batch: int) -> float:
    """Return the median share of a step's time that its operations need at the rate of large matrix products."""
    work = batch * training_flops(SHAPE) / PRODUCTS_FLOPS
    return median(work * floor / seconds for floor, seconds in zip(times[product], times[name], strict=True))


def memory(options: Options, report: Report) -> None:
    """Peak memory of steps of two samples, each in a process of its own."""
    names = (FULL, SPARSE, SPARSE_BF16, OURS, BEST)
    peaks = {name: measure.peak_memory("step", name, SHAPE.grid, 2) for name in names}
    rows: list[list[measure.Cell]] = [[name, peak / MIB, peak / peaks[FULL]] for name, peak in peaks.items()]
    report.table("Peak memory of the training step, batch 2", ["", "MiB", f"of {FULL}"], rows)
    for peer in (FULL, SPARSE):
        report.line("peak memory, float32, B=2", peer, peaks[OURS] / peaks[peer], 0.5, at_most=True, unit=" of it")


def grids(options: Options, report: Report) -> None:
    """Time and memory of a step of one sample at other grids."""
    names = (FULL, OURS)
    rows: list[list[measure.Cell]] = []
    for grid in GRIDS:
        config = DALLEConfig(n_layers=8, d_model=512, n_heads=8, grid=grid)
        times = measure.in_turns({name: STEPS[name](config, 1) for name in names}, options.n(2), label=f"grid {grid}")
        report.samples[f"grid {grid}"] = times
        peaks = [measure.peak_memory("step", name, grid, 1) for name in names]
        seconds = [median(times[name]) for name in names]
        rows.append([grid, *seconds, *(peak / MIB for peak in peaks)])
    columns = ["grid", *(f"{name}, s" for name in names), *(f"{name}, MiB" for name in names)]
    report.table("Training step by grid, batch 1", columns, rows)
    for i, name in enumerate(names):
        for plot, column in (("grid-time", 1 + i), ("grid-memory", 3 + i)):
            y = [float(row[column] or 0) for row in rows]
            report.series.append(measure.Series(plot=plot, name=name, x=[float(g) for g in GRIDS], y=y))


PARTS: dict[str, Callable[[Options, Report], None]] = {
    "batch-1": partial(time, 1),
    "batch-2": partial(time, 2),
    "memory": memory,
    "grids": grids,
}


if __name__ == "__main__":
    measure.main("train_step", __doc__, PARTS)
