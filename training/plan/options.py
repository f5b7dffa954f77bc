"""The options of a plan; imports no torch, for the command line."""

import math
from dataclasses import dataclass
from pathlib import Path

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
    """Fraction of the GPUs' arithmetic that computing is assumed to use, above 0 and at most 1, where recomputed layers
    do not count. Llama 3 reached 0.38 to 0.43 on H100s (arXiv 2407.21783)."""
    peak_tflops: float | None = None
    """Arithmetic of one GPU, 10¹² operations a second: 312 for an A100; by default an H100's, 989 (67 in fp32)."""
    gpu_hour_price: float | None = None
    """Price of one GPU for an hour, in any currency; by default no cost is told."""
    network: float | None = None
    """Speed of a host's network to the other hosts, all its cards together, Gbit/s: adds a table of what GPUs send each
    other in a step, and how long it takes."""
    gpu_link: float = 3600.0
    """Speed from a GPU to another of its host, Gbit/s and direction; by default an H100's NVLink."""
    gpus_per_host: int = 8
    """GPUs of a host."""
    powersgd_rank: int | None = None
    """Rank of PowerSGD's factors to plan for; by default the run's, or else the paper's share of the width."""
    out: Path | None = None
    """Folder of the run to come: the speed of its disk is measured, which takes seconds."""
    disk: float | None = None
    """Speed of the disk for checkpoints, of all ranks together, GB/s; by default what --out measures, or else 2."""

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
        for name in ("gpu_hour_price", "network", "gpu_link", "disk"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        if self.powersgd_rank is not None and self.powersgd_rank < 1:
            raise ValueError(f"--powersgd-rank must be at least 1, got {self.powersgd_rank}")
        if self.gpus_per_host < 1:
            raise ValueError(f"--gpus-per-host must be at least 1, got {self.gpus_per_host}")
        if self.network is not None and self.gpus > self.gpus_per_host and self.gpus % self.gpus_per_host:
            raise ValueError(
                f"--gpus {self.gpus} do not fill hosts of {self.gpus_per_host}: give --gpus-per-host a number that "
                "divides them"
            )
