"""What training/patches.py replaces is still wrong in the pinned versions: each row names the line that is.

A row that fails says that a version has mended, or moved, what the patch is for: look, and delete the patch.
"""

import importlib
import inspect

import pytest

DEFECTS = [
    ("torch.distributed.constants", "", "default_pg_timeout: timedelta = _DEFAULT_PG_TIMEOUT", "set_group_timeout"),
    ("deepspeed.runtime.bf16_optimizer", "", "see_memory_usage('begin bf16_optimizer', force=True)", "quiet_start"),
    ("deepspeed.comm.torch", "build_shm_op", "builder.load()", "quiet_start"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine._broadcast_model", "p.data.view(torch.uint8)", "any_shape_broadcast"),
    (
        "deepspeed.runtime.zero.partition_parameters",
        "Init._zero_init_param",
        "param.data.view(torch.uint8)",
        "any_shape_broadcast",
    ),
    (
        "deepspeed.runtime.engine",
        "DeepSpeedEngine.clip_fp32_gradients",
        "clip_grad_norm_(parameters=self.module.parameters()",
        "leave_gradients_whole",
    ),
    (  # not a defect: the place where gradients can be changed
        "deepspeed.runtime.engine",
        "",
        "self.buffered_allreduce_fallback(grads=grads, elements_per_buffer=bucket_size)",
        "around_all_reduce",
    ),
    (
        "deepspeed.runtime.engine",
        "",
        "self.optimizer.reduce_gradients(pipeline_parallel=self.pipeline_parallelism)",
        "around_partitioning",
    ),
    ("deepspeed.runtime.engine", "DeepSpeedEngine._copy_recovery_script", "zero_to_fp32.py", "writes_recorded"),
    (
        "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine",
        "TorchCheckpointEngine.load",
        "weights_only=False",
        "tensors_only",
    ),
    (
        "deepspeed.checkpoint.ds_to_universal",
        "",
        'exp_avg_sq=state_groups[param_group_id]["exp_avg_sq"]',
        "two_moments",
    ),
    ("deepspeed.checkpoint.ds_to_universal", "merge_tp_slices", "torch.cat(", "scalars_of_one_dimension"),
    ("deepspeed.checkpoint.ds_to_universal", "_do_parallel_work", "ProcessPoolExecutor", "shared_conversion"),
    (  # not a defect: how it parts one parameter
        "deepspeed.runtime.zero.partition_parameters",
        "Init._convert_to_zero_parameters",
        "self._zero_init_param(param)",
        "parting",
    ),
    (
        "deepspeed.runtime.base_optimizer",
        "ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir",
        "steps[0]",
        "loading_universal",
    ),
]


@pytest.mark.parametrize(("module", "name", "defect", "patch"), DEFECTS)
def test_what_a_patch_replaces_is_still_wrong(module: str, name: str, defect: str, patch: str) -> None:
    found: object = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    assert defect in inspect.getsource(found), f"{module} has changed: is {patch} in training/patches.py still needed?"  # type: ignore[arg-type]


def test_every_patch_has_a_row() -> None:
    patches = importlib.import_module("training.patches")
    functions = {
        name
        for name, value in vars(patches).items()
        if inspect.isfunction(value) and value.__module__ == patches.__name__ and not name.startswith("_")
    }
    assert functions - {"read_tensors"} == {patch for *_, patch in DEFECTS}
