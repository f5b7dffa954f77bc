"""Runs that faults are compared with: a small data set, the command that trains on it, and the files of a run.

"Nothing lost" means that a run that was hit and resumed has the same metrics at every step as one without a fault,
and the same averaged and unaveraged weights, bit for bit.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jobs import Injection, Job, copy_of
from support import tiny

from dvae import DVAE
from training.recipes import recipe
from training.stages.inputs import Inputs
from training.stages.tokenizer import train_tokenizer

STEPS, CHECKPOINT_EVERY = 18, 4
LAST_SAVED = (STEPS - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY
"""The last step with a checkpoint before the end."""
COMPARED = ("grad_norm", "learning_rate", "bad_samples", "captions_cut", "accuracy")
"""Metrics that are compared, besides all with "loss" in their names; the others depend on the clock or the memory."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault."""

    fault: str
    injected: str
    happened: str
    lost: str
    """"nothing", with the steps that were repeated."""
    passed: bool | None
    """None if it could not be run here."""
    seconds: float
    """Duration in seconds."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault that can be injected."""

    name: str
    injected: str
    run: Callable[["Course", str], tuple[str, str]]
    """Injects it, in runs of this name; returns what happened and what was lost, or raises FaultError."""


class SkippedError(Exception):
    """A fault cannot be injected here."""


class FaultError(AssertionError):
    """A fault did not end as expected."""


def require(condition: object, what: str) -> None:
    """Raise FaultError unless a condition holds."""
    if not condition:
        raise FaultError(what)


class Course:
    """Holds the data set, an untrained bundle, and runs without a fault, each made once."""

    def __init__(self, scratch: Path, *, zero_stage: int = 2) -> None:
        self.scratch, self.zero_stage = scratch, zero_stage
        self.world = tiny.write_world(scratch / "world", 48, size=64)
        chosen = recipe("demo")
        untrained = Inputs(data=[self.world], out=scratch / "untrained")
        train_tokenizer(chosen, untrained, lambda line: None)
        torch.manual_seed(0)
        DVAE(chosen.dvae.model).save(untrained.out / "dvae")
        self._straight: dict[tuple[str, ...], Path] = {}

    def bundle(self, name: str) -> Path:
        """Return a fresh untrained bundle."""
        return copy_of(self.scratch / "untrained", self.scratch / "runs" / name)

    def command(self, bundle: Path, *more: object, data: Path | str | None = None, steps: int = STEPS) -> list[str]:
        """Return the arguments of `dalle-train` that train a bundle's transformer."""
        words: list[object] = ["transformer", "demo", "--data", data or self.world, "--out", bundle, "--steps", steps]
        words += ["--precision", "fp32", "--zero-stage", self.zero_stage, "--log-every", 1, "--global-batch", 4]
        words += ["--checkpoint-every", CHECKPOINT_EVERY, "--validation", self.world / "world-000000.tar"]
        words += ["--validate-every", 6, "--workers", 1, *more]
        return [str(word) for word in words]

    def straight(self, *more: object, ranks: int = 2, **options: Any) -> Path:
        """Return a bundle trained by this command without a fault."""
        key = (str(ranks), *map(str, more), *(f"{name}={value}" for name, value in options.items()))
        if key not in self._straight:
            bundle = self.bundle(f"straight{len(self._straight)}")
            self.finish(self.command(bundle, *more, **options), f"straight{len(self._straight)}", ranks=ranks)
            self._straight[key] = bundle
        return self._straight[key]

    def finish(self, command: list[str], name: str, *, ranks: int = 2, inject: Injection | None = None) -> str:
        """Run a command to its end; return its output.

        Raises:
            FaultError: an exit code is not 0.
        """
        with Job(self.scratch / "logs" / name, command, ranks=ranks, inject=inject) as job:
            codes = job.wait()
            require(codes == [0] * ranks, f"the run ended with {codes}: {job.said()[-600:]}")
            return job.said()


def checkpoints(bundle: Path) -> Path:
    """Return the folder of a bundle's checkpoints."""
    return bundle / "training" / "transformer" / "checkpoints"


