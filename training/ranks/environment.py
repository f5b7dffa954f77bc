"""What a process of `dalle-train` hears from, and tells, the process that started it.

Two of our own processes start others: a supervisor (`supervisor.py`) and the one that runs stages side by side
(`side_by_side.py`). They set these environment variables.
"""

import contextlib
import os

ATTEMPT = "DALLE_TRAIN_ATTEMPT"
"""Number of the attempt, from 0, in a process that a supervisor started."""
PIPE = "DALLE_TRAIN_SUPERVISOR"
"""File descriptor that the supervisor reads."""
PARENT = "DALLE_TRAIN_PARENT"
"""Process id of the process that runs several stages, in those that it started."""
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set to True by torchrun, whose agent holds the store of the job; also by a process that runs several stages."""


def is_supervised() -> bool:
    """Return whether a supervisor started this process."""
    return ATTEMPT in os.environ


def has_agent_store() -> bool:
    """Return whether the process that started the ranks holds the store of the job, and not the first rank."""
    return os.environ.get(AGENT_STORE) == "True"


def first_rank_holds_store() -> bool:
    """Return whether the store of the job ends with the first rank: neither a supervisor nor a launcher has it."""
    return not is_supervised() and not has_agent_store()


def tell_supervisor(word: str) -> None:
    """Write a word to the supervisor, if there is one.

    Args:
        word: started: a step is done; lost: another rank is to blame; final: a restart would fail too.
    """
    if PIPE in os.environ:
        with contextlib.suppress(OSError):
            os.write(int(os.environ[PIPE]), f"{word}\n".encode())
