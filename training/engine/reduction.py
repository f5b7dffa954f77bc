"""Gradients between the last backward pass and the optimizer: the paper's recipe, if asked for.

Per-resblock scales are divided out (gradient_scaling.py), then PowerSGD (powersgd.py), or DeepSpeed without it, takes
the mean over ranks. At ZeRO stages 0 and 1 only: above, gradients leave a rank while the backward pass still runs.
training/patches.py replaces two of DeepSpeed's methods for that.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storage.atomic import write_public
from training.config import TrainConfig
from training.engine.gradient_scaling import ResblockScaling, require_transformer, run_in_float16
from training.engine.powersgd import PowerSGD, compressed_names
from training.patches import GradientOf, around_all_reduce, around_partitioning
from training.ranks.ranks import Ranks

SCALES_FILE = "gradient_scales.json"


class Reduction:
    """Gradient scales and PowerSGD of a run, and their files in a checkpoint.

    Args:
        model: the model; under precision autocast-fp16 its residual branches run in float16 from now on.
        config: the run.
        ranks: the ranks.

    Raises:
        ValueError: the model has no residual branches to run in float16.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
        self._model, self._ranks, self._precision = model, ranks, config.precision
        self._scaling: ResblockScaling | None = None
        self._powersgd: PowerSGD | None = None
        if config.gradient_scaling == "per-resblock":
            self._scaling = ResblockScaling(require_transformer(model), ranks)
        elif config.precision == "autocast-fp16":
            run_in_float16(model)
        if config.powersgd_rank:
            parameters = dict(model.named_parameters())
            names = compressed_names(model, config.powersgd_rank)
            self._powersgd = PowerSGD(parameters, names, rank=config.powersgd_rank, seed=config.seed, ranks=ranks)

    def attach(self, engine: Any) -> None:
        """Hook into DeepSpeed's engine.

        Raises:
            ValueError: its configuration, which may be the user's, does not allow it.
        """
        others = [engine.torch_autocast_enabled(), engine.bfloat16_enabled(), engine.fp16_enabled()]
        if self._precision == "autocast-fp16" and any(others):
            raise ValueError("precision autocast-fp16 cannot go with another one in the DeepSpeed JSON: remove that")
        if self._scaling is None and self._powersgd is None:
            return
        option = "--powersgd-rank" if self._powersgd is not None else "--gradient-scaling"
        stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
        if stage > 1:
            raise ValueError(f"{option} needs ZeRO stage 0 or 1, this run's is {stage}")
        if engine.fp16_enabled():
            raise ValueError(
                f"{option} cannot go with DeepSpeed's fp16, whose one loss scale is in the gradients: use "
                "autocast-fp16, autocast or bf16"
            )
        is_reduction = self._powersgd is not None
        if not hasattr(optimizer, "reduce_gradients"):
            around_all_reduce(engine, self._change, is_reduction=is_reduction)
        elif is_reduction and (optimizer.reduce_scatter or optimizer.overlap_comm):
            raise ValueError(f"{option} needs zero_optimization.reduce_scatter and overlap_comm to be false")
        else:
            around_partitioning(optimizer, self._change, is_reduction=is_reduction)

    def _change(self, gradient_of: GradientOf) -> None:
        gradients = _gradients(self._model, gradient_of)
        if self._scaling is not None:
            self._scaling.unscale_(gradients)
        if self._powersgd is not None:
            self._powersgd.reduce_(gradients)

    @property
    def overflowed(self) -> bool:
        """Whether the last step was skipped because a resblock's scale, which has room to fall, was too large."""
        return self._scaling is not None and self._scaling.overflowed

    def metrics(self) -> dict[str, Tensor]:
        """Return the last step's bytes sent by each rank, and the lowest and highest scale."""
        values: dict[str, float] = {}
        if self._scaling is not None:
            scales = self._scaling.rules.values
            values |= {"scale_min": min(scales), "scale_max": max(scales)}
        if self._powersgd is not None:
            sent, full = self._powersgd.bytes_sent, self._powersgd.bytes_full
            values |= {"bytes_sent": sent, "bytes_full": full, "bytes_ratio": sent / full}
        return {name: torch.tensor(value) for name, value in values.items()}

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's files into the folder of a checkpoint; returns them.

        Raises:
            OSError, SafetensorError: it could not be written.
        """
        written = []
        if self._scaling is not None and self._ranks.is_first:
            written.append(folder / SCALES_FILE)
            written[-1].write_text(json.dumps(self._scaling.rules.state()))
        if self._powersgd is not None:
            written.append(_errors_file(folder, self._ranks.rank))
            errors = {name: tensor.contiguous() for name, tensor in self._powersgd.state().items()}
            write_public(written[-1], lambda path: save_file(errors, path))
        return written

    def load(self, folder: Path, n_ranks: int) -> None:
        """Restore from the folder of a checkpoint that `n_ranks` saved; without such files, change nothing.

        Raises:
            OSError, ValueError, SafetensorError: it is damaged, or of another model.
        """
        scales = folder / SCALES_FILE
        if self._scaling is not None and scales.is_file():
            self._scaling.load_state(json.loads(scales.read_text()))
        if self._powersgd is not None and any(_errors_file(folder, rank).is_file() for rank in range(n_ranks)):
            own = [self._ranks.rank] if n_ranks == self._ranks.size else range(n_ranks)
            self._powersgd.load_state(load_file(_errors_file(folder, rank)) for rank in own)


def _errors_file(folder: Path, rank: int) -> Path:
    return folder / f"powersgd_rank{rank:05d}.safetensors"


def _gradients(model: nn.Module, of: GradientOf) -> dict[str, Tensor]:
    """Return the gradients by name, zeros for parameters that had no part in the loss, so that ranks have the same."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = of(parameter)
        if gradient is None:
            gradient = parameter.grad = torch.zeros_like(parameter)
        gradients[name] = gradient
    return gradients
