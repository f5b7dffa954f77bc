"""Processes of this host: which launchers stand above one, who a rank is."""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from storage.process import Process, place_of_this_process, status_of, this_process
from training.ranks.environment import PARENT, is_supervised

_LAUNCHERS = {"deepspeed", "deepspeed.pt", "torchrun"}
_LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed.run", "torch.distributed.launch")


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
    status = status_of(pid)
    while status is not None and status.parent > 0:
        parent = status.parent
        status = status_of(parent)
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


def this_member(rank: int) -> Member:
    """Return this process as a rank."""
    return Member(rank=rank, host=socket.gethostname(), place=place_of_this_process(), process=this_process())
