"""The options of a plan; imports no torch, for the command line."""

import math
from dataclasses import dataclass

from training.config import OptimizerKind, Precision


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """GPUs to plan for, and what to plan in place of the recipe's values."""

    gpus: int = 8
    """GPUs that share the work."""
    gpu_memory: float = 80.0
    """Memory of one GPU, GiB."""
    micro_batch: int | None = None
    """Samples per GPU and forward pass; by default the recipe's, or the share of a GPU if that is less."""
    precision: Precision | None = None
    """Precision of the run; by default the recipe's."""
    optimizer: OptimizerKind | None = None
    """Optimizer of the layers' matrices, for which muon needs half of AdamW's moments; by default the recipe's."""
    mfu: float = 0.4
    """Fraction of the GPUs' arithmetic that training is assumed to use, above 0 and at most 1."""
    peak_tflops: float | None = None
    """Arithmetic of one GPU, 10¹² operations a second: 312 for an A100; by default an H100's, 989 (67 in fp32)."""

    def check(self) -> None:
        """Raise ValueError, which names the option, where a value is impossible."""
        if self.gpus < 1:
            raise ValueError(f"--gpus must be at least 1, got {self.gpus}")
        if not 0 < self.gpu_memory < math.inf:
            raise ValueError(f"--gpu-memory must be above 0 GiB, got {self.gpu_memory}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu must be above 0 and at most 1, got {self.mfu}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"--peak-tflops must be above 0, got {self.peak_tflops}")
