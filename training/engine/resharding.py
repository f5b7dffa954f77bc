"""Resharding: a checkpoint of ZeRO 1, 2 or 3 for another number of ranks, through DeepSpeed's universal checkpoints.

First the first rank joins the pieces of every parameter: its float32 weight and its two moments, a file each. Then each
rank reads its share. Muon has one moment only, which meanwhile stands for the second one, too.

Comments marked "0.19.8" name errors of that version that are corrected here.
"""

import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import Tensor

from training.engine.checkpoints import READ_ERRORS, UNIVERSAL, first_line, plain_path
from training.engine.muon import MuonAdamW
from training.patches import loading_universal, scalars_of_one_dimension, tensors_only, two_moments


def must_reshard(checkpoint: Path, saved: tuple[int, int], now: tuple[int, int]) -> bool:
    """Return whether a checkpoint must be converted before it can be loaded.

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
    """Write the universal form of a checkpoint to the folder `directory / UNIVERSAL`.

    Raises:
        ValueError: it cannot be converted.
        OSError: it cannot be written; it needs about twice the space of the checkpoint.
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
                num_extract_workers=1,  # more would be processes, in which `tensors_only` does not hold
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            with contextlib.redirect_stderr(io.StringIO()), scalars_of_one_dimension(), two_moments():
                ds_to_universal.main(arguments)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except READ_ERRORS as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(
            f"the checkpoint {directory / tag} cannot be loaded by another number of ranks ({first_line(error)}): "
            "start as many as saved it"
        ) from error


def load_universal(engine: Any, folder: Path, tag: str) -> str | None:
    """Load this rank's share of a converted checkpoint; returns the path, or None if files are missing.

    The caller must hold `tensors_only`, and restore the settings of the optimizer's groups: 0.19.8 gives all groups of
    stage 3 those of the first, such as its weight decay.
    """
    optimizer = engine.optimizer.optimizer
    with loading_universal(engine):
        path, _ = engine.load_checkpoint(str(folder), tag=tag)
    # 0.19.8 gives all parameters of stage 3 one step counter, which each of them then advances
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    if isinstance(optimizer, MuonAdamW):
        optimizer.forget_variances()
    return None if path is None else str(path)
