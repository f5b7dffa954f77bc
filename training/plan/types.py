"""What a plan says."""

import dataclasses
import json
from dataclasses import dataclass

from dalle.model import DALLEConfig
from training.config import OptimizerKind, Precision
from training.plan.memory_model import Memory
from training.plan.state import Mode, StateBytes

GIB = 1 << 30
RESERVED_FRACTION = 0.08
"""Of a GPU's memory, for the CUDA context, NCCL's buffers and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class ModePlan:
    """One way to share the state, and what it needs."""

    preset: str
    """Name of the preset that trains so."""
    mode: Mode
    """Stage, precision, and what lies in the host's memory."""
    moment: str
    """When the peak of a step is."""
    peak: Memory
    """Bytes on one GPU then, at the plan's micro-batch."""
    total: float
    """Their sum."""
    start: float
    """Bytes on one GPU while training starts, before ZeRO has shared out the model."""
    host: float
    """Bytes in the host's memory, at most, of the first of its ranks."""
    fits: bool
    """Whether the plan's micro-batch fits."""
    totals: dict[int, float]
    """Peak bytes by micro-batch, of start or step."""
    largest_micro_batch: int
    """Of those that divide a GPU's share of the batch, the largest that fits; 0 if none does."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What to train with."""

    preset: str
    """The mode's name."""
    micro_batch: int
    """Samples per GPU and forward pass."""
    reason: str
    """Why, in a line."""
    command: str
    """What to type."""


@dataclass(frozen=True, kw_only=True)
class OtherStage:
    """What the dVAE or CLIP needs, without its activations."""

    parameters: dict[str, int]
    """By part; and "total"."""
    flops_per_sample: float
    """Of forward and backward pass: three times the forward's products and convolutions."""
    precision: Precision
    """Of its run."""
    state: dict[int, StateBytes]
    """Bytes on one GPU, by ZeRO stage."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe needs on a number of GPUs."""

    recipe: str
    purpose: str
    model: DALLEConfig
    """The transformer."""
    gpus: int
    gpu_memory_gib: float
    precision: Precision
    """Of the run; at stage 0 bf16 is autocast."""
    optimizer: OptimizerKind
    """Of the layers' matrices."""
    checkpointing: bool
    """Whether the backward pass recomputes each layer."""
    micro_batch: int
    """Samples per GPU and forward pass."""
    accumulation: int
    """Micro-batches per step."""
    global_batch: int
    steps: int
    parameters: dict[str, int]
    """By group; and "total"."""
    flops_per_sample: float
    """See `flops_per_sample`."""
    sparse_flops_per_sample: float
    """With only the keys of attention that the masks allow; see `training_flops`."""
    mfu: float
    """The fraction of the GPUs' arithmetic that is assumed to be used."""
    peak_tflops: float
    """Of one GPU."""
    modes: tuple[ModePlan, ...]
    """What each way to share the state needs."""
    recommendation: Recommendation | None
    """None if nothing fits."""
    advice: tuple[str, ...]
    """What would fit, where nothing does."""
    dvae: OtherStage
    clip: OtherStage

    @property
    def tokens_per_sample(self) -> int:
        """Positions of the stream."""
        return self.model.stream.length

    @property
    def tokens_per_day(self) -> float:
        """At the assumed fraction of the arithmetic."""
        flops_per_day = self.gpus * self.peak_tflops * 1e12 * self.mfu * 86_400
        return flops_per_day / self.flops_per_sample * self.tokens_per_sample

    @property
    def days(self) -> float:
        """For all steps."""
        return self.steps * self.global_batch * self.tokens_per_sample / self.tokens_per_day

    def as_json(self) -> str:
        """Return everything; sizes are in bytes. `measured` says that CUDA's are not."""
        derived = {
            "flops_per_token": self.flops_per_sample / self.tokens_per_sample,
            "flops_per_step": self.flops_per_sample * self.global_batch,
            "tokens_per_day": self.tokens_per_day,
            "days": self.days,
            "device": "cuda",
            "measured": False,
        }
        return json.dumps(dataclasses.asdict(self) | derived, indent=2)
