"""Where metrics are shown beside metrics.jsonl: TensorBoard, and Weights & Biases where it is asked for."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from training.run_files import TENSORBOARD, WANDB_ID, read_config


class Sink(Protocol):
    """Shows a run's metrics; whatever it raises, the run gives it up with one warning."""

    name: str
    """What a user calls it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step, named split/name."""

    def picture(self, step: int, path: Path) -> None:
        """Take the sample sheet of a step, a PNG."""

    def close(self) -> None:
        """Write or send what is left."""


class TensorBoard:
    """Writes event files to `tensorboard/`; the steps that a resumed run repeats are marked as void.

    Args:
        run: the run's folder.
        step: the step from which the run continues.
    """

    name = "TensorBoard"

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1)

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
    """Logs to Weights & Biases (https://docs.wandb.ai); WANDB_MODE=offline keeps it on this machine for `wandb sync`.

    A resumed run continues the one whose id is in `wandb-id`, and does not send again what was sent before: its steps
    give the same numbers. A run from step 0 is a new one.

    Args:
        project: of Weights & Biases.
        run: the run's folder.
        step: the step from which the run continues.
        sent: the (step, split) of the lines that were logged before.
    """

    name = "Weights & Biases"

    def __init__(self, project: str, run: Path, step: int, sent: set[tuple[int, str]]) -> None:
        import wandb

        id_file = run / WANDB_ID
        is_resumed = step > 0 and id_file.is_file()
        run_id = id_file.read_text().strip() if is_resumed else secrets.token_hex(8)
        self._sent = sent if is_resumed else set()
        self._last_sent = max((step for step, _ in self._sent), default=0)
        name = "/".join(run.absolute().parts[-3:])
        self._wandb = wandb
        self._run = wandb.init(
            project=project, dir=str(run), id=run_id, resume="allow", name=name, config=read_config(run)
        )
        id_file.write_text(run_id + "\n")

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
