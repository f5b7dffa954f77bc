"""All attributes of DeepSpeed 0.19.8 and torch 2.13 that are replaced, each with its reason.

tests/training/test_patches.py names the defects, and fails when another version mends one. Most patches are context
managers: outside of them the libraries are as they were.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

WRITE_ERRORS = (OSError, RuntimeError)
"""Errors of torch for a file that cannot be written; its zip writer raises a RuntimeError when the disk is full."""


@contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes, given as (owner, name, value), while it lasts."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


# ---- starting -----------------------------------------------------------------------------------------------


def set_group_timeout(timeout: timedelta) -> None:
    """Set the timeout of process groups that DeepSpeed makes; the defaults are 30 minutes, and 10 with NCCL."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)


def quiet_start() -> None:
    """Keep DeepSpeed from printing memory at every log level, and from compiling at the start.

    On a CPU it compiles a shared-memory all-reduce, which takes 27 s, hangs for ever on a stale lock, and only serves
    inference.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    if deepspeed.get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__ = {}


@contextmanager
def any_shape_broadcast() -> Iterator[None]:
    """Broadcast the first rank's weights whatever their shape and memory layout.

    DeepSpeed views them as bytes, which fails for a scalar, such as CLIP's logit scale, and for channels last.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    def broadcast(engine: Any) -> None:
        for parameter in engine.module.parameters():
            dist.broadcast(parameter.data, src=0)

    def partition(init: Any, parameter: Any) -> None:  # of stage 3
        init._convert_to_deepspeed_param(parameter)
        parameter.data = parameter.data.contiguous()
        dist.broadcast(parameter.data, src=0)
        parameter.partition()

    with _replaced((DeepSpeedEngine, "_broadcast_model", broadcast), (Init, "_zero_init_param", partition)):
        yield


