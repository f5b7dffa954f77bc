"""Jobs seen from the event loop: their events in order, their ends, and server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from dalle.server.api.errors import APIError
from dalle.server.queueing.jobs import (
    MAX_RETRY_AFTER_S,
    ClosedError,
    Ended,
    Event,
    Job,
    LateError,
    Queue,
    QueueFullError,
)
from storage.errors import reason_of
from storage.text import parse_json

PING_S = 15.0
"""Seconds of silence after which a comment is sent, so that nothing between takes the connection for dead."""


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


async def until_ended(job: Job, queue: Queue, request: Request) -> None:
    """Wait until a job has ended; cancel it if the client goes away before.

    Raises:
        ClientGoneError: it did.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def listener(event: Event) -> None:
        if isinstance(event, Ended):
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(ended.set)

    stop = job.listen(listener)
    waits = [asyncio.ensure_future(ended.wait()), asyncio.ensure_future(_disconnected(request))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop()
        for wait in waits:
            wait.cancel()
        if not job.has_ended:
            queue.cancel(job)
    if job.state == "cancelled":
        raise ClientGoneError


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events(job: Job, silence_s: float = PING_S) -> AsyncIterator[Event | None]:
    """Yield a job's events until it has ended; None after some seconds without one."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Event] = asyncio.Queue()

    def listener(event: Event) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(arrived.put_nowait, event)

    stop = job.listen(listener)
    try:
        while True:
            try:
                event = await asyncio.wait_for(arrived.get(), silence_s)
            except TimeoutError:
                yield None
                continue
            yield event
            if isinstance(event, Ended):
                return
    finally:
        stop()


def sse(kind: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """Return one server-sent event."""
    numbered = "" if number is None else f"id: {number}\n"
    return f"{numbered}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


PING = b": ping\n\n"


def stream(content: AsyncIterator[bytes]) -> StreamingResponse:
    """Return a response of server-sent events that no proxy holds back."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(content, media_type="text/event-stream", headers=headers)


def submit(queue: Queue, job: Job) -> None:
    """Let a job wait.

    Raises:
        APIError: there is no place, or the server ends.
    """
    try:
        queue.submit(job)
    except QueueFullError as error:
        headers = {"Retry-After": str(error.retry_after_s)}
        raise APIError(429, str(error), code="rate_limit_exceeded", headers=headers) from error
    except ClosedError as error:
        raise APIError(503, str(error), headers={"Retry-After": "5"}) from error


def failure(job: Job) -> APIError:
    """Return what is answered for a job that was not done."""
    error = job.error
    if isinstance(error, LateError) and error.was_queued:
        headers = {"Retry-After": str(MAX_RETRY_AFTER_S)}
        return APIError(429, f"{error}: others were before", code="rate_limit_exceeded", headers=headers)
    if isinstance(error, LateError):
        return APIError(504, f"{error}: ask for fewer candidates", headers={"x-should-retry": "false"})
    if isinstance(error, ClosedError):
        return APIError(503, str(error), headers={"Retry-After": "5"})
    if job.state == "cancelled":
        return APIError(409, "the job was cancelled", code="cancelled", headers={"x-should-retry": "false"})
    return APIError(500, "drawing failed: the server's log has the reason", headers={"x-should-retry": "false"})


async def read_json(request: Request) -> dict[str, Any]:
    """Return the fields of a JSON body.

    Raises:
        APIError: it is another type, no JSON, or no object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, f"the body is {kind[:60] or 'of no type'}; expected application/json")
    try:
        values = parse_json(await request.body())
    except ValueError as error:
        raise APIError(400, f"the body is no JSON: {reason_of(error, 200)}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise APIError(400, "the body is no JSON object: expected one with the field prompt", code="invalid_json")
    return values
