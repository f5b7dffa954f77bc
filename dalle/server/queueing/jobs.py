"""Jobs and the queue that they wait in: bounded, fair to owners, with works of equal settings taken together.

No HTTP and no model: `Engine` runs what `Queue.take` returns, on a thread of its own, and any other thread may submit,
watch and cancel.
"""

import logging
import math
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dalle.best_of_n import Ranked
from dalle.server.queueing.batch import Work
from dalle.unclip.parts import Kind
from storage.errors import reason_of

logger = logging.getLogger(__name__)

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
Ending = Literal["done", "failed", "cancelled"]

COMPANY_S = 0.02
"""How long a job that finds the engine idle waits for others to share its batch."""
MAX_RETRY_AFTER_S = 60
"""The official clients wait as long as they are told, and some give up above this."""


class QueueFullError(Exception):
    """No place in the queue."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s
        """When there may be one: 1 … 60."""


class ClosedError(Exception):
    """The server ends: jobs are accepted no more, and those that are left will not be drawn."""


class LateError(Exception):
    """A job was not done in time."""

    def __init__(self, timeout_s: float, *, was_queued: bool) -> None:
        super().__init__(f"not done within {timeout_s:g} s")
        self.was_queued = was_queued
        """Whether it had not even begun."""


@dataclass(frozen=True)
class Previews:
    """Which unfinished pictures of a job are wanted."""

    rows: frozenset[int] = frozenset()
    """Of the likeliest best candidate, when these rows of tokens are known."""
    growing: int = 0
    """Of so many first candidates, whenever rows are added, as often as they cost little."""


@dataclass(frozen=True)
class Begun:
    """A job's sampling has begun."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a job's candidates are known."""

    n_rows: int
    """Rows of tokens known so far, those that were given among them; of DALL·E 2 the share of its work, as rows."""
    candidates: Sequence[int]
    """Numbers of the candidates shown."""
    tops: Tensor | None
    """float32 (K, 3, H, W) in [0, 1]: their tops, whose last two rows of tokens still change; None: not shown."""


@dataclass(frozen=True)
class Ended:
    """A job has ended: its `state`, `result` and `error` are final."""


Event = Begun | Rows | Ended


class Job:
    """A work that somebody waits for.

    Args:
        work: what to draw.
        owner: whoever is served in turn with others: a key's name, or an address.
        timeout_s: seconds after which it fails, counted from now.
        previews: what is shown of it meanwhile.
        kind: what asked for it, for the metrics.
    """

    def __init__(
        self,
        work: Work,
        *,
        owner: str,
        timeout_s: float = math.inf,
        previews: Previews | None = None,
        kind: str = "",
    ) -> None:
        self.id = secrets.token_hex(16)
        self.work, self.owner, self.timeout_s, self.kind = work, owner, timeout_s, kind
        self.previews = previews or Previews()
        self.state: JobState = "queued"
        self.result: Ranked | None = None
        self.error: Exception | None = None
        self.n_text_tokens = 0
        """Tokens of the caption that the model reads."""
        self.caption_cut = 0
        """Tokens of the caption that it does not."""
        self.submitted_at = time.monotonic()
        self.begun_at = self.ended_at = math.nan
        self._lock = threading.Lock()
        self._listeners: list[Callable[[Event], None]] = []

    @property
    def has_ended(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state not in ("queued", "running")

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() - self.submitted_at > self.timeout_s

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call a function with every event from now on, on any thread, and at once if the job has ended.

        Returns:
            What ends that.
        """
        with self._lock:
            ended = self.has_ended
            if not ended:
                self._listeners.append(listener)
        if ended:
            listener(Ended())

        def stop() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return stop

    def tell(self, event: Event) -> None:
        """Tell the listeners."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(event)
            except Exception as error:  # whoever watches must not end who draws
                logger.error("a listener of a job failed: %s", reason_of(error, 200))

    def begin(self) -> bool:
        """Mark it as running; False if it has ended meanwhile."""
        with self._lock:
            if self.has_ended:
                return False
            self.state, self.begun_at = "running", time.monotonic()
        self.tell(Begun())
        return True

    def end(self, state: Ending, *, result: Ranked | None = None, error: Exception | None = None) -> bool:
        """End it; False, and nothing changes, if it has ended before."""
        with self._lock:
            if self.has_ended:
                return False
            self.result, self.error = result, error
            self.state, self.ended_at = state, time.monotonic()
        self.tell(Ended())
        return True


class Queue:
    """Jobs that wait, served in turn between owners, and first come first served among those of one owner.

    Args:
        max_jobs: that wait at most.
        max_candidates: that wait at most, all jobs together; a job alone may have more.
        on_ended: told of every job that ends.
    """

    def __init__(self, *, max_jobs: int, max_candidates: int, on_ended: Callable[[Job], None] | None = None) -> None:
        self.max_jobs, self.max_candidates = max_jobs, max_candidates
        self._on_ended = on_ended or (lambda job: None)
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._running: list[Job] = []
        self._closed = False
        self.seconds_per_candidate: dict[Kind, float] = {"dalle": 0.05, "unclip": 0.5}
        """Moving means, from which waiting is estimated."""

    def submit(self, job: Job) -> None:
        """Let a job wait.

        Raises:
            QueueFullError: there is no place.
            ClosedError: the server ends.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the server ends: it takes no more requests")
            n_candidates = self.n_candidates
            if self.n_jobs >= self.max_jobs or (n_candidates and n_candidates + job.work.n > self.max_candidates):
                raise QueueFullError(self._retry_after_s())
            self._waiting.setdefault(job.owner, deque()).append(job)
            self._changed.notify_all()

    @property
    def n_jobs(self) -> int:
        """Jobs that wait."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def n_candidates(self) -> int:
        """Candidates of jobs that wait."""
        with self._changed:
            return sum(job.work.n for jobs in self._waiting.values() for job in jobs)

    @property
    def n_running(self) -> int:
        """Jobs of the batch that is drawn, those included that were cancelled while it is being left."""
        with self._changed:
            return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._changed:
            return not self._running and not self.n_jobs

    def before(self, job: Job) -> int:
        """Return how many jobs will be served before one that waits, as it looks now; those that run are counted."""
        with self._changed:
            order = self._order()
            return len(self._running) + (order.index(job) if job in order else 0) if job.state == "queued" else 0

    def take(self, fits: Callable[[Sequence[Work]], bool]) -> list[Job]:
        """Wait for jobs, and return those to draw next, as one batch; none if the queue was closed.

        Args:
            fits: returns whether works that go with one another fit into one batch.
        """
        while True:
            with self._changed:
                self._running = []
                was_idle = not self.n_jobs
                while not self.n_jobs and not self._closed:
                    self._changed.wait()
                if not self.n_jobs:
                    return []
            if was_idle:
                time.sleep(COMPANY_S)
            with self._changed:
                if order := self._order():  # those that waited may have been cancelled
                    self._running = self._together(order, fits)
                    return list(self._running)

    def _together(self, order: Sequence[Job], fits: Callable[[Sequence[Work]], bool]) -> list[Job]:
        """Take the first job, and all whose works are equal to those taken, or fit beside them, out of the queue."""
        taken = [order[0]]
        for job in order[1:]:
            works = dict.fromkeys(one.work for one in taken)
            if job.work in works or (job.work.goes_with(taken[0].work) and fits([*works, job.work])):
                taken.append(job)
        for job in taken:
            self._remove(job)
        if taken[0].owner in self._waiting:
            self._waiting.move_to_end(taken[0].owner)
        return taken

    def cancel(self, job: Job, error: Exception | None = None) -> None:
        """End a job as cancelled, or as failed if there is an error; one that runs is dropped within a token."""
        with self._changed:
            if job.state == "queued":
                self._remove(job)
        self.end(job, "cancelled" if error is None else "failed", error=error)

    def end(self, job: Job, state: Ending, *, result: Ranked | None = None, error: Exception | None = None) -> None:
        """End a job, once."""
        if job.end(state, result=result, error=error):
            self._on_ended(job)

    def end_late_ones(self) -> None:
        """Let the jobs fail whose time is over."""
        with self._changed:
            late = [job for job in [*self._order(), *self._running] if job.is_late and not job.has_ended]
        for job in late:
            self.cancel(job, LateError(job.timeout_s, was_queued=job.state == "queued"))

    def close(self) -> None:
        """Accept no more jobs; those that wait are still served."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def end_all(self) -> None:
        """Let all jobs fail that are left, and accept no more."""
        self.close()
        with self._changed:
            left = [*self._order(), *self._running]
        for job in left:
            self.cancel(job, ClosedError("the server ends: this request was not finished"))

    def took(self, by: Kind, n_candidates: int, seconds: float) -> None:
        """Learn from a batch how long candidates take that a model draws."""
        known = self.seconds_per_candidate[by]
        self.seconds_per_candidate[by] = known + 0.3 * (seconds / max(1, n_candidates) - known)

    def _order(self) -> list[Job]:
        """Return the jobs that wait in the order in which they would be served one by one."""
        queues = [list(jobs) for jobs in self._waiting.values()]
        longest = max(map(len, queues), default=0)
        return [jobs[turn] for turn in range(longest) for jobs in queues if turn < len(jobs)]

    def _remove(self, job: Job) -> None:
        jobs = self._waiting.get(job.owner, deque())
        if job in jobs:
            jobs.remove(job)
        if not jobs:
            self._waiting.pop(job.owner, None)

    def _retry_after_s(self) -> int:
        left = [*self._order(), *self._running]
        seconds = sum(job.work.n * self.seconds_per_candidate[job.work.by] for job in left)
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(seconds)))