def parting(config: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """Return a function that leaves each rank its part of a parameter, as stage 3 itself does with a whole model.

    To be used within `any_shape_broadcast`.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import Init

    deepspeed.init_distributed()  # without it, the configuration is checked for a single rank
    init = Init(module=nn.Module(), config_dict_or_path=config)

    def leave_part(parameter: nn.Parameter) -> None:
        init._convert_to_zero_parameters([parameter])

    return leave_part


def leave_gradients_whole(engine: Any) -> None:
    """Keep an engine at stage 0 from clipping: it would compute the norm once more, and not return it."""
    engine.clip_fp32_gradients = lambda: None


# ---- gradients ----------------------------------------------------------------------------------------------

GradientOf = Callable[[Any], Tensor | None]
"""Returns the gradient of a parameter."""


def around_all_reduce(engine: Any, change: Callable[[GradientOf], None], *, is_reduction: bool) -> None:
    """Call `change` with the gradients before DeepSpeed takes their mean over the ranks, or in place of that.

    For stage 0, and stage 1 with bfloat16 weights and float32 gradients, which are kept beside `.grad`.
    """
    reduce = engine.buffered_allreduce_fallback
    keeps_float32 = engine.zero_optimization_stage() == 1

    def gradient(parameter: Any) -> Tensor | None:
        if keeps_float32 and parameter._hp_grad is not None:
            return cast(Tensor, parameter._hp_grad.view_as(parameter))
        return cast(Tensor | None, parameter.grad)

    def changed(grads: Any = None, elements_per_buffer: int = 500_000_000) -> None:
        change(gradient)
        if not is_reduction:
            reduce(grads=grads, elements_per_buffer=elements_per_buffer)

    engine.buffered_allreduce_fallback = changed


def around_partitioning(optimizer: Any, change: Callable[[GradientOf], None], *, is_reduction: bool) -> None:
    """Call `change` with the gradients before DeepSpeed gives each rank its part of their mean, or to take the mean.

    For stage 1.
    """
    reduce = optimizer.reduce_gradients

    def changed(pipeline_parallel: bool = False) -> None:
        change(optimizer.get_gradient_for_reduction)
        reduce(pipeline_parallel=pipeline_parallel)

    def as_it_is(tensor: Tensor, *_: object) -> Tensor:
        return tensor

    optimizer.reduce_gradients = changed
    if is_reduction:
        optimizer.gradient_reduction_w_predivide = as_it_is


# ---- checkpoints --------------------------------------------------------------------------------------------


@contextmanager
def writes_recorded(written: list[Path], errors: list[Exception]) -> Iterator[None]:
    """Append the files that DeepSpeed writes to `written`, and failed writes to `errors`.

    So no rank leaves the others in a barrier. DeepSpeed's scripts beside them, which unpickle freely, are left out.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = TorchCheckpointEngine.save

    def save(engine: object, state_dict: Any, path: str) -> None:
        try:
            original(engine, state_dict, path)
            written.append(Path(path))
        except WRITE_ERRORS as error:
            errors.append(error)

    def no_script(_engine: object, _path: str) -> None:
        pass

    with _replaced((TorchCheckpointEngine, "save", save), (DeepSpeedEngine, "_copy_recovery_script", no_script)):
        yield


@contextmanager
def tensors_only() -> Iterator[None]:
    """Restrict torch.load to tensors and plain containers, so that reading a checkpoint executes nothing.

    DeepSpeed asks for free unpickling wherever it reads or converts a checkpoint.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    original = torch.load

    def load(file: Any, map_location: Any = None, **_: Any) -> Any:
        return original(file, map_location=map_location, weights_only=True)

    known = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]
    with _replaced((torch, "load", load)), torch.serialization.safe_globals(known):
        yield


def read_tensors(path: Path) -> Any:
    """Return the tensors and plain containers of a file of DeepSpeed's, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- another number of ranks --------------------------------------------------------------------------------


@contextmanager
def two_moments() -> Iterator[None]:
    """Give all parameters AdamW's two moments: DeepSpeed converts nothing else, and Muon has one."""
    original = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        loaded = original(*arguments, **options)
        optimizer = loaded.get("optimizer_state_dict") if isinstance(loaded, dict) else None
        for name in ("base_optimizer_state", "optimizer_state_dict"):  # of stages 1 and 2, of stage 3
            for state in (optimizer or {}).get(name, {}).get("state", {}).values():
                state.setdefault("exp_avg_sq", state["exp_avg"])
        return loaded

    with _replaced((torch, "load", load)):
        yield


@contextmanager
def scalars_of_one_dimension() -> Iterator[None]:
    """Treat scalars such as CLIP's logit scale as one-dimensional: DeepSpeed cannot concatenate scalars."""
    from deepspeed.checkpoint import ds_to_universal

    original = ds_to_universal._group_per_tp_shapes

    def shapes(*arguments: Any) -> dict[str, list[torch.Size]]:
        return {name: [shape or torch.Size([1]) for shape in each] for name, each in original(*arguments).items()}

    with _replaced((ds_to_universal, "_group_per_tp_shapes", shapes)):
        yield


@contextmanager
def shared_conversion(do: Callable[[Callable[[Any], Any], Iterable[Any], int], list[Any]]) -> Iterator[None]:
    """Let `do` call a function for each of many pieces of a conversion: DeepSpeed's own workers are new processes.

    In those `tensors_only` would not hold.
    """
    from deepspeed.checkpoint import ds_to_universal

    with _replaced((ds_to_universal, "_do_parallel_work", do)):
        yield


@contextmanager
def loading_universal(engine: Any) -> Iterator[None]:
    """Let an engine load a converted checkpoint.

    A rank whose share of a group is only padding loads nothing; DeepSpeed raises an IndexError.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.utils.tensor_fragment import map_to_flat_opt_states

    def load_shares(zero: Any, groups_name: str, folder: str) -> None:
        common = read_tensors(Path(folder) / "zero" / "optimizer_state.pt")
        zero._load_global_state(common)
        for group, parameters in zip(zero.optimizer.param_groups, getattr(zero, groups_name), strict=True):
            own = [parameter for parameter in parameters if parameter._hp_mapping is not None]
            if not own:
                continue
            names = [os.path.join(folder, "zero", zero.param_names[parameter]) for parameter in own]
            steps = [parameter.load_hp_checkpoint_state(name, 0, 1) for parameter, name in zip(own, names, strict=True)]
            if any(step != steps[0] for step in steps):
                raise ValueError(f"the parameters were trained for different numbers of steps: {steps}")
            if "momentum" in group:  # Muon's: what stood for the second moment
                for parameter in own:
                    del parameter._hp_mapping.optim_fragment["exp_avg_sq"]
            keys = {key for parameter in own for key in parameter._hp_mapping.get_optim_state_keys()}
            flat = group["params"][0]
            map_to_flat_opt_states(flat, parameters, zero.optimizer.state, keys)
            if steps[0] is not None:
                zero.optimizer.state[flat]["step"] = steps[0]

    loader = ZeROOptimizer, "load_hp_checkpoint_state_from_checkpoint_dir", load_shares
    with _replaced(loader, (engine._config, "load_universal_checkpoint", True)):
        yield
