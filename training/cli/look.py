"""The commands of `dalle-train` that look at something: status, report, plan, presets.

What needs torch is imported by the command that needs it: status and report answer without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.command import parse
from training.plan.options import PlanOptions
from training.report.report import write_report
from training.report.status import show_status

RunPath = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="RUN",
        help="Directory of a run, such as runs/mine/training/transformer, of a bundle, or of several of those.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class StatusCommand:
    """Show how a run is going: state, losses, validation, speed, checkpoints. Only reads what the run has written."""

    path: RunPath
    watch: Annotated[float | None, tyro.conf.arg(metavar="SECONDS")] = None
    """Seconds after which to show it again, until all runs there have ended, or Ctrl-C; by default it is shown once."""

    def run(self) -> None:
        """Show it."""
        show_status(self.path, watch_s=self.watch)


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write a run as one HTML page with curves and pictures, which needs no network and runs no script."""

    path: RunPath
    out: Path | None = None
    """File to write; by default RUN/report.html."""

    def run(self) -> None:
        """Write it."""
        print(write_report(self.path, self.out))


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Show what a recipe needs: parameters, arithmetic, bytes per GPU in every mode, time, and what to train with."""

    recipe: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]")] = None
    """Name of a recipe; by default all are listed."""
    options: Annotated[PlanOptions, tyro.conf.arg(name="")]
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print it as JSON, sizes in bytes."""

    def run(self) -> None:
        """Print it."""
        from training.plan.plan import make_plan
        from training.plan.text import recipe_list, text
        from training.recipes import recipe

        if self.recipe is None:
            print(recipe_list())
            return
        made = make_plan(recipe(self.recipe), self.options)
        print(made.as_json() if self.json else text(made))


@dataclass(frozen=True, kw_only=True)
class PresetsCommand:
    """List the DeepSpeed configurations that --preset takes, or print one to be copied and changed."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    """Name of a preset; by default all are listed."""

    def run(self) -> None:
        """Print them, or one."""
        from training.engine.deepspeed_config import preset_list, preset_path

        print(preset_list() if self.name is None else preset_path(self.name).read_text().rstrip())


Command = StatusCommand | ReportCommand | PlanCommand | PresetsCommand
COMMANDS: dict[str, type[Command]] = {
    "status": StatusCommand,
    "report": ReportCommand,
    "plan": PlanCommand,
    "presets": PresetsCommand,
}


def read(verb: str, arguments: Sequence[str]) -> Command:
    """Return the command that the arguments after the verb say."""
    command: Command = parse(COMMANDS[verb], arguments, prog=f"dalle-train {verb}")
    return command
