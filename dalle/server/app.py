"""The routes: OpenAI's Images API, models, pictures by id, health and metrics."""

import asyncio
import base64
import logging
import time
import traceback
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dalle.best_of_n import Result
from dalle.editing.redraw import Redrawn
from dalle.editing.regions import Region
from dalle.server.api.answers import Drawn, Usage, answer, completed_event, partial_event
from dalle.server.api.errors import APIError, wrong
from dalle.server.api.requests import MEDIA_TYPES, PICTURES, Ask, Endpoint, read_ask, unknown_model
from dalle.server.metrics import MEDIA_TYPE
from dalle.server.page import Page
from dalle.server.pictures import encode, unfinished
from dalle.server.queueing.batch import Source
from dalle.server.queueing.jobs import Ended, Job, Previews, Rows
from dalle.server.security import Guard, Rules, error_response
from dalle.server.state import State, details
from dalle.server.streams import PING, ClientGoneError, events, failure, read_json, sse, stream, submit, until_ended
from storage.errors import reason_of

logger = logging.getLogger(__name__)

MAX_FILES, MAX_FIELDS, MAX_FIELD = 4, 40, 200_000
"""Of a form; the last is in bytes."""
CLIENT_GONE = 499
"""Status in the log of a request that nobody waits for any more."""


class Routes:
    """The handlers.

    Args:
        state: what they share.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    async def generate(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        values = await read_json(request)
        ask = read_ask(values, self._state.limits(), "generations")
        return await self._draw(request, ask, "generations", None)

    async def edit(self, request: Request) -> Response:
        """POST /v1/images/edits: any part of a picture is drawn anew."""
        values, files = await _read_form(request)
        ask = read_ask(values, self._state.limits(), "edits")
        return await self._draw(request, ask, "edits", await self._state.source(ask, files))

    async def vary(self, request: Request) -> Response:
        """POST /v1/images/variations: a share of a picture's tokens, or of its noise, is drawn anew."""
        values, files = await _read_form(request, ("image",))
        ask = read_ask(values, self._state.limits(), "variations")
        return await self._draw(request, ask, "variations", await self._state.source(ask, files))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._state.settings.models]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        name, known = request.path_params["name"], self._state.settings.models
        if name not in known:
            raise unknown_model(name, known)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._state.settings.created, "owned_by": "dalle"}

    async def picture(self, request: Request) -> Response:
        """GET /pictures/{name}."""
        kept = self._state.results.get(request.path_params["name"].partition(".")[0])
        if kept is None:
            raise APIError(404, "there is no such picture (any more): they are kept for an hour")
        return Response(kept.data, media_type=kept.media_type, headers={"Cache-Control": "private, max-age=3600"})

    async def health(self, request: Request) -> Response:
        """GET /healthz: the process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /readyz: requests are taken."""
        self._state.pipe()
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(await asyncio.to_thread(self._state.metrics.text), headers={"Content-Type": MEDIA_TYPE})

    async def _draw(self, request: Request, ask: Ask, endpoint: Endpoint, source: Source | None) -> Response:
        state = self._state
        state.note(request, ask)
        previews = Previews()
        if ask.drawing is None:  # DALL·E 2 draws no rows to be shown
            previews = Previews(rows=_partial_rows(_drawn_rows(source, state.limits().grid), ask.partial_images))
        job = state.job(ask, request.state.owner, endpoint, source=source, previews=previews)
        submit(state.engine.queue, job)
        headers = {"X-Ignored-Parameters": ", ".join(ask.ignored)} if ask.ignored else {}
        if ask.stream:
            response: Response = stream(self._events(job, ask, endpoint))
        else:
            await until_ended(job, state.engine.queue, request)
            if job.state != "done":
                raise failure(job)
            response = JSONResponse(await asyncio.to_thread(self._answer, job, ask, request))
        response.headers.update(headers)
        return response

    def _answer(self, job: Job, ask: Ask, request: Request) -> dict[str, Any]:
        """Return the body of a finished job's answer."""
        assert job.result is not None
        places = range(len(job.result.images))  # an edit may find fewer different ones than were asked for
        drawn = [self._drawn(job, ask, place, self._base_url(request)) for place in places]
        created = int(time.time())
        return answer(ask, drawn, _usage(job), created=created, caption_cut=job.caption_cut)

    def _drawn(self, job: Job, ask: Ask, place: int, base_url: str) -> Drawn:
        result = job.result
        assert result is not None
        texts = self._state.texts(job, place) if ask.metadata else None
        options: dict[str, Any] = {"output_format": ask.output_format, "compression": ask.compression}
        data = encode(result.images[place], side=ask.side, texts=texts, **options)
        if ask.as_url:
            name = self._state.results.add(data, MEDIA_TYPES[ask.output_format])
            found = f"{base_url}/pictures/{name}.{ask.output_format}"
        else:
            found = base64.b64encode(data).decode()
        return Drawn(
            place=found,
            score=float(result.scores[place]) if ask.prompt or ask.drawing is not None else None,
            log_likelihood=float(result.log_likelihoods[place]) if isinstance(result, Result) else None,
            rank=place + 1,
            candidate=result.candidates[place],
            details=details(result, place),
        )

    async def _events(self, job: Job, ask: Ask, endpoint: Endpoint) -> AsyncIterator[bytes]:
        """Yield a job as server-sent events; cancel it if nobody listens any more."""
        index = 0
        try:
            async for event in events(job):
                if event is None:
                    yield PING
                elif isinstance(event, Rows) and event.tops is not None:
                    b64_json = await asyncio.to_thread(_partial, event, job.work.source, ask)
                    created = int(time.time())
                    partial = partial_event(ask, endpoint, b64_json, index=index, created=created)
                    yield sse(partial["type"], partial)
                    index += 1
                elif isinstance(event, Ended) and job.state == "done":
                    assert job.result is not None
                    for place in range(len(job.result.images)):
                        drawn = await asyncio.to_thread(self._drawn, job, ask, place, "")
                        done = completed_event(
                            ask,
                            endpoint,
                            drawn,
                            _usage(job),
                            created=int(time.time()),
                            caption_cut=job.caption_cut,
                        )
                        yield sse(done["type"], done)
                elif isinstance(event, Ended):
                    yield sse("error", failure(job).body())
        finally:
            if not job.has_ended:
                self._state.engine.queue.cancel(job)

    def _base_url(self, request: Request) -> str:
        return (self._state.settings.public_url or str(request.base_url)).rstrip("/")


