"""How fast a run is: intervals of its loop, the peak FLOP/s of its devices, and their memory."""

import math
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dalle.output.text import GIB
from training.config import TrainConfig
from training.ranks.ranks import Ranks, mean_over_ranks

GPU_PEAKS = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "A40": (149.7, 37.4),
    "A10": (125, 31.2),
    "RTX A6000": (154.8, 38.7),
    "GeForce RTX 4090": (165.2, 82.6),
    "GeForce RTX 3090": (71, 35.6),
    "V100-SXM2": (125, 15.7),
    "T4": (65, 8.1),
}
"""TFLOP/s of GPUs whose name has the word: 16-bit tensor cores without sparsity, and float32, from NVIDIA's datasheets
(for the two GeForce, the whitepapers of Ada and Ampere GA102, accumulating in float32). An earlier name wins. Float32
counts the ordinary cores, because torch uses TF32 only where it is told to."""

MATMUL_SIZE, MATMUL_ROUNDS = 1024, 5


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The steps between two lines of metrics."""

    steps: int
    elapsed_s: float
    """Seconds of training, without validations, checkpoints and sample pictures."""
    data_wait: float
    """Fraction of them spent waiting for data, in [0, 1]."""


class Timer:
    """Times the loop: intervals between two lines of metrics, and the time that is left."""

    def __init__(self, start: int, steps: int) -> None:
        self.steps = steps
        self._waited_s = self._paused_s = 0.0
        self._since, self._since_step = time.perf_counter(), start
        self._started_at, self._first_step = time.perf_counter(), start

    def interval(self, done: int) -> Interval:
        """Return the interval that ends with `done` steps done, and begin another."""
        now = time.perf_counter()
        elapsed_s = max(now - self._since - self._paused_s, 1e-9)
        data_wait = min(1.0, self._waited_s / elapsed_s)
        interval = Interval(steps=done - self._since_step, elapsed_s=elapsed_s, data_wait=data_wait)
        self._since, self._since_step, self._waited_s, self._paused_s = now, done, 0.0, 0.0
        return interval

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within as waiting for data."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time within out of every interval."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - since

    def step_done(self, done: int) -> None:
        """Leave the first step, which pays for warming up, out of the estimate of the time that is left."""
        if done == self._first_step + 1:
            self._started_at, self._first_step = time.perf_counter(), done

    def left_s(self, done: int) -> float:
        """Return the estimated seconds until the last step."""
        n_timed = done - self._first_step
        return (time.perf_counter() - self._started_at) / n_timed * (self.steps - done) if n_timed > 0 else 0.0


BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Names that `torch.cpu.get_capabilities` gives to bfloat16 arithmetic of x86 and Arm processors."""


def has_bfloat16_arithmetic(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware.

    Other CPUs emulate it: a training step of the demonstration's transformer takes ten times as long as in
    float32 (measured on an AMD EPYC of the third generation, which has AVX2 alone).
    """
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BFLOAT16_INSTRUCTIONS)


def total_peak_flops(config: TrainConfig, ranks: Ranks) -> float | None:
    """Return the peak FLOP/s of all ranks' devices together, or None if that of one is unknown. Collective."""
    here = peak_flops(ranks.device, config.precision, config.peak_tflops)
    total = mean_over_ranks(torch.tensor(here or math.nan, dtype=torch.float64, device=ranks.device), ranks).item()
    return total * ranks.size if math.isfinite(total) else None


def peak_flops(device: torch.device, precision: str, given_tflops: float | None = None) -> float | None:
    """Return the peak FLOP/s of a device, or None if unknown.

    Measures a CPU, in a fraction of a second, by products of matrices: this process's share of it.

    Args:
        device: of the rank.
        precision: of the run; everything but fp32 computes in 16 bits.
        given_tflops: the user's value, in TFLOP/s, instead.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name(device), precision)
    return _measured_flops(device, torch.float32 if precision == "fp32" else torch.bfloat16)


def gpu_peak_flops(name: str, precision: str) -> float | None:
    """Return the FLOP/s of a GPU's datasheet, by the name that CUDA gives it; None if it is not in `GPU_PEAKS`."""
    for word, (half, single) in GPU_PEAKS.items():
        if re.search(rf"\b{re.escape(word)}\b", name) and "Laptop" not in name:
            return (single if precision == "fp32" else half) * 1e12
    return None


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device)
    matrix @ matrix  # allocates memory and starts threads
    fastest_s = float("inf")
    for _ in range(MATMUL_ROUNDS):
        since = time.perf_counter()
        matrix @ matrix
        fastest_s = min(fastest_s, time.perf_counter() - since)
    return 2 * MATMUL_SIZE**3 / max(fastest_s, 1e-9)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of tensors on a GPU, or of this process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB
