"""Resharding: a checkpoint of ZeRO 1, 2 or 3 for another number of ranks, through DeepSpeed's universal checkpoints.

First the pieces of every parameter are joined: its float32 weight and its two moments, a file each. The first rank
leads, and all ranks take apart some of the checkpoint's files, and then join some of the parameters. Then each rank
reads its share. Muon has one moment only, which meanwhile stands for the second one, too.

Comments marked "0.19.8" name errors of that version that are corrected here.
"""

import contextlib
import glob
import io
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from training.engine.checkpoints import READ_ERRORS, UNIVERSAL, first_line, plain_path
from training.engine.muon import MuonAdamW
from training.patches import (
    loading_universal,
    scalars_of_one_dimension,
    shared_conversion,
    tensors_only,
    two_moments,
)
from training.ranks.ranks import Ranks, agree, broadcast, from_all_ranks, on_first_rank


def must_reshard(checkpoint: Path, saved: tuple[int, int], now: tuple[int, int]) -> bool:
    """Return whether a checkpoint must be converted before it can be loaded.

    Args:
        checkpoint: the folder, for the message.
        saved: (ranks, ZeRO stage) that saved it.
        now: (ranks, ZeRO stage) of this run.

    Raises:
        ValueError: DeepSpeed cannot move between these stages.
    """
    kinds = {0: (0,), 1: (1, 2), 2: (1, 2), 3: (3,)}  # of files alike: all whole, the optimizer in parts, all in parts
    (ranks, stage), (ranks_now, stage_now) = saved, now
    if stage_now not in kinds[stage]:
        raise ValueError(
            f"{checkpoint} was saved at ZeRO stage {stage}, this run is at {stage_now}: use --zero-stage "
            f"{' or '.join(map(str, kinds[stage]))}. DeepSpeed moves a run between stages 1 and 2 only"
        )
    return stage > 0 and ranks != ranks_now


def convert(directory: Path, tag: str, ranks: Ranks) -> None:
    """Write the universal form of a checkpoint to the folder `directory / UNIVERSAL`. Collective.

    Raises:
        ValueError: it cannot be converted.
        OSError: it cannot be written; it needs about twice the space of the checkpoint. On other ranks than the first:
            that failed.
    """
    path = Path(broadcast(directory.resolve(), ranks) or directory)
    # the other ranks see neither a link of a plain name, which the first one makes on its host, nor its local disk
    cannot_share = glob.escape(str(path)) != str(path) or agree(not path.is_dir(), ranks)
    if cannot_share:
        on_first_rank(lambda: _convert(directory, tag, None), ranks)
        return
    crew = _Crew(ranks)
    if not ranks.is_first:
        crew.serve()
    on_first_rank(lambda: crew.led_by(lambda: _convert(path, tag, crew)), ranks)


class _Crew:
    """All ranks, sharing the work that the first one has."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def led_by(self, action: Callable[[], None]) -> None:
        """Call `action` on the first rank, which calls `do`; then let the others go."""
        try:
            action()
        finally:
            broadcast(None, self._ranks)

    def do(self, work: Callable[[Any], Any], pieces: Iterable[Any], _: int) -> list[Any]:
        """Return what `work` makes of every piece, each on one of the ranks. On the first rank."""
        pieces = list(pieces)
        broadcast((work, pieces), self._ranks)
        return self._share(work, pieces)

    def serve(self) -> None:
        """Do this rank's share until there is no more. On the other ranks."""
        with tensors_only(), two_moments():
            while (given := broadcast(None, self._ranks)) is not None:
                with contextlib.suppress(*READ_ERRORS):  # the first rank is told
                    self._share(*given)

    def _share(self, work: Callable[[Any], Any], pieces: list[Any]) -> list[Any]:
        """Return what `work` makes of all pieces; raises an error of any rank on all of them. Collective."""
        done: list[Any] = []
        error: Exception | None = None
        try:
            for piece in pieces[self._ranks.rank :: self._ranks.size]:
                done.append(work(piece))
                self._ranks.watch.touch()
        except READ_ERRORS as caught:
            error = caught
        answers = from_all_ranks((done, error and first_line(error), isinstance(error, OSError)), self._ranks)
        if error is not None:
            raise error
        for _, problem, is_of_disk in answers:
            if problem is not None:
                raise (OSError if is_of_disk else ValueError)(problem)
        return [one for done, _, _ in answers for one in done]


def _convert(directory: Path, tag: str, crew: _Crew | None) -> None:
    """Convert a checkpoint, with a crew if there is one. On the first rank."""
    from deepspeed.checkpoint import ds_to_universal

    folder = directory / UNIVERSAL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        link = plain_path(directory) if crew is None else contextlib.nullcontext(directory)
        with link as plain, tensors_only(), contextlib.redirect_stdout(io.StringIO()):
            arguments = Namespace(
                input_folder=str(plain / tag),
                output_folder=str(plain / UNIVERSAL / tag),
                num_extract_workers=1,  # the ranks are the workers
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            shared = contextlib.nullcontext() if crew is None else shared_conversion(crew.do)
            with scalars_of_one_dimension(), two_moments(), shared, contextlib.redirect_stderr(io.StringIO()):
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
