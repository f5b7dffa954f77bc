"""Ways to share a model's state among GPUs, and the bytes that each GPU holds (Rajbhandari et al. 2020, section 3)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dalle.family.transformers import Trained
from training.config import Offload, Precision, TrainConfig
from training.engine.deepspeed_config import resolve
from training.engine.muon import block_matrices
from training.plan.activations import FLOAT, widths

PERSISTENT = 100_000
"""Parameters of a tensor below which stage 3 does not share it (`stage3_param_persistence_threshold`, its default)."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to share the state among GPUs."""

    zero_stage: int
    """0 to 3: nothing is shared, the optimizer, the gradients too, the weights too."""
    precision: Precision
    """Precision of the run."""
    offload: Offload = "none"
    """Part of the state in the host's memory."""

    def __post_init__(self) -> None:
        if self.is_half and self.zero_stage == 0:
            raise ValueError(f"precision {self.precision} is not trained at ZeRO stage 0")
        if self.offload == "optimizer" and self.zero_stage < 2:
            raise ValueError(
                f"`plan` computes offloading of the optimizer for ZeRO stages 2 and 3 only, got {self.zero_stage}"
            )
        if self.offload == "parameters" and self.zero_stage < 3:
            raise ValueError(f"offloading weights needs ZeRO stage 3, not {self.zero_stage}")

    @property
    def is_half(self) -> bool:
        """Whether the weights are of half precision."""
        return widths(self.precision).weight < FLOAT

    @property
    def accumulated(self) -> int:
        """Bytes of an accumulated gradient."""
        return FLOAT if _accumulates_in_float32(self.precision, self.zero_stage) else widths(self.precision).weight

    @property
    def has_whole_gradients(self) -> bool:
        """Whether DeepSpeed keeps a float32 gradient of all weights beside the half-precision one, at all times.

        It does so at stage 1 with float32 accumulation: in its BF16_Optimizer, or as an attribute of the parameters.
        """
        return self.zero_stage == 1 and self.is_half and self.accumulated == FLOAT


@lru_cache
def _accumulates_in_float32(precision: Precision, zero_stage: int) -> bool:
    config = TrainConfig(steps=1, global_batch=1, precision=precision, zero_stage=zero_stage)
    return bool(resolve(config, 1).deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32")


def modes_of(precision: Precision) -> tuple[Mode, ...]:
    """Return the modes to compare, from the least communication to the least memory.

    Stage 0 does not train half precision: that row is autocast.
    """
    return (
        Mode(zero_stage=0, precision=precision if precision == "fp32" else "autocast"),
        Mode(zero_stage=1, precision=precision),
        Mode(zero_stage=2, precision=precision),
        Mode(zero_stage=3, precision=precision),
        Mode(zero_stage=2, precision=precision, offload="optimizer"),
        Mode(zero_stage=3, precision=precision, offload="parameters"),
    )


def preset_name(mode: Mode) -> str:
    """Return the name of the preset of a mode, such as zero2-offload-bf16; at stage 0 the precision's."""
    if mode.zero_stage == 0:
        return mode.precision
    offload = "" if mode.offload == "none" else "-offload"
    return f"zero{mode.zero_stage}{offload}-{mode.precision}"


class _WithoutDrawing(TorchFunctionMode):
    """Skips the drawing of random weights."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build models without values, on the meta device.

    Drawing weights there draws nothing either, but would first load torch's compiler, which takes seconds.
    """
    with torch.device("meta"), _WithoutDrawing():
        yield


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of parameters of a model."""

    total: int
    """All parameters."""
    largest: int
    """Parameters of the largest tensor."""
    persistent: int
    """Parameters of tensors too small for stage 3 to share."""
    matrices: int
    """Parameters of the layers' matrices, which Muon can update."""
    largest_matrix: int
    """Parameters of the largest of these matrices."""

    @classmethod
    def of(cls, model: Trained) -> "Sizes":
        """Return the sizes of a model."""
        counts = [parameter.numel() for parameter in model.parameters()]
        matrices = [matrix.numel() for matrix in block_matrices(model)]
        return cls(
            total=sum(counts),
            largest=max(counts),
            persistent=sum(n for n in counts if n < PERSISTENT),
            matrices=sum(matrices),
            largest_matrix=max(matrices),
        )


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes that one GPU holds for the model's state."""

    weights: float
    """Parameters in the precision they compute in."""
    gradients: float
    """Gradients, in the precision they are accumulated in."""
    optimizer: float
    """AdamW's two moments, or Muon's one, and the float32 weights that the optimizer keeps beside the model's."""

    @property
    def total(self) -> float:
        """Sum of the three."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(n_parameters: int, precision: Precision, zero_stage: int, gpus: int, *, by_muon: int = 0) -> StateBytes:
    """Return the bytes of the state on one of `gpus` GPUs at a ZeRO stage.

    Stage 1 shares the optimizer's state, stage 2 the gradients too, stage 3 the weights too. Stages 1 to 3 keep a
    float32 copy of the weights that a GPU updates, also where the weights are float32: stage 3 of DeepSpeed 0.19.8
    means to do without, but compares a device with its name. Gradients that are shared are float32.

    Args:
        n_parameters: parameters of the model.
        precision: of the run.
        zero_stage: 0 to 3.
        gpus: ranks that share the state.
        by_muon: parameters that Muon updates, with one moment in place of two.

    Raises:
        ValueError: bf16 at stage 0, which training refuses, or fewer than one GPU.
    """
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    mode = Mode(zero_stage=zero_stage, precision=precision)
    has_copy = zero_stage > 0 or mode.is_half
    gradient = FLOAT if zero_stage >= 2 else widths(precision).weight
    return StateBytes(
        weights=n_parameters * widths(precision).weight / (gpus if zero_stage >= 3 else 1),
        gradients=n_parameters * gradient / (gpus if zero_stage >= 2 else 1),
        optimizer=(n_parameters * (8 + (FLOAT if has_copy else 0)) - FLOAT * by_muon)
        / (gpus if zero_stage >= 1 else 1),
    )
