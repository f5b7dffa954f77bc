"""Keeps a training undisturbed: by other jobs, and by what its caller has set.

One job writes in each stage's run, and none beside one that makes the whole bundle.

The first rank holds the locks (`storage/lock.py`). The stages of `all` and `demo`, in this process or in child
processes, are parts of the job that holds the bundle.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch

from dalle.output.text import Say
from storage.lock import is_locked_by, locked, require_free
from training.ranks.environment import PARENT
from training.ranks.ranks import Ranks, on_first_rank
from training.ranks.watch import end_process
from training.recipes import Recipe
from training.stages.inputs import RUNS, Inputs

ENDING_S = 5.0
"""Seconds to wait for another job: one whose launcher was killed a moment ago still saves."""

Options = ParamSpec("Options")
Made = TypeVar("Made")
Lock = AbstractContextManager[None]


def folder_lock(folder: Path) -> Lock:
    """Return the lock of a folder for a training; one that loses it ends at once, saving nothing."""
    return locked(folder, wait_s=ENDING_S, on_lost=end_process)


@contextmanager
def stage_lock(out: Path, stage: str) -> Iterator[None]:
    """Hold the run of a bundle's stage.

    Raises:
        FolderInUseError: another job trains this stage, or makes the whole bundle.
    """
    runs = out / RUNS
    ours = (os.getpid(), int(os.environ.get(PARENT, "0")))
    with folder_lock(runs / stage):
        if not is_locked_by(runs, ours):
            require_free(runs, wait_s=ENDING_S)
        yield


@contextmanager
def bundle_lock(out: Path) -> Iterator[None]:
    """Hold a whole bundle, for a command that trains all its stages.

    Raises:
        FolderInUseError: another job makes the bundle, or trains one of its stages.
    """
    runs = out / RUNS
    with folder_lock(runs):
        for run in sorted(path for path in runs.iterdir() if path.is_dir()):
            require_free(run, wait_s=ENDING_S)
        yield


@contextmanager
def as_in_a_new_process() -> Iterator[None]:
    """Compute with torch's own settings, whatever the caller's autocast, gradients, default dtype and device are."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def held(lock: Lock, ranks: Ranks) -> Iterator[None]:
    """Hold a lock on the first rank, for all. Collective."""
    with ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(lock), ranks)
        yield


Train = Callable[Concatenate[Recipe, Inputs, Ranks, Say, Options], Made]


def alone_in(stage: str) -> Callable[[Train[Options, Made]], Train[Options, Made]]:
    """Let a stage's training hold its run, from before it reads anything there, and be undisturbed by its caller."""

    def decorate(train: Train[Options, Made]) -> Train[Options, Made]:
        @functools.wraps(train)
        def train_alone(
            recipe: Recipe, inputs: Inputs, ranks: Ranks, say: Say, /, *args: Options.args, **options: Options.kwargs
        ) -> Made:
            with as_in_a_new_process(), held(stage_lock(inputs.out, stage), ranks):
                return train(recipe, inputs, ranks, say, *args, **options)

        return train_alone

    return decorate
