"""How fast a run is: the laps of its loop, what its devices could do at best, and their memory."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

GIB = 1 << 30

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
"""TFLOP/s of GPUs whose name has the word: 16-bit tensor cores without sparsity, and float32, as NVIDIA's datasheets of
each say (for the two GeForce, the whitepapers of Ada and Ampere GA102, accumulating in float32). An earlier name wins.
Float32 is that of the ordinary cores, because torch uses TF32 only where it is told to."""

MATMUL_SIZE, MATMUL_ROUNDS = 1024, 5


@dataclass(frozen=True, kw_only=True)
class Lap:
    """The steps between two lines of metrics."""

    steps: int
    elapsed_s: float
    """Seconds of training: validations, checkpoints and sample pictures are not counted."""
    data_wait: float
    """Fraction of them spent waiting for data, in [0, 1]."""


class Timer:
    """Times the loop: laps between two lines of metrics, and what is left."""

    def __init__(self, start: int, steps: int) -> None:
        self.steps = steps
        self.waited_s = 0.0
        """Seconds spent waiting for data since the lap began."""
        self._aside_s = 0.0
        self._lap_from, self._lap_step = time.perf_counter(), start
        self._started_at, self._first_step = time.perf_counter(), start

    def lap(self, done: int) -> Lap:
        """Return the lap that ends with `done` steps done, and begin another."""
        now = time.perf_counter()
        elapsed_s = max(now - self._lap_from - self._aside_s, 1e-9)
        lap = Lap(steps=done - self._lap_step, elapsed_s=elapsed_s, data_wait=min(1.0, self.waited_s / elapsed_s))
        self._lap_from, self._lap_step, self.waited_s, self._aside_s = now, done, 0.0, 0.0
        return lap

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While it lasts, something else than training is done, which no lap counts."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._aside_s += time.perf_counter() - since

    def unit_done(self, done: int) -> None:
        """Forget the first step, which pays for warming up, when estimating what is left."""
        if done == self._first_step + 1:
            self._started_at, self._first_step = time.perf_counter(), done

    def left_s(self, done: int) -> float:
        """Return the estimated seconds until the last step."""
        taken = done - self._first_step
        return (time.perf_counter() - self._started_at) / taken * (self.steps - done) if taken > 0 else 0.0


BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Names that `torch.cpu.get_capabilities` gives to bfloat16 arithmetic of x86 and Arm processors."""


def has_bfloat16_arithmetic(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware.

    A CPU that does not emulates it: a training step of the demonstration's transformer takes ten times as long as in
    float32 (measured on an AMD EPYC of the third generation, which has AVX2 alone).
    """
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BFLOAT16_INSTRUCTIONS)


def peak_flops(device: torch.device, precision: str, given_tflops: float | None = None) -> float | None:
    """Return the floating-point operations per second that a device can do at best, or None where nobody has said.

    That of a CPU is measured, in a fraction of a second, by products of matrices; it is what this process gets of it.

    Args:
        device: of the rank.
        precision: of the run; everything but fp32 computes in 16 bits.
        given_tflops: what the user says it is, 10¹² operations per second.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name(device), precision)
    return _measured_flops(device, torch.float32 if precision == "fp32" else torch.bfloat16)


def gpu_peak_flops(name: str, precision: str) -> float | None:
    """Return the datasheet's floating-point operations per second of a GPU, by the name that CUDA gives it."""
    for word, (half, single) in GPU_PEAKS.items():
        if re.search(rf"\b{re.escape(word)}\b", name) and "Laptop" not in name:
            return (single if precision == "fp32" else half) * 1e12
    return None


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device)
    matrix @ matrix  # memory and threads are there from now on
    fastest_s = float("inf")
    for _ in range(MATMUL_ROUNDS):
        since = time.perf_counter()
        matrix @ matrix
        fastest_s = min(fastest_s, time.perf_counter() - since)
    return 2 * MATMUL_SIZE**3 / max(fastest_s, 1e-9)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most GiB that tensors have taken of a GPU, or where there is none, that this process has taken."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB
