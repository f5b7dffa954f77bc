"""DeepSpeed's configuration of a run: derived from what the run is told, with the user's own JSON merged over it.

DeepSpeed 0.19.8 is pinned: what is always made explicit here is what that version gets wrong by default.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from training.config import TrainConfig

# DeepSpeed's documented top-level options that make sense here; anything else is likelier a typing error than a wish.
_USER_KEYS = frozenset(
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "zero_optimization",
        "bf16",
        "fp16",
        "torch_autocast",
        "data_types",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "comms_logger",
        "flops_profiler",
        "aio",
        "tensorboard",
        "csv_monitor",
        "wandb",
        "disable_allgather",
        "seq_parallel_communication_data_type",
        "timers",
        "compile",
    ]
)
_DECIDED_KEYS = {
    "optimizer": "the recipe",
    "scheduler": "the recipe",
    "checkpoint": "the training loop",
    "use_node_local_storage": "the training loop",
    "activation_checkpointing": "--activation-checkpointing",
}
"""Options of DeepSpeed that are not the user's, and who decides them."""
_OBJECT_KEYS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types")
"""Options whose value is looked into here."""


def read_user_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON of the user's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, a key that is not an option of DeepSpeed or that is not the user's to
            decide, or one of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no DeepSpeed configuration at {path}: --deepspeed-config expects a JSON file")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        message = f"{path} is not valid JSON ({error}): --deepspeed-config expects a DeepSpeed configuration"
        raise ValueError(message) from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}: a DeepSpeed configuration is a JSON object")
    for key in config:
        if key in _DECIDED_KEYS:
            raise ValueError(f"{path} sets {key!r}, which {_DECIDED_KEYS[key]} decides: remove it")
        if key not in _USER_KEYS:
            close = get_close_matches(key, _USER_KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path} sets {key!r}, which is not an option of DeepSpeed here{hint}")
    config = _without_auto(config)
    for key in _OBJECT_KEYS:
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{path} sets {key} to {json.dumps(config[key])}: expected an object, as DeepSpeed does")
    return config


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without the values "auto", which leave a decision to the program, that is, to us."""
    kept = {key: value for key, value in config.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over` in place of its own, nested objects merged."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run: what `config` says, and the user's JSON over it.

    Raises:
        ValueError: the two say different batch sizes, or the user's JSON asks for half precision at stage 0.
    """
    micro, accumulation = config.batch_of(world_size)
    derived: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # Always explicit: DeepSpeed 0.19.8 clips at 1.0 when the key is absent.
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if config.precision == "bf16":
        derived["bf16"] = {"enabled": True}
        if config.zero_stage >= 2:
            derived["data_types"] = {"grad_accum_dtype": "fp32"}
    elif config.precision == "autocast":
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if config.powersgd_rank:
        derived["zero_optimization"] |= {"reduce_scatter": False, "overlap_comm": False}
    if config.deepspeed_config is None:
        return derived
    path = config.deepspeed_config
    user = read_user_config(path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if user.get(key, derived[key]) != derived[key]:
            raise ValueError(
                f"{path} sets {key} to {user[key]}, the run's is {derived[key]}: remove it there, and say the batch "
                "once, with --global-batch and --micro-batch"
            )
    merged = _merge(derived, user)
    if is_half(merged) and merged["zero_optimization"].get("stage", 0) == 0:
        raise ValueError(
            f"{path} asks for half precision at ZeRO stage 0, where DeepSpeed takes a wrong Adam step: set "
            "zero_optimization.stage to 1 or more"
        )
    return merged


def is_half(config: Mapping[str, Any]) -> bool:
    """Return whether a DeepSpeed configuration keeps the weights in half precision."""
    return any(config.get(key, {}).get("enabled") for key in ("bf16", "fp16"))
