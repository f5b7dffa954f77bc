"""The web page, and the jobs behind it, which outlive the connection that made them, and are cancelled explicitly.

A page that is loaded again finds its job by the id that it remembers. Growing candidates come as one picture of all of
them beside each other, at most four times a second.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dalle.editing.regions import Region
from dalle.server.api.errors import APIError, wrong
from dalle.server.api.requests import PICTURES, Endpoint, names_of_both, read_ask
from dalle.server.pictures import encode, sheet, unfinished
from dalle.server.queueing.batch import Source
from dalle.server.queueing.jobs import Ended, Event, Job, Previews, Rows
from dalle.server.state import State
from dalle.server.streams import PING, PING_S, events, failure, read_json, sse, stream, submit

SHOWN = 64
"""Candidates that grow on the page, and pictures that are answered to it, at most."""
COLUMNS = 8
"""Of the sheet of growing candidates."""
MAX_JOBS = 200
"""Jobs of pages that are remembered, beside those that have not ended."""
_TOLD = ("score", "log_likelihood", "candidate", "rank")
"""Of each picture, to the page."""
WAIT_S = 1.0
"""Seconds between what is told of a job that waits."""
WEB = Path(__file__).parent / "web"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8") for name in ("app", "history", "paint")},
}


@dataclass
class _PageJob:
    """A job, and what a page that comes late must know."""

    job: Job
    rows: Rows | None = None
    """The last that were shown."""
    pictures: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Of the pictures, in the results."""
    is_complete: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether it has ended, and its pictures are there."""


class Page:
    """The handlers of the page.

    Args:
        state: what all routes share.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._jobs: dict[str, _PageJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._files = {path: ((WEB / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    def routes(self) -> list[Route]:
        """Return the page's routes."""
        return [
            *(Route(path, self.file) for path in FILES),
            Route("/api/info", self.info),
            Route("/api/jobs", self.create, methods=["POST"]),
            Route("/api/jobs/{id}/events", self.events),
            Route("/api/jobs/{id}/pictures/{k:int}", self.picture),
            Route("/api/jobs/{id}", self.cancel, methods=["DELETE"]),
        ]

    async def file(self, request: Request) -> Response:
        """Answer one of the files."""
        data, kind = self._files[request.url.path]
        return Response(data, headers={"Content-Type": kind, "Cache-Control": "no-cache"})

    async def info(self, request: Request) -> Response:
        """GET /api/info: what the page has to know of the bundle and the server."""
        limits, pipe = self._state.limits(), self._state.pipe()
        defaults = limits.defaults
        return JSONResponse(
            {
                "model": limits.models[0],
                "both": names_of_both(limits.models[0]) if limits.unclip is not None else (),
                "by_unclip": sorted(limits.unclip.endpoints - {"generations"}) if limits.unclip is not None else (),
                "size": limits.native,
                "grid": limits.grid,
                "image_vocab": limits.image_vocab,
                "best_of": limits.best_of,
                "max_candidates": limits.max_candidates,
                "shown": SHOWN,
                "defaults": {
                    "temperature": defaults.temperature,
                    "top_k": defaults.top_k,
                    "top_p": defaults.top_p,
                    "guidance": defaults.guidance,
                    "rank": defaults.rank,
                },
                "hashes": pipe.hashes,
                "seconds_per_candidate": self._state.engine.queue.seconds_per_candidate,
            }
        )

    async def create(self, request: Request) -> Response:
        """POST /api/jobs: the Images API's fields, of edits with `image` and `mask` in base64; answers the job's id."""
        values = await read_json(request)
        limits = self._state.limits()
        files = {name: _decoded(name, values.pop(name)) for name in PICTURES if values.get(name) is not None}
        limits = replace(limits, max_n=min(SHOWN, limits.max_candidates))
        endpoint: Endpoint = "generations"
        if files:
            endpoint = "edits" if "mask" in files or values.get("strength") is None else "variations"
        ask = read_ask(values, limits, endpoint)
        source = await self._state.source(ask, files) if files else None
        self._state.note(request, ask)
        previews = Previews(growing=min(SHOWN, ask.best_of))
        job = self._state.job(ask, request.state.owner, "page", source=source, previews=previews)
        submit(self._state.engine.queue, job)  # one that is refused is not remembered
        self._watch(job)
        return JSONResponse({"id": job.id, "seed": ask.seed}, status_code=201)

    async def events(self, request: Request) -> Response:
        """GET /api/jobs/{id}/events: from where Last-Event-ID says, as server-sent events."""
        after = request.headers.get("last-event-id", "")
        return stream(self._events(self._job(request), int(after) if after.isdecimal() and len(after) < 6 else 0))

    async def cancel(self, request: Request) -> Response:
        """DELETE /api/jobs/{id}."""
        self._state.engine.queue.cancel(self._job(request).job)
        return Response(status_code=204)

    async def picture(self, request: Request) -> Response:
        """GET /api/jobs/{id}/pictures/{k}: a PNG with its metadata, 0 being the best."""
        names, k = self._job(request).names, request.path_params["k"]
        kept = self._state.results.get(names[k]) if 0 <= k < len(names) else None
        if kept is None:
            raise APIError(404, "there is no such picture (any more)")
        return Response(kept.data, media_type=kept.media_type)

    def _job(self, request: Request) -> _PageJob:
        found = self._jobs.get(request.path_params["id"])
        if found is None:
            raise APIError(404, "there is no such job (any more)")
        return found

    def _watch(self, job: Job) -> None:
        """Remember a job, what was last shown of it, and its pictures when it has ended."""
        page_job = self._jobs[job.id] = _PageJob(job)
        ended = [name for name, one in self._jobs.items() if one.is_complete.is_set()]
        for name in ended[: max(0, len(self._jobs) - MAX_JOBS)]:
            del self._jobs[name]
        loop = asyncio.get_running_loop()

        def listener(event: Event) -> None:
            if isinstance(event, Rows) and event.tops is not None:
                page_job.rows = event
            if isinstance(event, Ended):
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(complete)

        def complete() -> None:
            task = asyncio.ensure_future(self._complete(page_job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        job.listen(listener)

    async def _complete(self, page_job: _PageJob) -> None:
        """Encode the pictures of a job, and let go of its tensors."""
        job = page_job.job
        try:
            if job.result is not None:
                await asyncio.to_thread(self._encode, page_job)
        finally:
            job.result = page_job.rows = None
            job.work = replace(job.work, source=None)
            page_job.is_complete.set()

    def _encode(self, page_job: _PageJob) -> None:
        job = page_job.job
        assert job.result is not None
        for place, image in enumerate(job.result.images):
            texts = self._state.texts(job, place)
            data = encode(image, side=image.shape[-1], output_format="png", compression=100, texts=texts)
            page_job.names.append(self._state.results.add(data, "image/png"))
            page_job.pictures.append({name: texts.get(name) for name in _TOLD})

    async def _events(self, page_job: _PageJob, after: int) -> AsyncIterator[bytes]:
        job, queue = page_job.job, self._state.engine.queue
        source = job.work.source  # until the job has ended
        told_at = time.monotonic()
        if page_job.rows is not None and page_job.rows.n_rows > after:
            yield await asyncio.to_thread(self._rows, page_job.rows, source)
        async for event in events(job, WAIT_S):
            if event is None and job.state == "queued":
                yield sse("waiting", {"before": queue.before(job)})
            elif event is None and time.monotonic() - told_at < PING_S:
                continue
            elif event is None:
                yield PING
            elif isinstance(event, Rows):
                yield await asyncio.to_thread(self._rows, event, source)
            elif isinstance(event, Ended):
                await page_job.is_complete.wait()
                if job.state == "done":
                    seconds = job.ended_at - job.begun_at
                    yield sse("done", {"pictures": page_job.pictures, "seconds": seconds, "cut": job.caption_cut})
                else:
                    yield sse("failed", {"state": job.state, **failure(job).body()})
            told_at = time.monotonic()

    def _rows(self, event: Rows, source: Source | None) -> bytes:
        pipe = self._state.engine.pipe
        assert pipe is not None
        about: dict[str, Any] = {"rows": event.n_rows, "grid": pipe.dalle.config.grid}
        tops = event.tops
        if tops is not None:
            if isinstance(source, Region):  # what is kept below is known too
                side = len(source.is_new)
                row = tops.shape[2] // event.n_rows
                tops = source.paste(torch.stack([unfinished(top, side, row) for top in tops]))
            columns = min(COLUMNS, len(tops))
            data = base64.b64encode(sheet(tops, columns)).decode()
            about |= {"sheet": data, "columns": columns, "count": len(tops), "height": tops.shape[2]}
        return sse("rows", about, event.n_rows)


def _decoded(name: str, encoded: object) -> bytes:
    """Return the bytes of a file in base64."""
    if not isinstance(encoded, str):
        raise wrong(name, f"the {name} is no text: send the picture's file in base64", "invalid_type")
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:  # binascii.Error is one
        raise wrong(name, f"the {name} is not in base64: {error}", "invalid_image") from error
