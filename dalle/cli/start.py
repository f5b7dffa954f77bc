"""The first moments of a program, while its modules are imported: Ctrl-C ends it at once, in one line.

An interrupt within an import would show the stack of whatever was being imported, or be lost in it.
"""

import os
import signal
import time

TYPE_CHECKING = False  # as in dalle/__init__.py
if TYPE_CHECKING:
    from typing import Any

_began_at = time.monotonic()


def begin() -> None:
    """Begin a program: Ctrl-C ends the process, until `let_commands_stop`; unless something else handles it."""
    global _began_at
    _began_at = time.monotonic()
    _exchange(signal.default_int_handler, _stop)


def let_commands_stop() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    _exchange(_stop, signal.default_int_handler)


def age_s() -> float:
    """Return the seconds since the program began."""
    return time.monotonic() - _began_at


def _exchange(former: object, new: "Any") -> None:
    try:
        if signal.getsignal(signal.SIGINT) is former:
            signal.signal(signal.SIGINT, new)
    except ValueError:  # another thread than the main one
        pass


def _stop(_number: int, _frame: object) -> None:
    try:
        os.write(2, b"error: stopped\n")
    finally:
        os._exit(1)
