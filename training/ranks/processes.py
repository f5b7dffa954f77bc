"""Processes of this host, read from /proc: whether one has ended, which launchers stand above it, who a rank is."""

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from training.ranks.environment import PARENT, is_supervised

_LAUNCHERS = {"deepspeed", "deepspeed.pt", "torchrun"}
_LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed.run", "torch.distributed.launch")


@dataclass(frozen=True, kw_only=True)
class _Status:
    state: str
    parent: int
    started: int


def _status(pid: int) -> _Status | None:
    """Read a process's state; None if there is no such process, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return _Status(state=fields[0], parent=int(fields[1]), started=int(fields[19]))


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of this host."""

    pid: int
    started: int
    """Start time in clock ticks since the host started; tells a process from a later one with the same id."""

    def is_gone(self) -> bool:
        """Return whether it has ended; a process that its parent has not waited for yet has ended too."""
        status = _status(self.pid)
        return status is None or status.started != self.started or status.state in "ZX"


def _is_launcher(pid: int) -> bool:
    """Return whether a process was started as `deepspeed`, `torchrun`, or as one of the modules behind them."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    if Path(words[0]).name in _LAUNCHERS:
        return True
    if not Path(words[0]).name.startswith("python"):
        return False
    rest = iter(words[1:])
    for word in rest:
        if word == "-m":
            return next(rest, "").startswith(_LAUNCHER_MODULES)
        if word in ("-X", "-W"):
            next(rest, "")
        elif not word.startswith("-"):
            return Path(word).name in _LAUNCHERS
    return False


def launchers(pid: int) -> tuple[Process, ...]:
    """Return the processes above `pid`, from its parent up to the outermost launcher.

    A supervisor counts as a launcher, and so does the process that runs several stages, even if it has ended already.
    Empty without a launcher or without /proc.
    """
    above: list[Process] = []
    runs_stages = int(os.environ.get(PARENT, "0")) if pid == os.getpid() else 0
    n = 1 if is_supervised() and pid == os.getpid() else 0
    status = _status(pid)
    while status is not None and status.parent > 0:
        parent = status.parent
        status = _status(parent)
        if status is not None:
            above.append(Process(pid=parent, started=status.started))
            if parent == runs_stages or _is_launcher(parent):
                n = len(above)
    if runs_stages and above and runs_stages not in [process.pid for process in above]:
        return (Process(pid=runs_stages, started=-1),)
    return tuple(above[:n])


@dataclass(frozen=True, kw_only=True)
class Member:
    """A rank and its process."""

    rank: int
    host: str
    """Name of its host."""
    place: str
    """Host and process namespace: ranks of one place see each other's processes."""
    process: Process

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.process.pid})"

    def to_json(self) -> str:
        """Return it as text for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Member":
        """Return the member that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "process": Process(**values["process"])})


def this_process(rank: int) -> Member:
    """Return this process as a rank."""
    status = _status(os.getpid())
    process = Process(pid=os.getpid(), started=status.started if status is not None else 0)
    place = f"{socket.gethostname()} {os.getpid()}"  # without /proc, nobody else's
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return Member(rank=rank, host=socket.gethostname(), place=place, process=process)
