"""What each rank watches while it trains: its launchers, the other ranks, and the clock.

1. A launcher that is gone, such as `deepspeed` after SIGTERM or `torchrun` after kill -9, leaves its ranks behind: each
   goes on as after a SIGTERM of its own. A shell that ends is no launcher, so `nohup` keeps its meaning.
2. A rank that is gone is named by the others. On one host /proc tells within a second; of another host, a heartbeat.
3. When nothing has moved for the time that the user allows, every rank writes the stacks of its threads, the ranks
   that fell behind are named, and the job ends.

Two threads do this: `Watch` never waits for anybody, `_Mail` reads and writes the store of the job, whose host may be
the one that sleeps.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from torch.distributed import DistError, Store  # type: ignore[attr-defined]  # public, but torch does not say so to mypy

from training.metrics import to_stderr, write_state

T = TypeVar("T")

TIMEOUT_S = 1800.0
"""Seconds without progress after which a job counts as hung, if the user says nothing else."""
FIRST_STEP_FACTOR = 4
"""How much longer everything before the first step may take: building, loading and compiling."""
POLL_S = 0.5
GRACE_S = 10.0
"""What a rank has to end by itself after another one is gone, and what the ranks have to answer when nothing moves."""

ATTEMPT = "DALLE_TRAIN_ATTEMPT"
"""Environment variable with the number of the attempt, from 0, where a supervisor has started this process."""
PIPE = "DALLE_TRAIN_SUPERVISOR"
"""Environment variable with the file descriptor that the supervisor listens to."""
PARENT = "DALLE_TRAIN_PARENT"
"""Environment variable with the number of the process that runs several stages, where it has started this one."""

_ANSWER_S = 3.0
_BEAT_S = 5.0
_SILENT_S = 60.0
_LAUNCHERS = {"deepspeed", "deepspeed.pt", "torchrun"}
_LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed.run", "torch.distributed.launch")


class RankLostError(OSError):
    """Another rank is gone, and training cannot go on without it."""


def first_rank_holds_store() -> bool:
    """Return whether the store of the job ends with the first rank: no supervisor and no agent of torchrun has it."""
    return ATTEMPT not in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def tell_supervisor(word: str) -> None:
    """Tell the supervisor, if there is one: started (a step is done), lost (no fault of ours) or final (no restart)."""
    if PIPE in os.environ:
        with contextlib.suppress(OSError):
            os.write(int(os.environ[PIPE]), f"{word}\n".encode())


# --------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True, kw_only=True)
class _Status:
    state: str
    parent: int
    started: int


def _status(pid: int) -> _Status | None:
    """Return what Linux says of a process; None if there is none."""
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
    """Its number."""
    started: int
    """When it was started, in clock ticks since the host was: tells it from a later process of that number."""

    def is_gone(self) -> bool:
        """Whether it has ended, if only its parent has not noticed yet."""
        status = _status(self.pid)
        return status is None or status.started != self.started or status.state in "ZX"


def _is_launcher(pid: int) -> bool:
    """Return whether a process was started as `deepspeed`, `torchrun`, or the modules behind them."""
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
    """Return the processes above `pid`, from its parent to the outermost launcher; none if there is no launcher.

    A supervisor (`training/ranks/supervisor.py`) counts as one, and so does what runs several stages
    (`training/ranks/side_by_side.py`), which may be gone before anybody has looked. Empty where there is no /proc.
    """
    above: list[Process] = []
    runs_stages = int(os.environ.get(PARENT, "0")) if pid == os.getpid() else 0
    n = 1 if ATTEMPT in os.environ and pid == os.getpid() else 0
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
    """A rank, and where it runs."""

    rank: int
    """Its number."""
    host: str
    """Name of its host."""
    place: str
    """Host and process namespace: ranks of one place see each other's processes."""
    process: Process
    """The process that trains."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.process.pid})"

    def to_json(self) -> str:
        """Return it as text for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Member":
        """Return what `to_json` was called on."""
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


# --------------------------------------------------------------------------------------------------- the watch


@dataclass(frozen=True, kw_only=True, order=True)
class Progress:
    """How far a rank is; of two ranks, the smaller one is behind."""

    touches: int
    """Parts of the loop that it has ended."""
    is_waiting: bool
    """Whether it waits for the other ranks: those that do not are the ones waited for."""
    step: int = field(compare=False)
    """The last step that it has ended; -1 before the first."""


