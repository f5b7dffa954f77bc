"""Starts DeepSpeed on a model, which may be whole, or drawn in parts."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from storage.errors import reason_of
from training.engine.deepspeed_config import weight_dtype
from training.engine.parts.drawing import hand_over
from training.patches import any_shape_broadcast, parting, quiet_start
from training.ranks.ranks import Ranks


def start(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    user_path: Path | None,
    ranks: Ranks,
) -> Any:
    """Return DeepSpeed's engine; it compiles no operator at the start, and logs errors only. Collective.

    Args:
        objective: the module that it runs; at stage 3 its parameters may be drawn in parts.
        optimizer: of the parameters.
        config: DeepSpeed's configuration.
        user_path: the user's JSON in it, if there is one.
        ranks: the ranks.

    Raises:
        ValueError: DeepSpeed refuses the user's JSON, or the device lacks the arithmetic of the precision.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.ERROR)
    quiet_start()
    _require_arithmetic(config)
    with any_shape_broadcast():
        if any(parameter.is_meta for parameter in objective.parameters()):
            with _told(user_path):
                take = parting(config)
            hand_over(objective.parameters(), weight_dtype(config), take, ranks)
        with _told(user_path):
            engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False):
        scaler.raise_error_at_min_scale = False  # `fit` stops, and names the checkpoint to go back to
    return engine


@contextmanager
def _told(user_path: Path | None) -> Iterator[None]:
    """Make DeepSpeed's errors of a configuration name the user's JSON; of a lost rank or short memory there are others.

    Raises:
        ValueError: DeepSpeed refuses the JSON.
    """
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except (ValueError, AssertionError, KeyError, TypeError, NotImplementedError, DeepSpeedConfigError) as error:
        if user_path is None:
            raise
        raise ValueError(f"DeepSpeed refuses {user_path}: {reason_of(error, 300)}") from error


def _require_arithmetic(config: Mapping[str, Any]) -> None:
    """Raise ValueError if the device lacks the arithmetic of the half precision that is asked for."""
    from deepspeed import get_accelerator

    device = get_accelerator()
    for name, is_there in (("bf16", device.is_bf16_supported), ("fp16", device.is_fp16_supported)):
        if config.get(name, {}).get("enabled") and not is_there():
            others = "fp32 or autocast" if name == "bf16" else "bf16, autocast or fp32"
            raise ValueError(f"this {device.device_name()} does not compute in {name}: use precision {others}")
