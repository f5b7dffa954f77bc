"""Where a run's numbers go, and a line for whoever is watching.

metrics.jsonl always; beside it sinks that may fail without harm: TensorBoard, and Weights & Biases where it is asked
for. state.json says whether the run is going on, and how it ended. Reading all of that back is for `report/runs.py`,
and neither of the two imports torch.
"""

import json
import logging
import math
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from dalle.output.progress import printable
from storage.atomic import replace_text

logger = logging.getLogger(__name__)

Report = Callable[[str], None]
Values = Mapping[str, Any]
"""What is measured at a step, by name: numbers, and lists of numbers such as one for each row of the image."""
RunState = Literal["running", "stopped", "finished", "failed"]


def to_stderr(line: str) -> None:
    """Print a line where messages belong."""
    print(printable(line), file=sys.stderr, flush=True)


class Sink(Protocol):
    """Somewhere that metrics are shown, beside metrics.jsonl."""

    name: str
    """What a user calls it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step, named split/name."""

    def picture(self, step: int, path: Path) -> None:
        """Take the sample sheet of a step, a PNG."""

    def close(self) -> None:
        """Bring to an end what is under way."""


class TensorBoard:
    """Event files in `tensorboard/`; those of steps that a resumed run takes again are marked as void."""

    name = "TensorBoard"

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """Add a picture."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases (https://docs.wandb.ai); WANDB_MODE=offline keeps it on this machine for `wandb sync`.

    The id of the run is kept in `wandb-id`, so that a run that is resumed goes on in the same place. A run from step 0
    is a new one. What was sent before an interruption is not sent again when these steps are taken again: an exact
    resume gives the same numbers.

    Args:
        project: of Weights & Biases.
        run: the run's directory.
        step: the step the run goes on from.
        sent: the (step, split) of the lines that were logged before.
    """

    name = "Weights & Biases"

    def __init__(self, project: str, run: Path, step: int, sent: set[tuple[int, str]]) -> None:
        import wandb

        kept = run / "wandb-id"
        goes_on = step > 0 and kept.is_file()
        run_id = kept.read_text().strip() if goes_on else secrets.token_hex(8)
        self._sent = sent if goes_on else set()
        self._last_sent = max((step for step, _ in self._sent), default=0)
        described = read_object(run / "config.json")
        name = "/".join(run.absolute().parts[-3:])
        self._wandb = wandb
        self._run = wandb.init(project=project, dir=str(run), id=run_id, resume="allow", name=name, config=described)
        kept.write_text(run_id + "\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values that were not logged before."""
        new = {name: value for name, value in values.items() if (step, name.partition("/")[0]) not in self._sent}
        if new:
            self._run.log(new, step=step)

    def picture(self, step: int, path: Path) -> None:
        """Log a picture that was not logged before."""
        if step > self._last_sent:
            self._run.log({"samples": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def require_wandb() -> None:
    """Check that Weights & Biases is installed.

    Raises:
        ValueError: it is not.
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--wandb needs Weights & Biases, which cannot be imported ({error}): install it with "
            "`pip install wandb`, or leave out --wandb"
        ) from None


class MetricLog:
    """The metrics of one run: `metrics.jsonl`, one JSON object a line, and other sinks beside it.

    A sink that fails is given up with one warning. Only metrics.jsonl must be written.

    Args:
        run: the run's directory.
        step: the step the run goes on from; lines of later steps, which a resumed run takes again, are dropped.
        wandb_project: of Weights & Biases, if that is wanted.

    Raises:
        OSError: metrics.jsonl cannot be written.
    """

    def __init__(self, run: Path, step: int, *, wandb_project: str | None = None) -> None:
        self.path, self._run = run / "metrics.jsonl", run
        lines = read_metrics(self.path)
        kept = [line for line in lines if line["step"] <= step]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")
        self._sinks: list[Sink] = []
        self._open("TensorBoard", lambda: TensorBoard(run, step))
        if wandb_project is not None:
            sent = {(line["step"], str(line.get("split"))) for line in lines}
            self._open("Weights & Biases", lambda: WeightsAndBiases(wandb_project, run, step, sent))
        write_state(run, "running")

    def write(self, step: int, split: str, values: Values) -> None:
        """Write the values of a step; `split` is train or validation.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        line: dict[str, Any] = {"step": step, "split": split, "time": round(time.time(), 3)}
        line |= {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = dict(_numbers(split, values))
        self._in_all(lambda sink: sink.write(step, numbers))

    def picture(self, step: int, path: Path) -> None:
        """Show the sample sheet of a step, a PNG."""
        self._in_all(lambda sink: sink.picture(step, path))

    def close(self, state: RunState = "finished", reason: str = "") -> None:
        """Write down how the run ended, and close all."""
        write_state(self._run, state, reason)  # before what may wait for a network
        self._in_all(lambda sink: sink.close())
        self._file.close()

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        try:
            self._sinks.append(make())
        except Exception as error:  # whatever it is, training does not depend on it
            _warn(name, error)

    def _in_all(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                _warn(sink.name, error)


def write_state(run: Path, state: RunState, reason: str = "") -> None:
    """Write state.json, if that is possible: how it goes is no reason to stop, nor to hide why a run ends.

    Args:
        run: the run's directory.
        state: how it is.
        reason: why it has ended.
    """
    said = {"state": state, "reason": reason, "time": round(time.time(), 3), "host": socket.gethostname()}
    path = run / "state.json"
    try:
        replace_text(path, json.dumps(said))
    except OSError as error:
        logger.warning("%s cannot be written (%s)", path, error)


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    logger.warning("%s is given up for this run (%s); metrics.jsonl has everything", name, reason)


def _finite(value: Any) -> Any:
    """Return what JSON can hold: None in place of numbers that are not finite."""
    if isinstance(value, Sequence):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _numbers(split: str, values: Values) -> Iterator[tuple[str, float]]:
    """Yield every number by its name: split/name, or split/name/03 for the fourth one of a list."""
    for name, value in values.items():
        if isinstance(value, Sequence):
            yield from ((f"{split}/{name}/{index:02}", item) for index, item in enumerate(value))
        else:
            yield f"{split}/{name}", value


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one if there is none to be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; what a crash has cut off is left out, and no file is no lines."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
