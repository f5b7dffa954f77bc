"""Signals: a request to stop ends the step under way instead of the process."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

STOPPED_CODES = {-signal.SIGTERM, 128 + signal.SIGTERM}
"""Exit codes of a process that SIGTERM ended: as Python sees it, and as a supervisor or a shell returns it."""


class Interrupted(Exception):  # noqa: N818  # not an error
    """The program was asked to stop. Its work is saved, and the same command resumes from there."""


class Ended(Exception):  # noqa: N818  # not an error
    """A supervisor has run the whole command as child processes.

    Args:
        code: exit code of the last one.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class SignalHandler:
    """A context in which a function handles SIGINT and SIGTERM, called with the signal's number.

    Only the main thread is sent signals; in others the context does nothing.
    """

    def __init__(self, handler: Callable[[int], None]) -> None:
        self._handler = handler

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        self._former = {number: signal.signal(number, lambda given, _: self._handler(given)) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


class StopSignals(SignalHandler):
    """A context in which SIGINT and SIGTERM only raise a flag, so that the step under way ends and is saved.

    A second SIGINT raises KeyboardInterrupt. SIGTERM may come any number of times: from a launcher, and from the watch
    that finds the launcher gone.
    """

    def __init__(self) -> None:
        super().__init__(self._raise_flag)
        self.raised = False
        """Whether one has come."""
        self._n_interrupts = 0

    def _raise_flag(self, number: int) -> None:
        self._n_interrupts += number == signal.SIGINT
        if self._n_interrupts > 1:
            raise KeyboardInterrupt
        self.raised = True


def stop_this_process() -> None:
    """Send this process a SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)


def kill_group(pid: int) -> None:
    """Kill a process group, if it is still there."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def exit_text(code: int) -> str:
    """Return "ended with code 1", or "was ended by SIGKILL" for the code -9."""
    return f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
