"""Where a run's numbers go: metrics.jsonl always, TensorBoard beside it, and a line for whoever is watching."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Report = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Print a line where messages belong."""
    print(line, file=sys.stderr, flush=True)


class MetricLog:
    """The metrics of one run: `metrics.jsonl`, one JSON object a line, and TensorBoard events in `tensorboard/`.

    Args:
        run: the run's directory.
        step: the step the run goes on from; lines of later steps, which a resumed run takes again, are dropped.
    """

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._file = self.path.open("a")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Write the values of a step; `split` is train or validation."""
        line: dict[str, Any] = {"step": step, "split": split, "time": round(time.time(), 3)}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last line cut off by a crash is left out, and no file is no lines."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
