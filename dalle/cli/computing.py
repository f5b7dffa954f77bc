"""Options of speed and memory, which several verbs share."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.command import resolve_device
from dalle.cli.options import Device, Flag
from dalle.data.bundle import Precision
from dalle.pipeline import Pipeline

UNITS = {"B": 1} | {
    f"{prefix}{unit}": factor**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, factor in (("B", 1000), ("IB", 1024))
}
"""Of memory, in bytes."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Speed and memory."""

    device: Device = "auto"
    precision: Precision = "fp32"
    """bf16 is faster; in fp32 candidates do not depend on the batch size."""
    memory: Annotated[
        str | None, tyro.conf.arg(metavar="SIZE", help_behavior_hint="(default: 2GiB; on a GPU half of what is free)")
    ] = None
    """Memory that a batch may take, like 4GB or 512MiB."""
    batch_size: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: as many as fit the memory)")
    ] = None
    """Candidates sampled at the same time."""

    @property
    def memory_bytes(self) -> int | None:
        """The memory; None if it is not given."""
        return None if self.memory is None else n_bytes(self.memory)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(DeviceOptions):
    """Speed and memory."""

    compile: Flag = False
    """Compile sampling and decoding on a CPU: takes a minute at first, worth it for many candidates of large models."""

    def load(self, bundle: Path) -> Pipeline:
        """Load a bundle."""
        return Pipeline.load(
            bundle,
            resolve_device(self.device),
            precision=self.precision,
            memory=self.memory_bytes,
            compile=self.compile,
        )


def n_bytes(size: str) -> int:
    """Return how many bytes a size like "4GB", "1.5 GiB" or "512mib" is.

    Raises:
        ValueError: it is not a number above 0 with a unit.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([a-z]+)", size.strip(), re.IGNORECASE)
    factor = UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise ValueError(f"the memory {size!r} is not a number with a unit: give something like 4GB, 1.5GiB or 512MB")
    return int(float(match[1]) * factor)
