"""A run's metrics while it runs: metrics.jsonl, state.json, and the sinks beside them."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.atomic import replace_text
from storage.errors import reason_of
from training.loop.sinks import Sink, TensorBoard, WeightsAndBiases
from training.run_files import METRICS, RunState, metrics_text, read_metrics, write_state

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]
"""The metrics of a step by name: numbers, and lists of numbers such as one for each row of the image."""


class MetricLog:
    """Writes the metrics of one run to metrics.jsonl and to the sinks.

    Only metrics.jsonl must be written: a sink that fails is given up with one warning.

    Args:
        run: the run's folder.
        step: the step from which the run continues; lines of later steps, which it will repeat, are dropped.
        wandb_project: project of Weights & Biases; None to do without.

    Raises:
        OSError: metrics.jsonl cannot be written.
    """

    def __init__(self, run: Path, step: int, *, wandb_project: str | None = None) -> None:
        self._run = run
        lines = read_metrics(run)
        replace_text(run / METRICS, metrics_text(line for line in lines if line["step"] <= step))
        self._file = (run / METRICS).open("a")
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
        self._file.write(metrics_text([line]))
        self._file.flush()
        numbers = dict(_numbers(split, values))
        self._in_all(lambda sink: sink.write(step, numbers))

    def picture(self, step: int, path: Path) -> None:
        """Show the sample sheet of a step, a PNG."""
        self._in_all(lambda sink: sink.picture(step, path))

    def close(self, state: RunState = "finished", reason: str = "") -> None:
        """Write how the run ended, and close all."""
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


def _warn(name: str, error: Exception) -> None:
    logger.warning("%s is given up for this run (%s); metrics.jsonl has everything", name, reason_of(error, 300))


def _finite(value: Any) -> Any:
    """Return a value that JSON can hold: None in place of numbers that are not finite."""
    if isinstance(value, Sequence):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _numbers(split: str, values: Values) -> Iterator[tuple[str, float]]:
    """Yield every number with its name: split/name, or split/name/03 for the fourth one of a list."""
    for name, value in values.items():
        if isinstance(value, Sequence):
            yield from ((f"{split}/{name}/{index:02}", item) for index, item in enumerate(value))
        else:
            yield f"{split}/{name}", value
