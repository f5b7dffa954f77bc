"""The table of all doors, at the end of a run."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doors import Door, table

sys.path.append(str(Path(__file__).parents[1] / "training"))  # its support
os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported


@pytest.fixture
def door(request: pytest.FixtureRequest) -> Iterator[Door]:
    """The door of one test, called after it."""
    door = Door(request.node.name.removeprefix("test_").replace("_", " "))
    yield door
    request.node.user_properties.append(("door", (door.name, dict(door.counts), door.seconds)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what came out of the doors; reports carry it, also from other processes."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    properties = [one for report in reports for one in getattr(report, "user_properties", ())]
    rows = {value[0]: tuple(value) for name, value in properties if name == "door"}
    if rows:
        terminalreporter.section("doors")
        terminalreporter.write_line("\n".join(table(list(rows.values()))))
