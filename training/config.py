"""What a training run is told: optimizer, schedule, batch, precision, and how often to log, validate, sample and save.

One `TrainConfig` per neural stage; the recipes (`training/recipes.py`) hold one for each. A class whose name ends with
Options is a group of the command line's options (`training/cli/`): its docstrings are their help. It checks nothing,
but the configuration that inherits it does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from training.schedules import Schedule, WarmupPlateau

Precision = Literal["fp32", "autocast", "autocast-fp16", "bf16", "fp16"]
OptimizerKind = Literal["adamw", "muon"]
GradientScaling = Literal["none", "per-resblock"]
Offload = Literal["none", "optimizer", "parameters"]
HALF_PRECISIONS: frozenset[Precision] = frozenset({"bf16", "fp16"})
"""Those that keep the weights in half precision."""


MAX_STEPS, MAX_BATCH = 1_000_000_000, 1_000_000
MAX_WORKERS = 256
"""Processes that read for one rank."""
MAX_SEED = 2**63 - 1
"""The largest that torch takes."""


def check_bounds(owner: object, bounds: Mapping[str, tuple[int, int | None]]) -> None:
    """Check whole numbers.

    Args:
        owner: has them as attributes; one that is None is not checked.
        bounds: least and most, by name; None for no most.

    Raises:
        ValueError: one is out of bounds; it is named.
    """
    for name, (least, most) in bounds.items():
        value = getattr(owner, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if value is not None and most is not None and value > most:
            raise ValueError(f"{name} must be at most {most:,}, got {value:,}")


@dataclass(frozen=True, kw_only=True)
class ClippingOptions:
    """Bounds of the optimizer's step."""

    gradient_clipping: float = 4.0
    """Largest global norm of the gradient; 0 for no bound."""
    variance_clip: float | None = None
    """Largest value of AdamW's running variance; by default there is no bound. The paper's is 5 (B.2)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(ClippingOptions):
    """AdamW, or Muon beside it. The defaults are the transformer's of the paper (B.2)."""

    kind: OptimizerKind = "adamw"
    """adamw: all parameters by AdamW, as in the paper. muon: the matrices of the blocks by Muon (not of a dVAE),
    with the same learning rate, weight decay and clipping, and everything else by AdamW: see engine/muon.py."""
    betas: tuple[float, float] = (0.9, 0.96)
    """Decay of AdamW's running mean and variance."""
    momentum: float = 0.95
    """Decay of Muon's running mean."""
    eps: float = 1e-8
    """Added to the square root of the variance."""
    weight_decay: float = 4.5e-2
    """Decoupled weight decay. Matrices and convolutions only: gains, biases and embeddings are exempt."""

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        for name in ("gradient_clipping", "weight_decay", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if self.variance_clip is not None and not self.variance_clip > 0:
            raise ValueError(f"variance_clip must be above 0, or None for no bound, got {self.variance_clip}")


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """How long a run is, and how many samples a step has."""

    steps: int
    """Optimizer steps. Schedules that end at a step, and a warm-up run of the recipe's, are stretched in proportion."""
    global_batch: int
    """Samples per optimizer step, over all ranks."""
    micro_batch: int | None = None
    """Samples per rank and forward pass; by default the global batch ÷ ranks. The rest of the global batch is
    accumulated."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run computes, and by what chance."""

    precision: Precision = "fp32"
    """fp32; autocast (bfloat16 arithmetic, float32 weights); autocast-fp16 (float16 arithmetic in the transformer's
    residual branches, float32 weights); bf16 or fp16 (half-precision weights, float32 masters, ZeRO 1 to 3; fp16 has a
    dynamic loss scale)."""
    seed: int = 0
    """Seed of the weights, the sample order, the augmentation and the noise."""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How samples are read."""

    workers: int = 1
    """Processes that read and augment, per rank; 0 reads in the training process."""
    max_bad_fraction: float = 0.01
    """Fraction of unusable samples above which training stops."""
    shuffle_window: int | None = None
    """Shards that are read, and their samples shuffled, together; 0 for all. By default all of up to a million samples,
    8 shards of more. A run keeps the window that it began with."""
    shuffle_streams: int | None = None
    """Parts of an epoch that are read side by side where there are windows, so that each rank reads the shards of few
    parts. By default up to 64. A run keeps those that it began with."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """How often a run is measured."""

    validate_every: int = 0
    """Steps between two validations; 0 for the end only."""
    validation_samples: int | None = None
    """Validation samples to measure, chosen by chance but always the same; by default all."""
    sample_every: int = 0
    """Steps between two sample pictures; 0 for the end only."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How often a run is saved. The last step and an interruption are saved too."""

    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Keep for good the checkpoints whose step is a multiple of this; 0 for none."""
    stage_dir: Path | None = None
    """Folder on a fast disk of each machine. Checkpoints are written there first, and move to the run's folder while
    training goes on; until one is there, and verified, it does not exist."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """How ranks share the state."""

    preset: str | None = None
    """Precision, ZeRO stage and offloading at once: a name that `dalle-train presets` lists. Options that say otherwise
    are refused."""
    zero_stage: int = 0
    """What ranks share out: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too."""
    offload: Offload = "none"
    """State to keep and update in the CPU's memory: the optimizer (ZeRO 1, 2 or 3), or the parameters too (ZeRO 3)."""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON of your own, merged over what is derived. Options and presets that say otherwise are refused."""


@dataclass(frozen=True, kw_only=True)
class WatchingOptions:
    """What a run logs, and what stops it."""

    log_every: int = 20
    """Steps between two lines of metrics."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well; needs `pip install wandb`."""
    peak_tflops: float | None = None
    """Arithmetic of a rank's device at best, TFLOP/s, for the logged utilisation (MFU); by default known for common
    GPUs, and measured on a CPU."""
    max_skipped_steps: int = 20
    """Steps in a row that may be skipped because a loss or gradient is not finite; more of them stop training."""


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """How the transformer's layers compute."""

    compile: bool = False
    """Compile the layers: faster steps, after a minute or so at the start."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    gradient_scaling: GradientScaling = "none"
    """per-resblock: the paper's gradient scale for each residual branch; needs autocast-fp16 and ZeRO 0 or 1."""
    powersgd_rank: int = 0
    """Rank of the factors as which ranks exchange matrix gradients, at ZeRO 0 or 1; 0 for whole gradients."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    SizeOptions,
    RunOptions,
    ReadingOptions,
    ValidationOptions,
    CheckpointOptions,
    MemoryOptions,
    WatchingOptions,
    LayerOptions,
):
    """One stage's training run."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Its settings."""
    learning_rate: Schedule = field(default_factory=WarmupPlateau)
    """Schedule of the step size."""
    ema_decay: float = 0.99
    """Decay of the averaged weights that are exported."""
    ema_every: int = 25
    """Optimizer steps between two updates of the averaged weights (25 for the paper's transformer, 1 for its dVAE)."""
    said: tuple[str, ...] = ()
    """Names of the fields that the user gave, in options, a preset or a DeepSpeed JSON; the recipe said all others."""

    def __post_init__(self) -> None:
        check_bounds(self, {"steps": (1, MAX_STEPS), "global_batch": (1, MAX_BATCH), "micro_batch": (1, None)})
        check_bounds(self, dict.fromkeys(("log_every", "checkpoint_every", "keep_last", "ema_every"), (1, None)))
        check_bounds(self, {"seed": (0, MAX_SEED), "workers": (0, MAX_WORKERS), "validation_samples": (1, None)})
        check_bounds(self, {"shuffle_window": (0, None), "shuffle_streams": (1, None)})
        check_bounds(self, dict.fromkeys(("validate_every", "sample_every", "keep_every"), (0, None)))
        check_bounds(self, dict.fromkeys(("max_skipped_steps", "powersgd_rank"), (0, None)))
        if not 0 < self.learning_rate.peak < math.inf:
            raise ValueError(f"the highest learning rate must be a number above 0, got {self.learning_rate.peak}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"peak_tflops must be a number above 0, got {self.peak_tflops}")
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of micro_batch ({self.micro_batch})"
            )
        if self.zero_stage not in range(4):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.preset is None and self.deepspeed_config is None:
            self._require_possible_mode()  # else the files may say what is missing: see engine/deepspeed_config.py
            self._require_possible_options()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}")

    def _require_possible_mode(self) -> None:
        """Raise ValueError where precision, ZeRO stage and offloading do not go together."""
        if self.precision in HALF_PRECISIONS and self.zero_stage == 0:
            raise ValueError(
                f"precision {self.precision} needs zero_stage 1, 2 or 3: at stage 0 DeepSpeed's half-precision "
                "optimizer takes a wrong Adam step"
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload optimizer needs zero_stage 1, 2 or 3: at stage 0 there is nothing to offload")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload parameters needs zero_stage 3, got {self.zero_stage}: use offload optimizer")

    def batch_of(self, world_size: int) -> tuple[int, int]:
        """Return (micro_batch, accumulation) for a number of ranks.

        Raises:
            ValueError: the global batch cannot be divided so.
        """
        micro = self.micro_batch if self.micro_batch is not None else self.global_batch // world_size
        if micro < 1 or self.global_batch % (micro * world_size):
            raise ValueError(
                f"global batch {self.global_batch} cannot be shared evenly by {world_size} ranks"
                + (f" in micro-batches of {micro}" if self.micro_batch is not None else "")
                + ": change --global-batch or --micro-batch"
            )
        return micro, self.global_batch // (micro * world_size)

    def _require_possible_options(self) -> None:
        """Raise ValueError where gradient scaling, PowerSGD or compilation does not go with the mode."""
        for option, is_given in (
            ("gradient_scaling per-resblock", self.gradient_scaling == "per-resblock"),
            ("powersgd_rank", self.powersgd_rank > 0),
        ):
            if is_given and self.zero_stage > 1:
                raise ValueError(
                    f"{option} needs zero_stage 0 or 1, got {self.zero_stage}: above, gradients leave a rank while the "
                    "backward pass still runs"
                )
            if is_given and self.offload != "none":
                raise ValueError(f"{option} cannot go with offload {self.offload}: leave one of them out")
        if self.gradient_scaling == "per-resblock" and self.precision != "autocast-fp16":
            raise ValueError(
                f"gradient_scaling per-resblock is for precision autocast-fp16, got {self.precision}: float32 and "
                "bfloat16 have the range to do without"
            )
        if self.precision == "autocast-fp16" and self.compile:
            raise ValueError("precision autocast-fp16 cannot be compiled: leave out compile, or use autocast or bf16")