def latest(bundle: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 without one."""
    path = checkpoints(bundle) / "latest"
    return int(path.read_text().strip().removeprefix("step")) if path.is_file() else 0


def metrics(bundle: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    path = bundle / "training" / "transformer" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)] if path.is_file() else []


def last_step(bundle: Path) -> int:
    """Return the step of the last complete line of metrics.jsonl; 0 without one."""
    path = bundle / "training" / "transformer" / "metrics.jsonl"
    if not path.is_file():
        return 0
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def metrics_stamp(bundle: Path) -> tuple[int, int] | None:
    """Return a stamp that changes with metrics.jsonl; None while there is no such file."""
    path = bundle / "training" / "transformer" / "metrics.jsonl"
    return (path.stat().st_mtime_ns, path.stat().st_ino) if path.is_file() else None


def in_a_save(bundle: Path, since: float) -> bool:
    """Return whether a checkpoint is being written: not in `latest` yet, and modified after the time `since`."""
    folder = checkpoints(bundle)
    if not folder.is_dir():
        return False
    known = (folder / "latest").read_text().strip() if (folder / "latest").is_file() else ""
    unknown = [path for path in folder.iterdir() if path.is_dir() and path.name.lstrip(".")[:12] > known]
    try:
        return any(file.stat().st_mtime > since for path in unknown for file in (path, *path.rglob("*")))
    except FileNotFoundError:  # it was renamed, or dropped
        return False


def curve(bundle: Path) -> dict[tuple[int, str], dict[str, float]]:
    """Return the compared metrics of every line of metrics.jsonl, by step and split.

    Raises:
        FaultError: a step occurs twice.
    """
    found: dict[tuple[int, str], dict[str, float]] = {}
    for line in metrics(bundle):
        key = (line["step"], line["split"])
        require(key not in found, f"metrics.jsonl has step {key} twice")
        found[key] = {name: value for name, value in line.items() if "loss" in name or name in COMPARED}
    return found


def _tensors(state: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}")


def weights(bundle: Path) -> dict[str, str]:
    """Return digests of the exported weights, and of the unaveraged ones in the last checkpoint."""
    export = (bundle / "dalle" / "model.safetensors").read_bytes()
    found = {"export": hashlib.sha256(export).hexdigest()}
    folder = checkpoints(bundle) / (checkpoints(bundle) / "latest").read_text().strip()
    for path in sorted(folder.rglob("*model_states.pt")):
        state = torch.load(path, weights_only=True, map_location="cpu")
        for name, tensor in _tensors(state["module"]):
            digest = hashlib.sha256(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            found[f"{path.name}{name}"] = digest
    require(len(found) > 1, f"no weights in {folder}")
    return found


def require_equal(bundle: Path, straight: Path) -> None:
    """Check that a run has lost nothing.

    Raises:
        FaultError: something differs; names the first difference.
    """
    found, expected = curve(bundle), curve(straight)
    require(found.keys() == expected.keys(), f"other steps: {sorted(found.keys() ^ expected.keys())[:5]}")
    for key, values in expected.items():
        require(found[key] == values, f"at step {key}: {found[key]} in place of {values}")
    different = [name for name, digest in weights(straight).items() if weights(bundle).get(name) != digest]
    require(not different, f"other weights: {different[:5]}")


def inject(fault: Fault, course: Course, name: str) -> Row:
    """Inject a fault; return its row."""
    started_at = time.monotonic()
    try:
        happened, lost = fault.run(course, name)
        passed: bool | None = True
    except SkippedError as skipped:
        happened, lost, passed = f"not run: {skipped}", "", None
    except (FaultError, TimeoutError, OSError, ValueError, KeyError, IndexError) as error:
        happened, lost, passed = f"{type(error).__name__}: {error}", "see there", False
    seconds = round(time.monotonic() - started_at, 1)
    return Row(fault=fault.name, injected=fault.injected, happened=happened, lost=lost, passed=passed, seconds=seconds)
