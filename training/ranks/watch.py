"""The watch of each rank over its launchers, the other ranks and the clock while it trains.

1. When a launcher is gone, such as `deepspeed` after SIGTERM or `torchrun` after kill -9, its ranks act as after a
   SIGTERM of their own. A shell is no launcher, so `nohup` keeps its meaning.
2. When a rank is gone, the others end and name it. On one host /proc shows it within a second; of a rank on another
   host, a heartbeat is missed (`news.py`).
3. When nothing has moved for as long as the user allows, every rank writes the stacks of its threads, the ranks that
   fell behind are named, and the job ends.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch.distributed import DistError, Store  # type: ignore[attr-defined]  # public, but torch does not say so to mypy

from dalle.output.text import to_stderr
from storage.errors import reason_of
from storage.process import Process
from training.ranks.environment import tell_supervisor
from training.ranks.news import HEARTBEAT_S, MAX_SILENCE_S, POLL_S, LostRank, News, RankPosition, ranks_behind
from training.ranks.processes import Member, launchers, this_member
from training.ranks.stop import stop_this_process
from training.run_files import STACKS, stacks_path, write_state

T = TypeVar("T")

TIMEOUT_S = 1800.0
"""Default seconds without progress after which a job counts as hung."""
MAX_TIMEOUT_S = 250_000
"""Longest timeout: gloo counts eight times as long in milliseconds, in 31 bits."""
FIRST_STEP_FACTOR = 4
"""Times the timeout that the first step may take, with all that comes before it: building, loading, compiling."""
GRACE_S = 10.0
"""Seconds for a rank to end by itself after another one is lost, for positions to arrive, and for a disk to answer."""


class RankLostError(OSError):
    """Another rank is gone, so training cannot continue."""


class Watch:
    """Watches for one rank, in threads, from `start` to `stop`.

    Args:
        members: all ranks in order; empty if they are not known.
        rank: of this process.
        store: the job's, for this watch alone; None: only processes of this host are watched.
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
        """Folder of the run that trains now, or of the last one."""
        self.lost: LostRank | None = None
        """The first rank that was found to be lost."""
        self._newest: Callable[[], str | None] = lambda: None
        self._is_hung = threading.Event()
        self._news: News | None = None
        if store is not None and len(self.members) > 1:
            self._news = News(
                self.members,
                rank,
                store,
                position=self.position,
                on_lost=self.note_lost,
                is_hung=self._is_hung,
            )
        self._launchers: tuple[Process, ...] = ()
        here = self.members[rank].place if self.members else ""
        self._neighbours = [member for member in self.members if member.place == here and member.rank != rank]
        self._has_run = False
        self._idle_s, self._touches, self._step = 0.0, 0, -1
        self._waited_s = 0.0
        self._stopped = threading.Event()
        self._main_thread = threading.main_thread()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to watch; further calls do nothing."""
        if self._thread is None:
            self._launchers = launchers(os.getpid())
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()
            if self._news is not None:
                self._news.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(2 * POLL_S)
            if self._news is not None:
                self._news.stop()

    def follow(self, run: Path, newest: Callable[[], str | None]) -> None:
        """Expect progress from now on: a run starts or resumes.

        Args:
            run: its folder.
            newest: returns the name of the checkpoint that it would resume from; None without one.
        """
        self._newest = newest
        self.run, self._idle_s, self._touches, self._step = run, 0.0, 0, -1
        self._has_run = True

    def unfollow(self) -> None:
        """Expect no more progress: the run has ended."""
        self._has_run = False

    def touch(self, step: int | None = None) -> None:
        """Note progress; `step` is the number of steps done, if one has just ended."""
        self._idle_s = 0.0
        self._touches += 1
        if step is not None:
            if self._step < 0:
                tell_supervisor("started")
            self._step = step

    def position(self) -> RankPosition:
        """Return how far this rank is."""
        frame = sys._current_frames().get(self._main_thread.ident or 0)
        is_waiting = False
        while frame is not None:
            is_waiting = is_waiting or frame.f_code.co_filename.endswith("distributed_c10d.py")
            frame = frame.f_back
        return RankPosition(touches=self._touches, is_waiting=is_waiting, step=self._step)

    def lost_rank_error(self, error: BaseException | None, wait_s: float = GRACE_S / 2) -> RankLostError | None:
        """Return an error that names the lost rank behind a failed collective; None if no rank is lost.

        Waits for the news, which may come after the collective fails: for a rank on another host until a heartbeat is
        missed.

        Args:
            error: the error that was raised here.
            wait_s: seconds to wait for news of this host, in all calls together.
        """
        if len(self.members) < 2 or self._thread is None or not isinstance(error, RuntimeError):
            return None
        is_elsewhere = len(self._neighbours) + 1 < len(self.members) and _is_of_collective(error)
        if is_elsewhere:
            wait_s += MAX_SILENCE_S + 3 * HEARTBEAT_S
        while self.lost is None and self._waited_s < wait_s:
            time.sleep(POLL_S / 10)
            self._waited_s += POLL_S / 10
        if self.lost is not None:
            if self._news is not None:
                time.sleep(2 * POLL_S)  # let the news out: ranks on other hosts see no processes of this one
            return RankLostError(self._lost_line(self.lost))
        if is_elsewhere:
            text = reason_of(error, 200)
            return RankLostError(f"another rank is gone, unknown which ({text}): {self._how_to_resume()}")
        return None

    def tell_failure(self, reason: str) -> None:
        """Tell the other ranks that this one ends, and why."""
        if self._news is not None and self._thread is not None and self.lost is None:
            self._news.tell_lost(LostRank(member=self.members[self.rank], reason=reason))
            time.sleep(3 * POLL_S)  # the store may end with this process

    def note_lost(self, lost: LostRank) -> None:
        """Note a lost rank, and tell the others; the first one counts."""
        if self.lost is None and lost.member.rank != self.rank:
            self.lost = lost
            if self._news is not None:
                self._news.tell_lost(lost)

    # ------------------------------------------------------------------------------------------ its own thread

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._stopped.wait(POLL_S):
            now = time.monotonic()
            # time in which this process was stopped, or its host slept, does not count
            self._idle_s += min(now - looked_at, 2 * POLL_S)
            looked_at = now
            if any(launcher.is_gone() for launcher in self._launchers):
                self._launchers = ()
                stop_this_process()
            for member in self._neighbours:
                if member.process.is_gone():
                    self.note_lost(LostRank(member=member, reason=""))
            if self.lost is not None:
                # a failed collective lets the main thread end by itself, with this line
                if not self._stopped.wait(GRACE_S):
                    self._give_up(self._lost_line(self.lost))
                return
            limit_s = self.timeout_s * (FIRST_STEP_FACTOR if self._step < 0 else 1)
            if self._is_hung.is_set() or (self._has_run and self._idle_s > limit_s):
                self._end_hung()

    def _end_hung(self) -> None:
        self._is_hung.set()
        if not _in_time(self._write_stacks):
            _in_time(lambda: faulthandler.dump_traceback(sys.stderr, all_threads=True))
        positions = self._news.positions(GRACE_S) if self._news is not None else {self.rank: self.position()}
        if self.rank == 0:  # which may hold the store
            time.sleep(2 * POLL_S)
        elif positions is not None and self.rank != min(positions, default=self.rank):
            tell_supervisor("lost")
            os._exit(1)  # the first rank that answers prints the line
        self._give_up(self._hang_line(positions))

    def _give_up(self, line: str) -> None:
        """End the process; the first rank writes the reason to the run's state."""
        run = self.run
        if self.rank == 0 and run is not None and self._has_run:
            _in_time(lambda: write_state(run, "failed", line))
        end_process(line)

    def _write_stacks(self) -> None:
        if self.run is None:
            return
        path = stacks_path(self.run, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            who = self.members[self.rank] if self.members else this_member(self.rank)
            at = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{who} at {at}, {self._idle_s:.0f} s after it last moved; {self._step} steps done\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _hang_line(self, positions: Mapping[int, RankPosition] | None) -> str:
        what = f"nothing has moved for {self._idle_s:.0f} s (--timeout {self.timeout_s:g})"
        if positions is None:
            who = "the host of rank 0 does not answer"
        elif len(self.members) < 2:
            who = f"stopped after step {max(self._step, 0)}"
        elif ranks := ranks_behind(positions, len(self.members)):
            named = ", ".join(self._named(rank, positions.get(rank)) for rank in ranks[:8])
            who = f"{len(ranks)} of {len(self.members)} ranks fell behind: {named}"
        else:
            who = f"all ranks stand at the same place, after step {max(self._step, 0)}"
        where = f"; the stacks of every rank that could write are in {self.run / STACKS}" if self.run else ""
        return f"{what}: {who}{where}; {self._how_to_resume()}"

    def _named(self, rank: int, position: RankPosition | None) -> str:
        state = "does not answer" if position is None else f"after step {max(position.step, 0)}"
        return f"{self.members[rank]} {state}"

    def _lost_line(self, lost: LostRank) -> str:
        reason = f" ({lost.reason})" if lost.reason else ""
        return f"{lost.member} is gone{reason}: {self._how_to_resume()}"

    def _how_to_resume(self) -> str:
        tags = _in_time(self._newest)
        if not tags:
            return f"the same command resumes from the newest checkpoint, but {self.run} cannot be read now"
        if self.run is None or tags[0] is None:
            return "no checkpoint is saved yet, the same command starts anew"
        return f"the same command resumes from {self.run / 'checkpoints' / tags[0]}"


def _is_of_collective(error: RuntimeError) -> bool:
    """Return whether an error comes from the exchange with other ranks."""
    return isinstance(error, DistError) or "gloo" in str(error)


def _in_time(action: Callable[[], T]) -> tuple[T, ...]:
    """Run an action for at most `GRACE_S`; return (its result,), or () if it failed or took longer.

    The disk may be what hangs, and must not keep a rank from ending.
    """
    results: list[T] = []

    def act() -> None:
        with contextlib.suppress(Exception):
            results.append(action())

    thread = threading.Thread(target=act, name="watch-disk", daemon=True)
    thread.start()
    thread.join(GRACE_S)
    return tuple(results)


def end_process(line: str) -> None:
    """Print an error and end the process, wherever its main thread is."""
    _in_time(lambda: to_stderr(f"error: {line}"))
    tell_supervisor("lost")
    os._exit(1)
