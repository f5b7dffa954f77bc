"""Another number of ranks: a checkpoint of ZeRO 1, 2 or 3 shared out anew, through DeepSpeed's universal checkpoints.

First every parameter's pieces are put together on the first rank: its float32 weight and its two moments, a file each.
Then each rank reads its share of them. Muon has one moment only, which stands for the second one, too, on the way.

The comments marked "0.19.8" say what that version gets wrong, and is made good.
"""

import contextlib
import io
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.engine.checkpoints import READ_ERRORS, UNIVERSAL, plain_path, read_tensors, tensors_only
from training.engine.muon import MuonAdamW


def must_reshard(checkpoint: Path, saved: tuple[int, int], now: tuple[int, int]) -> bool:
    """Return whether a checkpoint must be shared out anew before it can be loaded.

    Args:
        checkpoint: the folder, for the message.
        saved: (ranks, ZeRO stage) that saved it.
        now: (ranks, ZeRO stage) of this run.

    Raises:
        ValueError: DeepSpeed cannot move between these stages.
    """
    kinds = {0: (0,), 1: (1, 2), 2: (1, 2), 3: (3,)}  # what the files hold: everything whole, its optimizer shared, all
    (ranks, stage), (ranks_now, stage_now) = saved, now
    if stage_now not in kinds[stage]:
        raise ValueError(
            f"{checkpoint} was saved at ZeRO stage {stage}, this run is at {stage_now}: use --zero-stage "
            f"{' or '.join(map(str, kinds[stage]))}. DeepSpeed moves a run between stages 1 and 2 only"
        )
    return stage > 0 and ranks != ranks_now


def convert(directory: Path, tag: str) -> None:
    """Make the universal form of a checkpoint, in a folder beside it that `directory / UNIVERSAL` names.

    Raises:
        ValueError: it cannot be converted.
        OSError: it cannot be written; a conversion needs about as much space as the checkpoint, twice.
    """
    from deepspeed.checkpoint import ds_to_universal

    folder = directory / UNIVERSAL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with plain_path(directory) as plain, tensors_only(), contextlib.redirect_stdout(io.StringIO()):
            arguments = Namespace(
                input_folder=str(plain / tag),
                output_folder=str(plain / UNIVERSAL / tag),
                num_extract_workers=1,  # more would be processes, which know nothing of `tensors_only`
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            with contextlib.redirect_stderr(io.StringIO()), _scalars_of_one_dimension(), _two_moments():
                ds_to_universal.main(arguments)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except READ_ERRORS as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the checkpoint {directory / tag} cannot be loaded by another number of ranks ({reason}): start as many "
            "as saved it"
        ) from error


@contextmanager
def _two_moments() -> Iterator[None]:
    """While it lasts, all parameters seem to have AdamW's two moments (0.19.8 converts nothing else)."""
    original = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        loaded = original(*arguments, **options)
        optimizer = loaded.get("optimizer_state_dict") if isinstance(loaded, dict) else None
        for name in ("base_optimizer_state", "optimizer_state_dict"):  # of stages 1 and 2, of stage 3
            for state in (optimizer or {}).get(name, {}).get("state", {}).values():
                state.setdefault("exp_avg_sq", state["exp_avg"])
        return loaded

    torch.load = load
    try:
        yield
    finally:
        torch.load = original


@contextmanager
def _scalars_of_one_dimension() -> Iterator[None]:
    """While it lasts, scalars such as CLIP's logit scale are put together, too (0.19.8 cannot concatenate them)."""
    from deepspeed.checkpoint import ds_to_universal

    original = ds_to_universal._group_per_tp_shapes

    def shapes(*arguments: Any) -> dict[str, list[torch.Size]]:
        return {name: [shape or torch.Size([1]) for shape in each] for name, each in original(*arguments).items()}

    ds_to_universal._group_per_tp_shapes = shapes
    try:
        yield
    finally:
        ds_to_universal._group_per_tp_shapes = original


def load_universal(engine: Any, folder: Path, tag: str) -> str | None:
    """Load this rank's share of a converted checkpoint; returns the path, or None if files are missing.

    The caller sees to it that nothing is executed: see `tensors_only`; and puts back the settings of the optimizer's
    groups: 0.19.8 gives all groups of stage 3 the first one's, such as its weight decay.
    """
    optimizer = engine.optimizer.optimizer
    engine._config.load_universal_checkpoint = True
    try:
        with _empty_shares():
            path, _ = engine.load_checkpoint(str(folder), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    # 0.19.8 gives all parameters of stage 3 one and the same step counter, which each of them then advances
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    if isinstance(optimizer, MuonAdamW):
        optimizer.forget_variances()
    return None if path is None else str(path)


@contextmanager
def _empty_shares() -> Iterator[None]:
    """While it lasts, a rank whose share of a group is nothing but padding has nothing to load (0.19.8: IndexError)."""
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

    original = ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir
    ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir = load_shares
    try:
        yield
    finally:
        ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir = original
