"""The first moments of a program, while its modules are imported: Ctrl-C ends it at once, in one line.

An interrupt within an import would show the stack of whatever was being imported, or be lost in it.
"""

import os
import signal
from contextlib import suppress
from types import FrameType


def stop_at_once() -> None:
    """Let Ctrl-C end the process, until `let_commands_stop`; unless something else handles it, or nothing may."""
    with suppress(ValueError):  # another thread than the main one
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _stop)


def let_commands_stop() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    with suppress(ValueError):
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(_number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"error: stopped\n")
    os._exit(1)