def behind(answers: Mapping[int, Progress], n_ranks: int) -> list[int]:
    """Return the ranks that hold the others up: those that do not answer, otherwise those that are least far.

    None where all are equally far.
    """
    silent = [rank for rank in range(n_ranks) if rank not in answers]
    if silent:
        return silent
    least = min(answers.values())
    found = [rank for rank, progress in sorted(answers.items()) if progress == least]
    return found if len(found) < n_ranks else []


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """A rank that is gone, and why, if it said so."""

    member: Member
    reason: str


class Watch:
    """What a rank watches: see the module. Nothing is watched before `start`.

    Args:
        members: all ranks in order; empty if they are not known.
        rank: of this process.
        store: that of the job, for this watch alone; None: only processes of this host are watched.
        timeout_s: seconds without progress after which the job counts as hung.
    """

    def __init__(
        self,
        members: Sequence[Member] = (),
        rank: int = 0,
        store: Store | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.members, self.rank, self.timeout_s = tuple(members), rank, timeout_s
        self.run: Path | None = None
        """The directory of the run that is watched, while one is."""
        self._newest: Callable[[], str | None] = lambda: None
        self.loss: _Loss | None = None
        """The rank that is gone, once one is."""
        self.is_hung = threading.Event()
        self._mail = _Mail(self, store) if store is not None and len(self.members) > 1 else None
        self._launchers: tuple[Process, ...] = ()
        here = self.members[rank].place if self.members else ""
        self._neighbours = [member for member in self.members if member.place == here and member.rank != rank]
        self._is_armed = False
        self._idle_s, self._touches, self._step = 0.0, 0, -1
        self._waited_s = 0.0
        self._stopped = threading.Event()
        self._main_thread = threading.main_thread()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to watch; once is enough."""
        if not self._threads:
            self._launchers = launchers(os.getpid())
            self._threads.append(threading.Thread(target=self._watch, name="watch", daemon=True))
            if self._mail is not None:
                self._threads.append(threading.Thread(target=self._mail.run, name="watch-mail", daemon=True))
            for thread in self._threads:
                thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * POLL_S)

    def wait(self, seconds: float) -> bool:
        """Wait; returns whether the watch was stopped meanwhile."""
        return self._stopped.wait(seconds)

    def follow(self, run: Path, newest: Callable[[], str | None]) -> None:
        """From now on something must move: a run begins, or goes on, in this directory.

        Args:
            run: the directory.
            newest: tells the name of the checkpoint in it that a run goes on from, if there is one.
        """
        self._newest = newest
        self.run, self._idle_s, self._touches, self._step = run, 0.0, 0, -1
        self._is_armed = True

    def touch(self, step: int | None = None) -> None:
        """Something has moved; `step` is the number of steps done, where one is."""
        self._idle_s = 0.0
        self._touches += 1
        if step is not None:
            if self._step < 0:
                tell_supervisor("started")
            self._step = step

    def rest(self) -> None:
        """From now on nothing need move: the run has ended."""
        self._is_armed = False

    def progress(self) -> Progress:
        """Return how far this rank is."""
        frame = sys._current_frames().get(self._main_thread.ident or 0)
        is_waiting = False
        while frame is not None:
            is_waiting = is_waiting or frame.f_code.co_filename.endswith("distributed_c10d.py")
            frame = frame.f_back
        return Progress(touches=self._touches, is_waiting=is_waiting, step=self._step)

    def loss_error(self, error: BaseException | None, wait_s: float = GRACE_S / 2) -> RankLostError | None:
        """Return the error that names a rank that is gone; None if none is, after waiting for the news of it.

        Of a rank on another host there is only a heartbeat to miss, which takes longer; a collective fails at once.

        Args:
            error: what was raised here.
            wait_s: how long to wait, in all calls together, for news of this host.
        """
        if len(self.members) < 2 or not self._threads or not isinstance(error, RuntimeError):
            return None
        is_elsewhere = len(self._neighbours) + 1 < len(self.members) and _is_of_collective(error)
        if is_elsewhere:
            wait_s += _SILENT_S + 3 * _BEAT_S
        while self.loss is None and self._waited_s < wait_s:
            time.sleep(POLL_S / 10)
            self._waited_s += POLL_S / 10
        if self.loss is not None:
            if self._mail is not None:
                time.sleep(2 * POLL_S)  # the mail is on its way: ranks on other hosts see no processes of this one
            return RankLostError(self._loss_line(self.loss))
        if is_elsewhere:
            said = " ".join(str(error).split())[:200]
            return RankLostError(f"another rank is gone, it is not known which ({said}): {self._goes_on()}")
        return None

    def say_farewell(self, reason: str) -> None:
        """Let the other ranks know why this one ends."""
        if self._mail is not None and self._threads and self.loss is None:
            self._mail.publish_loss(_Loss(member=self.members[self.rank], reason=reason))
            time.sleep(3 * POLL_S)  # the store may end with this process

    def note_loss(self, loss: _Loss) -> None:
        """Take note of a rank that is gone; the first one counts."""
        if self.loss is None and loss.member.rank != self.rank:
            self.loss = loss
            if self._mail is not None:
                self._mail.publish_loss(loss)

    # ------------------------------------------------------------------------------------------ its own thread

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._stopped.wait(POLL_S):
            now = time.monotonic()
            # a process that was stopped itself, or whose host slept, has not waited for the others
            self._idle_s += min(now - looked_at, 2 * POLL_S)
            looked_at = now
            if any(launcher.is_gone() for launcher in self._launchers):
                self._launchers = ()
                os.kill(os.getpid(), signal.SIGTERM)
            for member in self._neighbours:
                if member.process.is_gone():
                    self.note_loss(_Loss(member=member, reason=""))
            if self.loss is not None:
                self._end_after_loss(self.loss)
                return
            limit_s = self.timeout_s * (FIRST_STEP_FACTOR if self._step < 0 else 1)
            if self.is_hung.is_set() or (self._is_armed and self._idle_s > limit_s):
                self._end_hung()

    def _end_after_loss(self, loss: _Loss) -> None:
        """End the process unless it finds out by itself, as a broken collective lets it, and says so."""
        if not self._stopped.wait(GRACE_S):
            self._give_up(self._loss_line(loss))

    def _end_hung(self) -> None:
        self.is_hung.set()
        if not _in_time(self._write_stacks):
            _in_time(lambda: faulthandler.dump_traceback(sys.stderr, all_threads=True))
        answers = self._mail.answers(GRACE_S) if self._mail is not None else {self.rank: self.progress()}
        if self.rank == 0:  # which may hold the store
            time.sleep(2 * POLL_S)
        elif answers is not None and self.rank != min(answers, default=self.rank):
            tell_supervisor("lost")
            os._exit(1)  # a rank before this one tells
        self._give_up(self._hang_line(answers))

    def _give_up(self, line: str) -> None:
        """Write down why a run that is under way ends, and end the process."""
        run = self.run
        if self.rank == 0 and run is not None and self._is_armed:
            _in_time(lambda: write_state(run, "failed", line))
        _end(line)

    def _write_stacks(self) -> None:
        if self.run is None:
            return
        path = self.run / "stacks" / f"rank{self.rank:05d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            who = self.members[self.rank] if self.members else this_process(self.rank)
            at = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{who} at {at}, {self._idle_s:.0f} s after it last moved; {self._step} steps done\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _hang_line(self, answers: Mapping[int, Progress] | None) -> str:
        what = f"nothing has moved for {self._idle_s:.0f} s (--timeout {self.timeout_s:g})"
        if answers is None:
            who = "the host of rank 0 does not answer"
        elif len(self.members) < 2:
            who = f"stopped after step {max(self._step, 0)}"
        elif ranks := behind(answers, len(self.members)):
            named = ", ".join(self._named(rank, answers.get(rank)) for rank in ranks[:8])
            who = f"{len(ranks)} of {len(self.members)} ranks fell behind: {named}"
        else:
            who = f"all ranks stand at the same place, after step {max(self._step, 0)}"
        where = f"; the stacks of every rank that could write are in {self.run / 'stacks'}" if self.run else ""
        return f"{what}: {who}{where}; {self._goes_on()}"

    def _named(self, rank: int, progress: Progress | None) -> str:
        state = "does not answer" if progress is None else f"after step {max(progress.step, 0)}"
        return f"{self.members[rank]} {state}"

    def _loss_line(self, loss: _Loss) -> str:
        reason = f" ({loss.reason})" if loss.reason else ""
        return f"{loss.member} is gone{reason}: {self._goes_on()}"

    def _goes_on(self) -> str:
        tags = _in_time(self._newest)
        if not tags:
            return f"the same command goes on from the newest checkpoint, but {self.run} cannot be read now"
        if self.run is None or tags[0] is None:
            return "nothing is saved yet, the same command starts anew"
        return f"the same command goes on from {self.run / 'checkpoints' / tags[0]}"


def _is_of_collective(error: RuntimeError) -> bool:
    """Return whether the exchange with other ranks has failed, and not a device or a program."""
    return isinstance(error, DistError) or "gloo" in str(error)


def _in_time(action: Callable[[], T]) -> tuple[T, ...]:
    """Return what an action returns, alone; nothing if it fails, or waits too long for a disk, which may be what hangs.

    What it is done for must go on in any case.
    """
    results: list[T] = []

    def act() -> None:
        with contextlib.suppress(Exception):
            results.append(action())

    thread = threading.Thread(target=act, name="watch-disk", daemon=True)
    thread.start()
    thread.join(GRACE_S)
    return tuple(results)


def _end(line: str) -> None:
    """End the process although its main thread does not come out of where it is."""
    _in_time(lambda: to_stderr(f"error: {line}"))
    tell_supervisor("lost")
    os._exit(1)


class _Mail:
    """What a watch reads from and writes to the store of the job, in a thread that may have to wait for the store.

    Every rank hears within a second of a rank that is gone or of a job that hangs. Heartbeats go around between hosts:
    the rank before each host's first one listens to it.
    """

    def __init__(self, watch: Watch, store: Store) -> None:
        self._watch, self._store = watch, store
        self._n = len(watch.members)
        following = watch.members[(watch.rank + 1) % self._n]
        is_elsewhere = following.place != watch.members[watch.rank].place
        self._listened_to = following if is_elsewhere else None
        self._heard, self._heard_at = "", time.monotonic()
        is_here = watch.members[0].place == watch.members[watch.rank].place
        self._holder = watch.members[0] if first_rank_holds_store() else None
        self._holder_here = self._holder.process if self._holder is not None and is_here else None
        self._loss: _Loss | None = None
        self._answers: dict[int, Progress] | None = None
        self._is_answered = threading.Event()

    def publish_loss(self, loss: _Loss) -> None:
        """Tell all ranks of one that is gone, soon."""
        self._loss = self._loss or loss

    def answers(self, wait_s: float) -> dict[int, Progress] | None:
        """Return how far the ranks are that answer; None if the store does not."""
        self._is_answered.wait(wait_s)
        return self._answers

    def run(self) -> None:
        """Read and write until the watch is stopped."""
        sent, beaten_at = False, 0.0
        try:
            while not self._watch.wait(POLL_S):
                if self._holder_here is not None and self._holder_here.is_gone():
                    return  # torch would print a stack of C++ for a store that is gone
                if self._loss is not None and not sent:
                    sent = True
                    self._send_loss(self._loss)
                self._read_loss()
                if time.monotonic() - beaten_at > _BEAT_S:
                    beaten_at = time.monotonic()
                    self._store.set(f"beat/{self._watch.rank}", str(beaten_at))
                    self._listen()
                if self._watch.is_hung.is_set() or self._store.check(["hung"]):
                    self._ask_all()
                    return
        except RuntimeError:  # the store is gone
            if not self._watch.wait(2 * POLL_S) and self._holder is not None:
                self._watch.note_loss(_Loss(member=self._holder, reason=""))

    def _send_loss(self, loss: _Loss) -> None:
        self._store.compare_set("loss", "", json.dumps({"rank": loss.member.rank, "reason": loss.reason}))

    def _read_loss(self) -> None:
        if self._store.check(["loss"]):
            loss = json.loads(self._store.get("loss"))
            self._watch.note_loss(_Loss(member=self._watch.members[loss["rank"]], reason=loss["reason"]))

    def _listen(self) -> None:
        """Note the loss of a rank on another host that has been silent for too long."""
        if self._listened_to is None:
            return
        key = f"beat/{self._listened_to.rank}"
        heard = str(self._store.get(key)) if self._store.check([key]) else ""
        if heard != self._heard:
            self._heard, self._heard_at = heard, time.monotonic()
        elif time.monotonic() - self._heard_at > _SILENT_S:
            reason = f"not heard of for {_SILENT_S:.0f} s"
            self._watch.note_loss(_Loss(member=self._listened_to, reason=reason))

    def _ask_all(self) -> None:
        """Let every rank write its stacks and say how far it is."""
        self._store.set("hung", "1")
        self._watch.is_hung.set()
        self._store.set(f"at/{self._watch.rank}", json.dumps(asdict(self._watch.progress())))
        time.sleep(_ANSWER_S)
        answers = {}
        for rank in range(self._n):
            if self._store.check([f"at/{rank}"]):
                answers[rank] = Progress(**json.loads(self._store.get(f"at/{rank}")))
        self._answers = answers
        self._is_answered.set()