def _drawn_rows(source: Source | None, grid: int) -> range:
    """Return the rows of tokens from the first to the last in which something is drawn."""
    if not isinstance(source, Region):
        return range(grid)
    rows = source.unknown(grid).reshape(grid, grid).any(1).nonzero()
    return range(int(rows[0]), int(rows[-1]) + 1)


def _partial_rows(drawn: range, n: int) -> frozenset[int]:
    """Return after which rows a picture is shown n times before it is finished, evenly over those that are drawn."""
    rows = {drawn.start + len(drawn) * i // (n + 1) for i in range(1, n + 1)}
    return frozenset(row for row in rows if drawn.start < row < drawn.stop)


def _partial(event: Rows, source: Source | None, ask: Ask) -> str:
    """Return an unfinished picture in base64."""
    assert event.tops is not None
    top = event.tops[0]
    whole = unfinished(top, ask.native, top.shape[1] // event.n_rows)
    if isinstance(source, Region):
        whole = source.paste(whole[None])[0]
    options: dict[str, Any] = {"output_format": ask.output_format, "compression": ask.compression, "texts": None}
    return base64.b64encode(encode(whole, side=ask.side, **options)).decode()


def _usage(job: Job) -> Usage:
    assert job.result is not None
    if not isinstance(job.result, Result):  # not drawn as tokens
        return Usage(text_tokens=job.n_text_tokens, image_tokens=0, output_tokens=0)
    n_image = job.result.tokens.shape[1]
    given = n_image - job.result.n_unknown if isinstance(job.result, Redrawn) else 0
    return Usage(text_tokens=job.n_text_tokens, image_tokens=given, output_tokens=(n_image - given) * job.work.n)


async def _read_form(
    request: Request, pictures: tuple[str, ...] = PICTURES
) -> tuple[dict[str, object], dict[str, bytes]]:
    """Return the texts and the files of a form; an empty text, which some programs send, is the same as none.

    Raises:
        APIError: it is no form, or has more of anything than allowed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise APIError(
            415, f"the body is {kind[:60] or 'of no type'}; expected multipart/form-data with a file `image`"
        )
    values: dict[str, object] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD) as form:
        for key, value in form.multi_items():
            if value == "":
                continue
            name = key.removesuffix("[]")
            if isinstance(value, UploadFile) and name not in pictures:
                raise wrong(
                    name[:60], f"unexpected file {name[:60]!r}: expected {' and '.join(pictures)}", "unknown_parameter"
                )
            if name in values or name in files:
                raise wrong(name[:60], f"{name[:60]} is given more than once: give one", "duplicate")
            if isinstance(value, UploadFile):
                files[name] = await value.read()
            elif name in PICTURES:
                raise wrong(name, f"{name} is a text: send a file; addresses of pictures are not fetched")
            else:
                values[name] = value
    return values, files


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer what the router and the reader of forms refuse."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    messages = {
        404: f"there is nothing at {path}: the base URL of the API ends in /v1, as in /v1/models",
        405: f"{path} does not take {request.method[:10]}",
    }
    message = messages.get(error.status_code, error.detail)
    return error_response(APIError(error.status_code, message, headers=dict(error.headers or {})))


async def _unexpected(request: Request, error: Exception) -> Response:
    where = traceback.extract_tb(error.__traceback__)[-1]
    kind, reason = type(error).__name__, reason_of(error, 300)
    logger.error("%s failed: %s: %s (%s:%s)", request.state.request_id, kind, reason, where.filename, where.lineno)
    headers = {"x-should-retry": "false"}
    return error_response(APIError(500, "the server failed: its log has the reason", headers=headers))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def make_app(state: State, rules: Rules) -> Guard:
    """Return the application."""
    routes = Routes(state)
    kinds = {"/v1/images/generations": "generations", "/v1/images/edits": "edits", "/api/jobs": "page"}
    kinds["/v1/images/variations"] = "variations"

    async def counted(request: Request, error: Exception) -> Response:
        if request.url.path in kinds:
            state.metrics.refused(kinds[request.url.path])
        return await _api_error(request, error)

    app = Starlette(
        routes=[
            Route("/v1/images/generations", routes.generate, methods=["POST"]),
            Route("/v1/images/edits", routes.edit, methods=["POST"]),
            Route("/v1/images/variations", routes.vary, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/pictures/{name}", routes.picture),
            Route("/healthz", routes.health),
            Route("/readyz", routes.ready),
            Route("/metrics", routes.metrics),
            *Page(state).routes(),
        ],
        exception_handlers={
            APIError: counted,
            HTTPException: _http_error,
            ClientGoneError: _gone,
            Exception: _unexpected,
        },
    )
    app.router.redirect_slashes = False
    return Guard(app, rules)
