"""Waiting for another process."""

import time
from collections.abc import Callable

PATIENCE_S = 60.0


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
