"""A run and its folder: where it is, who may train in it, and what is written down when it starts."""

import dataclasses
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig
from training.engine.checkpoints import latest_tag, require_tag
from training.ranks.ranks import Ranks, agree, on_first_rank
from training.run_files import CHECKPOINTS, clear, read_config, read_description, write_config

ORDER = ("seed", "global_batch")
"""Options that decide which samples a step sees; checkpoints keep them, and a resumed run warns of others."""
KEPT = ("shuffle_window", "shuffle_streams")
"""Options of the order of samples that a resumed run has from its checkpoint, whatever it is told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Where a run reads and writes, how it starts, and what identifies it."""

    directory: Path
    """The run's folder."""
    description: dict[str, Any]
    """Identifies the run in config.json: stage, recipe, model. A resumed run must agree."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What a resumed run may be told differently besides its `TrainConfig`; kept in config.json."""
    fresh: bool = False
    """Start anew although there is a checkpoint."""
    resume: bool = False
    """Resume from a checkpoint: there must be one."""
    resume_from: str | None = None
    """Name of the checkpoint to go back to, such as step00000500; None for the newest."""
    flops_per_sample: float | None = None
    """Floating-point operations of a training step per sample, forward and backward; None if unknown."""

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.directory / CHECKPOINTS

    @property
    def has_run(self) -> bool:
        """Whether the folder holds a run that this one would resume, or has to be refused for."""
        return not self.fresh and latest_tag(self.checkpoints) is not None

    def described(self) -> dict[str, Any]:
        """Return the description as it is read back from config.json."""
        return _read_back(self.description)

    def tag(self) -> str | None:
        """Return the name of the checkpoint to resume from; None for a run from the start.

        Raises:
            ValueError: the run must resume, and the checkpoint is not there.
        """
        if self.resume_from is not None:
            require_tag(self.checkpoints, self.resume_from)
            return self.resume_from
        tag = None if self.fresh else latest_tag(self.checkpoints)
        if tag is None and self.resume:
            raise ValueError(f"no checkpoint in {self.checkpoints} to --resume from: leave it out to start a new run")
        return tag

    def resume_command(self) -> str:
        """Return in words which command resumes this run after an interruption."""
        option = "--fresh" if self.fresh else "--resume-from" if self.resume_from is not None else None
        return f"the same command without {option}" if option else "the same command"


def _read_back(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as it is read back from JSON: tuples become lists, and paths texts."""
    read: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return read


def claim(spec: RunSpec, config: TrainConfig, ranks: Ranks) -> list[str]:
    """Write config.json, after checking that the one that is there describes the same run. Collective.

    Returns:
        The options that a resumed run was told differently before, a line for each.

    Raises:
        ValueError: the folder holds a run of another model or recipe.
    """
    refuse_another_run(spec)
    options = _read_back({"training": dataclasses.asdict(config), "options": spec.options})
    changes = list(changed_options(read_config(spec.directory), options)) if spec.has_run else []
    agree(False, ranks)  # every rank has read the files before the first one writes
    on_first_rank(lambda: _write_config(spec, options, ranks), ranks)
    return changes


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each option that both records of config.json have, and that differs."""
    for part in ("training", "options"):
        old, new = dict(_leaves(before.get(part))), dict(_leaves(now[part]))
        for name in new:
            if name in old and old[name] != new[name] and name not in (*ORDER, *KEPT, "said"):
                yield f"{name} was {old[name]} and is {new[name]} from here on"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in nested mappings, by names such as optimizer.weight_decay."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def refuse_another_run(spec: RunSpec) -> None:
    """Check that the run in the folder, if this one would resume it, is the same.

    Raises:
        ValueError: it is a run of another model or recipe.
    """
    found = read_description(spec.directory) if spec.has_run else None
    if found is not None:
        described = spec.described()
        different = sorted(key for key in described.keys() | found.keys() if described.get(key) != found.get(key))
        if different:
            raise ValueError(
                f"{spec.directory} holds a run with another {' and '.join(different)}: give another --out, the same "
                f"{' and '.join(different)}, or --fresh to train anew over it"
            )


def _write_config(spec: RunSpec, options: Mapping[str, Any], ranks: Ranks) -> None:
    spec.directory.mkdir(parents=True, exist_ok=True)
    if spec.fresh:
        clear(spec.directory)
    record = {
        "run": spec.described(),
        **options,
        "ranks": ranks.size,
        "device": str(ranks.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": _git_commit(),
    }
    write_config(spec.directory, record)


def _git_commit() -> str | None:
    """Return the commit of this code, if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
