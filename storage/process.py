"""A process of this host: told from later ones with its id, and whether it has ended."""

import contextlib
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Status:
    """What /proc tells of a process."""

    state: str
    """A letter: R runs, S sleeps, Z has ended and its parent has not waited for it yet."""
    parent: int
    """Id of its parent."""
    started: int
    """Start time in clock ticks since the host started."""


def status_of(pid: int) -> Status | None:
    """Read a process's state; None if there is no such process, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return Status(state=fields[0], parent=int(fields[1]), started=int(fields[19]))


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of this host."""

    pid: int
    started: int
    """Start time in clock ticks since the host started; tells a process from a later one with the same id. 0 where
    there is no /proc."""

    def is_gone(self) -> bool:
        """Return whether it has ended; a process that its parent has not waited for yet has ended too."""
        status = status_of(self.pid)
        if status is None and not Path("/proc/self/stat").exists():
            return not is_there(self.pid)
        return status is None or status.started != self.started or status.state in "ZX"


def is_there(pid: int) -> bool:
    """Return whether there is a process of this host with an id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def this_process() -> Process:
    """Return this process."""
    status = status_of(os.getpid())
    return Process(pid=os.getpid(), started=status.started if status is not None else 0)


def place_of_this_process() -> str:
    """Return a name of the host and its process namespace: processes of one place see each other."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.getnode():x}"
