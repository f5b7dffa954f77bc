"""The one thread that owns torch: it loads the bundle, then draws what waits in the queue, batch by batch."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dalle.best_of_n import Judge, Ranked
from dalle.pipeline import Pipeline
from dalle.server.queueing.batch import Draw, Work, draw, fits
from dalle.server.queueing.jobs import Job, Queue, Rows
from dalle.server.queueing.unclip import draw_by_unclip
from dalle.unclip.pipeline import UnCLIP
from rerank.tokenizer import N_SPECIAL
from storage.errors import reason_of

logger = logging.getLogger(__name__)

FAVOURITES = 16
"""First candidates among which the likeliest best is looked for while they are unfinished."""
MIN_PREVIEW_S = 0.25
"""Seconds between growing previews of a job at least."""
PREVIEW_COST = 5
"""Seconds between growing previews at least, in those that one takes: a fifth of the time, at most, goes to them."""


@dataclass(frozen=True, kw_only=True)
class BatchTimes:
    """What a batch was and how long it took."""

    n_jobs: int
    n_candidates: int
    n_tokens: int
    """Sampled ones."""
    sampling_s: float
    judging_s: float
    """Decoding, scoring and choosing."""


class Observer(Protocol):
    """Is told what happens, on the engine's thread."""

    def batch_done(self, times: BatchTimes) -> None:
        """Take note of a batch."""


class _NobodyWaitsError(Exception):
    """All jobs of a batch were cancelled or have failed."""


class Engine:
    """Draws jobs, one batch at a time.

    Args:
        load: returns the bundle; called on the engine's thread.
        queue: what to draw; closing it ends the thread.
        observer: is told of batches.
        draw: replaces `dalle.server.queueing.batch.draw` in tests.
        load_unclip: returns the bundle's DALL·E 2, called as `load`; None for a bundle without it.
    """

    def __init__(
        self,
        load: Callable[[], Pipeline],
        queue: Queue,
        observer: Observer,
        draw: Draw = draw,
        load_unclip: Callable[[], UnCLIP] | None = None,
    ) -> None:
        self._load, self.queue, self._observer, self._draw = load, queue, observer, draw
        self._load_unclip = load_unclip
        self.unclip: UnCLIP | None = None
        """The bundle's DALL·E 2, if it has one, as soon as `pipe` is there."""
        self.pipe: Pipeline | None = None
        """The bundle, once it is loaded and has sampled once."""
        self.failure: Exception | None = None
        """Why it could not be loaded."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called when it could not be loaded, on the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until the thread has ended, which it does when the queue is closed and empty."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            pipe = self._load()
            pipe.sample_tokens(["a first picture"], 1)  # what is set up at first use is not part of the first request
            self.unclip = None if self._load_unclip is None else self._load_unclip()
        except Exception as error:
            self.failure = error
            self.queue.end_all()
            self.on_failure()
            return
        self.pipe = pipe
        while jobs := self.queue.take(lambda works: fits(pipe, works)):
            self._serve(pipe, jobs)

    def _serve(self, pipe: Pipeline, jobs: Sequence[Job]) -> None:
        """Draw jobs that share a batch; if that fails, each work by itself, so that it takes no other along."""
        begun = [job for job in jobs if job.begin()]
        works = list(dict.fromkeys(job.work for job in begun))
        error = self._try(pipe, works, begun) if works else None
        if error is not None and len(works) == 1:
            self._fail(begun, error)
        elif error is not None:
            logger.warning("a batch of %d works failed (%s): each is tried alone", len(works), reason_of(error, 200))
            for work in works:
                alone = [job for job in begun if job.work == work and not job.has_ended]
                if alone and (error := self._try(pipe, [work], alone)) is not None:
                    self._fail(alone, error)

    def _try(self, pipe: Pipeline, works: Sequence[Work], jobs: Sequence[Job]) -> Exception | None:
        """Draw works for their jobs; returns what went wrong."""
        try:
            self._draw_all(pipe, works, jobs)
        except _NobodyWaitsError:
            return None
        except Exception as error:
            return error
        return None

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            kind, reason = type(error).__name__, reason_of(error, 300)
            logger.error("a job of %d candidates failed: %s: %s", job.work.n, kind, reason)
            self.queue.end(job, "failed", error=error)

    def _draw_all(self, pipe: Pipeline, works: Sequence[Work], jobs: Sequence[Job]) -> None:
        for job in jobs:
            n_text, most = self._text_tokens(pipe, job.work)
            job.n_text_tokens = min(n_text, most)
            job.caption_cut = n_text - job.n_text_tokens
        watch = _Watch(pipe.dalle.config.grid, self.queue, jobs)
        started_at = time.monotonic()
        results: Mapping[Work, Ranked]
        if works[0].drawing is None:
            results = self._draw(pipe, works, watch)
        else:
            assert self.unclip is not None, "only what the bundle has is asked for"
            results = {works[0]: draw_by_unclip(self.unclip, works[0], watch.came_to)}
            watch.sampling_s = time.monotonic() - started_at
        elapsed_s = time.monotonic() - started_at
        for job in jobs:
            if job.work in results:
                self.queue.end(job, "done", result=results[job.work])
        n_candidates = sum(work.n for work in works)
        self.queue.took(works[0].by, n_candidates, elapsed_s)
        self._observer.batch_done(
            BatchTimes(
                n_jobs=len(jobs),
                n_candidates=n_candidates,
                n_tokens=watch.n_tokens,
                sampling_s=watch.sampling_s,
                judging_s=elapsed_s - watch.sampling_s - watch.showing_s,
            )
        )

    def _text_tokens(self, pipe: Pipeline, work: Work) -> tuple[int, int]:
        """Return how many text tokens a work's caption has, and how many are read at most."""
        if work.drawing is None:
            return len(pipe.tokenizer.encode(work.caption)), pipe.dalle.config.max_caption
        assert self.unclip is not None
        clip = self.unclip.clip
        assert clip.tokenizer is not None
        return len(clip.tokenizer.encode(work.caption)), clip.config.context_length - N_SPECIAL


