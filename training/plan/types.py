"""The data of a plan: its modes, recommendation and advice."""

import dataclasses
import json
from dataclasses import dataclass

from dalle.model import DALLEConfig
from training.config import OptimizerKind, Precision
from training.plan.costs.checkpoints import Checkpoint, Speeds
from training.plan.costs.communication import Communication, Network
from training.plan.memory_model import Memory
from training.plan.state import Mode, StateBytes

RESERVED_FRACTION = 0.08
"""Fraction of a GPU's memory kept for the CUDA context, NCCL's buffers and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class ModePlan:
    """The bytes that one way to share the state needs."""

    preset: str
    """Name of its preset."""
    mode: Mode
    """ZeRO stage, precision and offload."""
    moment: str
    """Moment of the step's peak; see `moments`."""
    peak: Memory
    """Bytes on one GPU at that moment, at the plan's micro-batch."""
    total: float
    """Sum of `peak`, bytes."""
    start: float
    """Bytes on one GPU while training starts, before ZeRO has shared out the model."""
    sampling: float
    """Bytes on one GPU while sample pictures are drawn."""
    host: float
    """Peak bytes of the first rank in its host's memory."""
    fits: bool
    """Whether the plan's micro-batch fits."""
    totals: dict[int, float]
    """Peak bytes by micro-batch, of start or step."""
    largest_micro_batch: int
    """Largest micro-batch that fits and divides a GPU's share of the batch; 0 if none fits."""
    checkpoint: Checkpoint
    """Bytes and seconds of its checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The settings to train with."""

    preset: str
    """The mode's name."""
    micro_batch: int
    """Samples per GPU and forward pass."""
    reason: str
    """One line."""
    command: str
    """Shell command."""


@dataclass(frozen=True, kw_only=True)
class OtherStage:
    """The needs of the dVAE or CLIP, without activations."""

    parameters: dict[str, int]
    """Count by part, and "total"."""
    flops_per_sample: float
    """Forward and backward pass: three times the forward's products and convolutions."""
    precision: Precision
    """Precision of its run."""
    state: dict[int, StateBytes]
    """Bytes on one GPU, by ZeRO stage."""
    checkpoint: Checkpoint
    """Of its run's stage."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of a recipe on a number of GPUs."""

    recipe: str
    purpose: str
    model: DALLEConfig
    """The transformer."""
    gpus: int
    gpu_memory_gib: float
    precision: Precision
    """Precision of the run; at stage 0 bf16 becomes autocast."""
    optimizer: OptimizerKind
    """Optimizer of the layers' matrices."""
    checkpointing: bool
    """Whether the backward pass recomputes each layer."""
    micro_batch: int
    """Samples per GPU and forward pass."""
    accumulation: int
    """Micro-batches per step."""
    global_batch: int
    steps: int
    parameters: dict[str, int]
    """Count by group, and "total"."""
    flops_per_sample: float
    """See `flops_per_sample`."""
    sparse_flops_per_sample: float
    """The same with only the keys that the masks allow; see `training_flops`."""
    mfu: float
    """Assumed model FLOP/s utilisation, in (0, 1]."""
    peak_tflops: float
    """Peak of one GPU, TFLOP/s."""
    modes: tuple[ModePlan, ...]
    """Each way to share the state, from the least communication to the least memory."""
    recommendation: Recommendation | None
    """None if nothing fits."""
    advice: tuple[str, ...]
    """Settings that would fit, a line each, if nothing does."""
    dvae: OtherStage
    clip: OtherStage
    unclip: dict[str, OtherStage]
    """DALL·E 2's stages, by their commands; empty of a recipe without."""
    checkpoint_every: int
    """Steps between two checkpoints."""
    keep_last: int
    keep_every: int
    disk: Speeds
    """Of the disk and of processes, as assumed or measured."""
    disk_free: float | None
    """Bytes left on the disk of the run; None if none was named."""
    network: Network | None
    """None if no speed was given."""
    communication: tuple[Communication, ...]
    """By way to train; empty without a network."""
    gpu_hour_price: float | None

    @property
    def tokens_per_sample(self) -> int:
        """Positions of the stream."""
        return self.model.stream.length

    @property
    def computing_s(self) -> float:
        """Seconds of a step without communication, at the assumed utilisation."""
        return self.flops_per_sample * self.global_batch / (self.gpus * self.peak_tflops * 1e12 * self.mfu)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all steps, communication left out."""
        return self.days * 24 * self.gpus

    @property
    def tokens_per_day(self) -> float:
        """Tokens trained on in a day, at the assumed utilisation."""
        return 86_400 / self.computing_s * self.global_batch * self.tokens_per_sample

    @property
    def days(self) -> float:
        """Days for all steps."""
        return self.steps * self.computing_s / 86_400

    def as_json(self) -> str:
        """Return the plan as JSON, sizes in bytes; `measured` is false: figures for CUDA are derived."""
        derived = {
            "flops_per_token": self.flops_per_sample / self.tokens_per_sample,
            "flops_per_step": self.flops_per_sample * self.global_batch,
            "tokens_per_day": self.tokens_per_day,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "computing_s": self.computing_s,
            "device": "cuda",
            "measured": False,
        }
        return json.dumps(dataclasses.asdict(self) | derived, indent=2)
