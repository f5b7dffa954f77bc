"""Processes that read data beside a parent that decides when they end: they outlive Ctrl-C and the end of a job.

A launcher or a terminal sends SIGINT and SIGTERM to all processes. The parent still needs its workers then, because it
saves a checkpoint first.
"""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_PARENT_CHECK_S = 1.0
"""Seconds between two checks whether the parent is alive."""


@contextmanager
def forking() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread, and freeze what the garbage collector has, while a process is forked.

    The process begins with the signals blocked, and never collects garbage of its parent. fsspec's sessions are among
    it, and closing one takes seconds in a process without the thread that it needs.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # in the parent alone: a forked worker never comes here
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_the_parent_alone(parent: int, worker: int = 0) -> None:
    """End this process when its parent ends, or sends it SIGTERM; ignore SIGINT, and SIGTERM from anyone else.

    Runs in a worker forked under `forking`.

    Args:
        parent: process number of the parent.
        worker: number of the worker, from 0, which DataLoader passes; not used.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
        return

    def wait() -> None:
        while os.getppid() == parent:  # a process killed with -9 tells its children nothing
            heard = signal.sigtimedwait(_INTERRUPTS, _PARENT_CHECK_S)
            if heard is not None and heard.si_signo == signal.SIGTERM and heard.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
