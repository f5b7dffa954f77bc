"""What to train with on some GPUs: the mode, the micro-batch and the command; and what would fit where nothing does."""

import dataclasses
import math
from collections.abc import Iterator

from dalle.output.text import GIB
from training.config import OptimizerKind, Precision
from training.engine.deepspeed_config import PRESETS
from training.plan.memory_model import Run, peak_bytes
from training.plan.state import Mode, modes_of, preset_name
from training.plan.types import RESERVED_FRACTION, ModePlan, Recommendation
from training.recipes import Recipe

GPUS_PER_NODE = 8


def recommended(
    recipe: Recipe, gpus: int, micro_batch: int, modes: tuple[ModePlan, ...], optimizer: OptimizerKind
) -> Recommendation | None:
    """Return the first mode that fits the micro-batch, else the one that fits the largest; None if none fits.

    A smaller micro-batch is preferred to offloading: it costs less time than the way to the host and back.
    """
    on_gpu = [mode for mode in modes if mode.mode.offload == "none" and mode.largest_micro_batch]
    candidates = on_gpu or [mode for mode in modes if mode.largest_micro_batch]
    if not candidates:
        return None
    chosen = next((mode for mode in candidates if mode.fits), None)
    if chosen is None:
        chosen = max(candidates, key=lambda mode: mode.largest_micro_batch)
    samples = micro_batch if chosen.fits else chosen.largest_micro_batch
    if not chosen.fits:
        why = f"micro-batch {micro_batch} does not fit, and of the modes that fit one this takes the largest"
    elif chosen is modes[0]:
        why = "it fits, and every stage only adds communication"
    else:
        why = f"{modes[modes.index(chosen) - 1].preset} does not fit micro-batch {samples}"
    reason = f"{_meaning(chosen.mode)}; {why}"
    command = _command(recipe, chosen, samples, gpus)
    if optimizer != recipe.transformer.train.optimizer.kind:
        command += f" --optimizer {optimizer}"
    return Recommendation(preset=chosen.preset, micro_batch=samples, reason=reason, command=command)


def _meaning(mode: Mode) -> str:
    shared = ("nothing is shared", "the optimizer is shared", "optimizer and gradients are shared", "all is shared")
    placed = {
        "none": "",
        "optimizer": ", the optimizer lies and steps on the CPU",
        "parameters": ", weights and optimizer lie on the CPU",
    }
    return f"{shared[mode.zero_stage]}{placed[mode.offload]}"


def _command(recipe: Recipe, chosen: ModePlan, micro_batch: int, gpus: int) -> str:
    """Return the shell command; several nodes need a hostfile."""
    launcher = f"--num_gpus {gpus}" if gpus <= GPUS_PER_NODE else "--hostfile HOSTS"
    return (
        f"deepspeed {launcher} --no_python --no_local_rank dalle-train transformer {recipe.name} --data SHARDS "
        f"--out RUN {_options(chosen.mode)} --micro-batch {micro_batch}"
    )


def _options(mode: Mode) -> str:
    """Return the options that choose a mode: its preset if there is one, or single options."""
    preset = preset_name(mode)
    if (PRESETS / f"{preset}.json").is_file():
        return f"--preset {preset}"
    offload = "" if mode.offload == "none" else f" --offload {mode.offload}"
    return f"--zero-stage {mode.zero_stage} --precision {mode.precision}{offload}"


def advice(run: Run, precision: Precision, global_batch: int, gpu_memory_gib: float) -> Iterator[str]:
    """Yield settings that would fit, a line each: recomputing layers, more GPUs, larger GPUs."""
    usable = gpu_memory_gib * (1 - RESERVED_FRACTION) * GIB

    def least(run: Run) -> tuple[float, str]:
        runs = (dataclasses.replace(run, mode=mode) for mode in modes_of(precision))
        return min((peak_bytes(one, global_batch, 1), preset_name(one.mode)) for one in runs)

    if not run.checkpointing:
        run = dataclasses.replace(run, checkpointing=True)
        total, preset = least(run)
        if total <= usable:
            yield f"activation checkpointing: {preset} then needs {total / GIB:.1f} GiB at micro-batch 1"
    for gpus in divisors(global_batch):
        if gpus <= run.gpus:
            continue
        total, preset = least(dataclasses.replace(run, gpus=gpus))
        if total <= usable:
            yield f"{gpus} GPUs: {preset} then needs {total / GIB:.1f} GiB at micro-batch 1"
            break
    total, preset = least(run)
    yield f"GPUs of {math.ceil(total / GIB / (1 - RESERVED_FRACTION))} GiB: {preset} needs {total / GIB:.1f} of them"


def divisors(n: int) -> list[int]:
    """Return the numbers that divide n, from 1 to n."""
    return [d for d in range(1, n + 1) if n % d == 0]
