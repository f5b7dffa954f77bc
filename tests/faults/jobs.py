"""Jobs that faults are injected into: ranks forked with everything imported, launchers, and processes left behind.

Every rank runs `dalle-train` as a user would start it: `training.cli.main.main` with a launcher's variables.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

N_RANKS = 2
PATIENCE_S = 180.0
"""Seconds that anything may take, on a busy machine."""
ROOT = Path(__file__).parents[2]
MARK = "DALLE_FAULT_SUITE"
"""Environment variable that marks the processes that launchers start."""
PRELOADED = [
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.tensorboard",
    "training.cli.main",
    "training.cli.train",
    "jobs",
]
Injection = Callable[[int], None]
"""Called in a rank, with its number, before `dalle-train` starts."""

_ports = itertools.count(int(os.environ.get("FAULTS_FIRST_PORT", "30300")))


def free_port() -> int:
    """Return a port that is not in use."""
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def _rank(arguments: list[str], variables: dict[str, str], log: str, inject: Injection | None) -> None:
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    import torch

    import training.cli.main

    torch.set_num_threads(1)
    if inject is not None:
        inject(int(variables["RANK"]))
    sys.exit(training.cli.main.main(arguments))


class Job:
    """Runs one command on two ranks or more; kills what is left when the context ends."""

    def __init__(
        self, folder: Path, arguments: Sequence[object], *, ranks: int = N_RANKS, inject: Injection | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        variables = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        self.processes: list[BaseProcess] = []
        self.logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
            process = context.Process(target=_rank, args=([str(word) for word in arguments], own, str(log), inject))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join(PATIENCE_S)

    def send(self, rank: int, number: int) -> None:
        """Send a rank a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid or 0, number)

    def is_running(self) -> bool:
        """Return whether every rank lives."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = PATIENCE_S) -> list[int | None]:
        """Wait for all ranks to end; return their exit codes, None for those that have not ended."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def said(self, rank: int | None = None) -> str:
        """Return the output of a rank, or of all."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def left_over(self) -> list[int]:
        """Return the living processes of the ranks' groups, such as reading processes."""
        groups = {process.pid for process in self.processes}
        return [pid for pid in _all_processes() if _group_of(pid) in groups]


def _all_processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace").rpartition(")")[2].split()
    return []


def _group_of(pid: int) -> int | None:
    stat = _stat_of(pid)
    return int(stat[2]) if stat and stat[0] not in "ZX" else None


class Launched:
    """Runs a command under a launcher, or without one, in a session of its own."""

    def __init__(self, folder: Path, program: Sequence[object], arguments: Sequence[object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.log = folder / "launcher.log"
        scripts = Path(sys.executable).parent
        environment = {**os.environ, MARK: self.mark, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"
        words = [str(word) for word in (*program, *arguments)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(scripts / words[0]), *words[1:]],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def living(self) -> list[int]:
        """Return all living processes of the job, whoever their parent is."""
        found = []
        for pid in _all_processes():
            with contextlib.suppress(OSError):
                is_ours = f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                stat = _stat_of(pid)
                if is_ours and stat and stat[0] not in "ZX":
                    found.append(pid)
        return found

    def named(self, words: str) -> list[int]:
        """Return the living processes whose command line has these words in it, oldest first."""
        found = []
        for pid in self.living():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words in command:
                    found.append(pid)
        return sorted(found)

    def supervised(self) -> list[int]:
        """Return the processes that train for a supervisor, oldest first; not their reading processes."""
        found = []
        for pid in self.living():
            with contextlib.suppress(OSError):
                if b"\0DALLE_TRAIN_ATTEMPT=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
        return sorted(pid for pid in found if (stat := _stat_of(pid)) and int(stat[1]) not in found)

    def wait_until_gone(self, seconds: float = PATIENCE_S) -> list[int]:
        """Wait until no process of the job lives; returns those that still do."""
        deadline = time.monotonic() + seconds
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.living()

    def said(self) -> str:
        """Return the output of the job."""
        return self.log.read_text(errors="replace")


def wait_for(condition: Callable[[], bool], what: str, *, every_s: float = 0.005) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not hold within `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {PATIENCE_S:.0f} s")
        time.sleep(every_s)


def prepare_environment(scratch: Path) -> None:
    """Let forked and launched processes find this checkout, and write only to `scratch`."""
    folders = [ROOT, ROOT / "tests" / "faults", ROOT / "tests" / "training", ROOT / "tests"]
    rest = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *rest])
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TMPDIR=str(scratch / "tmp"))
    (scratch / "tmp").mkdir(parents=True, exist_ok=True)


def copy_of(folder: Path, target: Path) -> Path:
    """Return a fresh copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(folder, target))
