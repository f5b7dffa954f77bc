"""What a recipe needs, before anything is allocated: parameters, arithmetic, and bytes per GPU for every ZeRO stage.

The model is constructed on the meta device, so that the 12-billion-parameter recipe is planned in a second on a laptop.
Bytes follow Rajbhandari et al. 2020, section 3 (weights, gradients, optimizer state), and the activations are those
that the backward pass of `dalle/model.py` keeps.
"""

import math
from dataclasses import dataclass

import torch

from dalle.model import DALLE, DALLEConfig
from training.config import Precision, TrainConfig
from training.recipes import RECIPES, Recipe

GIB = 1 << 30
BYTES_OF_ACTIVATIONS = {"fp32": 4, "autocast": 2, "autocast-fp16": 2, "bf16": 2}
RESERVED_FRACTION = 0.08
"""Of a GPU's memory, for the CUDA context, communication buffers and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes that one GPU holds for the model's state."""

    weights: float
    """Parameters in the precision they compute in."""
    gradients: float
    """Gradients, in the precision they are accumulated in."""
    optimizer: float
    """AdamW's two moments, and the float32 master weights where the weights are bfloat16."""

    @property
    def total(self) -> float:
        """Sum of the three."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(n_parameters: int, precision: Precision, zero_stage: int, gpus: int) -> StateBytes:
    """Return what one of `gpus` GPUs holds at a ZeRO stage.

    Stage 1 shares the optimizer's state, stage 2 the gradients too, stage 3 the weights too.

    Raises:
        ValueError: bf16 at stage 0, which training refuses, or fewer than one GPU.
    """
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    if precision == "bf16" and zero_stage == 0:
        raise ValueError("precision bf16 is not trained at ZeRO stage 0")
    weight = 2 if precision == "bf16" else 4
    gradient = 4 if precision != "bf16" or zero_stage >= 2 else 2
    moments = 8 + (4 if precision == "bf16" else 0)
    return StateBytes(
        weights=n_parameters * weight / (gpus if zero_stage >= 3 else 1),
        gradients=n_parameters * gradient / (gpus if zero_stage >= 2 else 1),
        optimizer=n_parameters * moments / (gpus if zero_stage >= 1 else 1),
    )


def activation_bytes(config: DALLEConfig, precision: Precision, micro_batch: int, *, checkpointing: bool) -> float:
    """Return the bytes of activations kept for the backward pass, logits included.

    A block keeps, in units of S·d values: two LayerNorm inputs and outputs (4), q, k, v (3), the attention's output
    (1), the MLP's hidden values before and after the activation (8); with checkpointing only its input, and one
    block's worth while it is recomputed.
    Logits are float32 and kept twice (softmax and gradient).
    """
    stream = config.text_len + config.grid**2
    width = BYTES_OF_ACTIVATIONS[precision]
    block = 16 * micro_batch * stream * config.d_model * width
    boundary = micro_batch * stream * config.d_model * (2 if precision == "bf16" else 4)
    blocks = config.n_layers * boundary + block if checkpointing else config.n_layers * block
    logits = 2 * 4 * micro_batch * (config.text_len * config.text_vocab + config.grid**2 * config.image_vocab)
    return float(blocks + logits)


def flops_per_sample(config: DALLEConfig, n_block_parameters: int) -> float:
    """Return the floating-point operations of a training step per sample, forward and backward.

    6 for each weight of a matrix and position it is applied to: the blocks' at all S positions, the text head's at the
    text's, the image head's at the image's. Attention's own two products, computed for all S² pairs and masked, are
    4·S²·d per layer forward, 12·S²·d with the backward pass.
    """
    n_image = config.grid**2
    stream = config.text_len + n_image
    heads = config.d_model * (config.text_len * config.text_vocab + n_image * config.image_vocab)
    attention = 12.0 * config.n_layers * stream**2 * config.d_model
    return 6.0 * (n_block_parameters * stream + heads) + attention


def plan(recipe: Recipe, gpus: int, gpu_memory_gib: float) -> str:
    """Return the plan of a recipe's transformer, as a text with two tables.

    Args:
        recipe: whose transformer is planned.
        gpus: data-parallel GPUs.
        gpu_memory_gib: memory of one, GiB.

    Raises:
        ValueError: fewer than one GPU, no memory, or GPUs that cannot share the batch evenly.
    """
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    if gpu_memory_gib <= 0:
        raise ValueError(f"--gpu-memory must be above 0 GiB, got {gpu_memory_gib}")
    config, train = recipe.transformer.model, recipe.transformer.train
    with torch.device("meta"):
        groups = DALLE(config).n_parameters()
    flops = flops_per_sample(config, groups["attention"] + groups["mlp"])
    more = " (a third more with checkpointing)" if train.activation_checkpointing else ""
    lines = [
        f"{recipe.name}: {recipe.purpose}",
        "",
        f"  {config.n_layers} layers, width {config.d_model}, {config.n_heads} heads; "
        f"{config.text_len} text + {config.grid}×{config.grid} image positions",
        f"  vocabularies {config.text_vocab:,} + {config.image_vocab:,}; "
        f"batch {train.global_batch}, {train.steps:,} steps, {train.precision}",
        "",
        "  parameters",
        *(f"    {name:<22}{count:>18,}" for name, count in groups.items()),
        "",
        *_memory_table(recipe, groups["total"], gpus, gpu_memory_gib),
        "",
        f"  {flops / 1e12:.2f} TFLOP per sample and training step{more}",
    ]
    return "\n".join(lines)


def _memory_table(recipe: Recipe, n_parameters: int, gpus: int, gpu_memory_gib: float) -> list[str]:
    """Return the lines of the table of bytes per GPU, one for each ZeRO stage."""
    config, train = recipe.transformer.model, recipe.transformer.train
    micro = _micro_batch(train, gpus)
    advice = "" if train.micro_batch in (None, micro) else f"; train with --micro-batch {micro}"
    checkpointing = train.activation_checkpointing
    usable = gpu_memory_gib * (1 - RESERVED_FRACTION) * GIB
    heads = f"{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'total':>9}"
    lines = [
        f"  GiB per GPU on {gpus} GPU{'s' if gpus > 1 else ''} of {gpu_memory_gib:g} GiB, micro-batch {micro}, "
        f"activation checkpointing {'on' if checkpointing else 'off'}{advice}",
        f"    {'':<20}{heads}   largest micro-batch",
    ]
    for zero_stage in range(4):
        # bf16 is not trained at stage 0
        precision: Precision = "autocast" if train.precision == "bf16" and zero_stage == 0 else train.precision
        state = state_bytes(n_parameters, precision, zero_stage, gpus)
        one, two, some = (activation_bytes(config, precision, n, checkpointing=checkpointing) for n in (1, 2, micro))
        largest = int((usable - state.total) // (two - one)) if usable > state.total else 0
        cells = f"{state.weights / GIB:>10.2f}{state.gradients / GIB:>11.2f}{state.optimizer / GIB:>11.2f}"
        cells += f"{some / GIB:>13.2f}{(state.total + some) / GIB:>9.2f}"
        lines.append(f"    ZeRO {zero_stage} {precision:<12}  {cells}   {largest or 'does not fit'}")
    return lines


def _micro_batch(train: TrainConfig, gpus: int) -> int:
    """Return the samples per GPU and forward pass: the recipe's, or fewer where many GPUs share the batch.

    Raises:
        ValueError: the GPUs cannot share the batch evenly.
    """
    share, rest = divmod(train.global_batch, gpus)
    if rest:
        raise ValueError(
            f"{gpus} GPUs cannot share a batch of {train.global_batch} evenly: give --gpus a number that divides it"
        )
    return math.gcd(train.micro_batch or share, share)


def recipe_list() -> str:
    """Return the recipes, a line each."""
    return "\n".join(f"  {name:<12}{make().purpose}" for name, make in RECIPES.items())