class _Watch:
    """Passes on what is drawn to the jobs, and drops works whose jobs have all ended."""

    def __init__(self, grid: int, queue: Queue, jobs: Sequence[Job]) -> None:
        self._grid, self._queue, self._jobs = grid, queue, jobs
        self._judges: dict[Work, Judge] = {}
        self._drawn_before: dict[Work, int] = {}
        self._shown_at: dict[str, float] = {}
        self._preview_s = 0.0
        self._n_rows = 0
        self._last_at = time.monotonic()
        self.n_tokens = 0
        self.sampling_s = self.showing_s = 0.0

    def begun(self, work: Work, judge: Judge) -> None:
        self._judges[work] = judge
        self._last_at = time.monotonic()

    def sampled(self, tokens: dict[Work, Tensor]) -> Collection[Work]:
        gone = self._gone(tokens)
        now = time.monotonic()
        self.sampling_s += now - self._last_at
        for work, tokens_nJ in tokens.items():
            self.n_tokens += len(tokens_nJ)
            n_rows, rest = divmod(tokens_nJ.shape[1], self._grid)
            if rest == 0 and work not in gone:
                self._show(work, tokens_nJ, n_rows)
        self.showing_s += time.monotonic() - now
        self._last_at = time.monotonic()
        return gone

    def judged(self, work: Work) -> None:
        self._gone([work])
        self._last_at = time.monotonic()

    def came_to(self, share: float) -> None:
        """Tell the jobs how much of a work that DALL·E 2 draws alone is done, as rows."""
        self._gone(())
        n_rows = int(share * self._grid)
        if n_rows > self._n_rows:
            self._n_rows = n_rows
            for job in self._jobs:
                job.tell(Rows(n_rows, [], None))

    def _gone(self, works: Collection[Work]) -> set[Work]:
        """Return the works that nobody waits for.

        Raises:
            _NobodyWaitsError: no job at all is left.
        """
        self._queue.end_late_ones()
        wanted = {job.work for job in self._jobs if not job.has_ended}
        if not wanted:
            raise _NobodyWaitsError
        return set(works) - wanted

    def _show(self, work: Work, tokens_nJ: Tensor, n_rows: int) -> None:
        """Show the rows of a work to the jobs that want to see them; those of its first batch only."""
        first = self._drawn_before.setdefault(work, 0)
        if n_rows == self._grid:
            self._drawn_before[work] = first + len(tokens_nJ)
        for job in self._jobs:
            if job.work != work or job.has_ended:
                continue
            if first == 0 and n_rows in job.previews.rows:
                self._tell_of(job, [self._favourite(work, tokens_nJ)], tokens_nJ, n_rows)
            if job.previews.growing:
                due = max(MIN_PREVIEW_S, PREVIEW_COST * self._preview_s)
                is_due = time.monotonic() - self._shown_at.get(job.id, 0.0) >= due or n_rows == self._grid
                shown = range(min(len(tokens_nJ), job.previews.growing)) if first == 0 and is_due else ()
                self._tell_of(job, shown, tokens_nJ, n_rows)

    def _tell_of(self, job: Job, shown: Sequence[int], tokens_nJ: Tensor, n_rows: int) -> None:
        tops = None
        if shown:
            started_at = time.monotonic()
            with torch.inference_mode():
                some_kJ = torch.split(tokens_nJ[list(shown)], FAVOURITES)
                tops = torch.cat([self._judges[job.work].decode(tokens_kJ) for tokens_kJ in some_kJ]).cpu()
            self._shown_at[job.id] = time.monotonic()
            self._preview_s = self._shown_at[job.id] - started_at
        job.tell(Rows(n_rows, list(shown), tops))

    def _favourite(self, work: Work, tokens_nJ: Tensor) -> int:
        """Return the candidate whose top fits the caption best so far."""
        if len(tokens_nJ) == 1 or not work.caption:
            return 0
        return int(self._judges[work].score_tops(tokens_nJ[:FAVOURITES]).argmax())
