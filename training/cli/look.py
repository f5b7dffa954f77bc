"""The commands that only read what runs have written: status and report. They answer without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from training.report.report import write_report
from training.report.status import show_status

PROGRAM = "dalle-train"
DESCRIPTION = "Train every part of a bundle: tokenizer, dVAE, transformer and CLIP."


@dataclass(frozen=True, kw_only=True)
class StatusCommand:
    """Show how a run is going: state, losses, validation, speed, checkpoints. Only reads what the run has written."""

    run: tyro.conf.Positional[Path]
    """A run's directory, such as runs/mine/training/transformer, a bundle's, or a folder of those."""
    watch: float | None = None
    """Show it again every so many seconds, until all runs there have ended, or Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write a run as one HTML page with curves and pictures, which needs no network and runs no script."""

    run: tyro.conf.Positional[Path]
    """A run's directory, such as runs/mine/training/transformer, a bundle's, or a folder of those."""
    out: Path | None = None
    """The file; RUN/report.html if not given."""


Command = (
    Annotated[StatusCommand, tyro.conf.subcommand("status")] | Annotated[ReportCommand, tyro.conf.subcommand("report")]
)


def read(command: StatusCommand | ReportCommand) -> None:
    """Do what a command says that only reads.

    Raises:
        FileNotFoundError: there is no run.
        ValueError, OSError: as `show_status` and `write_report`.
    """
    match command:
        case StatusCommand():
            show_status(command.run, watch_s=command.watch)
        case ReportCommand():
            print(write_report(command.run, command.out))
