"""Who may ask, from where, and how much they may send: in front of every route.

A server on localhost is reachable from every web page that its user opens: a page may post a form to it without asking,
and may come to it under a name of its own (DNS rebinding). So the name that a request was sent to (Host) must be one of
the server's, and a page that sends one (Origin) must be the server's own, or allowed.
"""

import asyncio
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dalle.output.text import printable_line
from dalle.server.api.errors import APIError
from storage.text import lines_of, read_text

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/", "/app.css", "/app.js", "/history.js", "/paint.js"})
"""They need no key; neither do pictures, whose names are secrets."""
QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked for every few seconds, and not logged when all is well."""
_SECRET = re.compile(r"[0-9a-f]{32}")
"""Names of pictures and jobs, which let whoever knows them see them."""
_PAGE_PICTURE = re.compile(r"/api/jobs/[0-9a-f]{32}/pictures/[0-9]+")
BODY_S = 120.0
"""Seconds within which a request must have arrived."""
DISCARDED_S = 5.0
"""Seconds for which the rest of a refused request is read, so that its sender sees why."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::", "")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def read_keys(file: Path) -> dict[str, str]:
    """Read keys, one a line: a key, or a name for the log and a key. Lines that begin with # are left out.

    Returns:
        Key -> name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, holds no keys, or a line is none.
    """
    keys: dict[str, str] = {}
    for number, line in enumerate(lines_of(read_text(file)), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2 or not words[-1].isascii():
            raise ValueError(f"{file}, line {number}: expected a key, or a name and a key, in ASCII")
        keys[words[-1]] = words[0] if len(words) == 2 else f"key {len(keys) + 1}"
    if not keys:
        raise ValueError(f"no keys in {file}: expected one a line, or a name and a key")
    return keys


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a request must fulfil."""

    host: str = "127.0.0.1"
    """The address that is listened on."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names of this server."""
    origins: tuple[str, ...] = ()
    """Web pages that may use it, such as https://example.org."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Key -> name; none: nobody needs one."""
    max_body: int = 20_000_000
    """Bytes of a request."""

    def check_host(self, host: str) -> None:
        """Raise APIError unless a Host header names this server."""
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]*)(?::[0-9]{1,5})?", host)
        name = match[1].strip("[]").lower().rstrip(".") if match else ""
        known = {*LOOPBACK, self.host.lower(), *(name.lower() for name in self.allowed_hosts)} - {*WILDCARDS}
        if name in known or (self.host in WILDCARDS and _is_address(name)):
            return
        message = f"this server is not known as {host[:100]!r}: start it with --allowed-host {name[:100] or 'NAME'}"
        raise APIError(403, message, code="host_not_allowed")

    def check_origin(self, origin: str | None, host: str) -> None:
        """Raise APIError if a web page of another origin asks."""
        if origin is None or origin in self.origins or origin.lower() in (f"http://{host}", f"https://{host}"):
            return
        message = f"pages of {origin[:100]!r} may not use this server: start it with --cors-origin to allow them"
        raise APIError(403, message, code="origin_not_allowed")

    def owner(self, authorization: str | None, path: str, address: str) -> str:
        """Return who asks: the name of the key, or the address where no keys are needed.

        Raises:
            APIError: no key, or a wrong one.
        """
        if not self.keys:
            return address
        scheme, _, given = (authorization or "").partition(" ")
        given = given.strip()
        names = [name for key, name in self.keys.items() if hmac.compare_digest(key.encode(), given.encode())]
        if names and scheme.lower() == "bearer":
            return names[0]
        if path in OPEN_PATHS or path.startswith("/pictures/"):
            return address
        problem = "wrong API key" if given else "no API key"
        message = f"{problem}: send the header `Authorization: Bearer KEY` with a key of this server"
        raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _is_address(name: str) -> bool:
    """Return whether a host is an IP address, which no page can make its own."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def error_response(error: APIError) -> Response:
    """Return an error as the clients read it."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class Guard:
    """Lets requests through that fulfil the rules, names each for the log, and logs it.

    Args:
        app: what is behind.
        rules: to be fulfilled.
    """

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.monotonic()
        headers = Headers(scope=scope)
        state: dict[str, Any] = scope.setdefault("state", {})
        request_id = state["request_id"] = f"req_{secrets.token_hex(8)}"
        origin = headers.get("origin")
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = request_id
                for name, value in HEADERS.items():
                    sent.setdefault(name, value)
                sent.setdefault("cache-control", "no-store")
                self._allow(origin, sent)
            await send(message)

        body = _Body(receive, self._rules.max_body)
        try:
            try:
                self._check(scope, headers, state, body)
                if scope["method"] == "OPTIONS" and origin in self._rules.origins:
                    await _preflight(headers)(scope, receive, answer)
                else:
                    await self._app(scope, body.receive, answer)
            except APIError as error:
                if status:
                    raise
                await body.discard()
                await error_response(error)(scope, receive, answer)
        finally:
            self._log(scope, status, request_id, time.monotonic() - started_at, state)

    def _check(self, scope: Scope, headers: Headers, state: dict[str, Any], body: "_Body") -> None:
        host = headers.get("host", "")
        self._rules.check_host(host)
        self._rules.check_origin(headers.get("origin"), host)
        if scope["method"] != "OPTIONS":
            client = scope.get("client")
            address = client[0] if client else "unknown"
            state["owner"] = self._rules.owner(headers.get("authorization"), scope["path"], address)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise APIError(415, "the body is compressed: send it without Content-Encoding")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._rules.max_body:
            raise body.too_large()

    def _allow(self, origin: str | None, sent: MutableHeaders) -> None:
        if self._rules.origins:
            sent.add_vary_header("Origin")
        if origin in self._rules.origins:
            assert origin is not None
            sent["access-control-allow-origin"] = origin
            sent["access-control-expose-headers"] = "x-request-id, retry-after, x-ignored-parameters"

    def _log(self, scope: Scope, status: int, request_id: str, elapsed_s: float, state: dict[str, Any]) -> None:
        path = scope["path"]
        if (path in QUIET_PATHS and status < 500) or (status == 200 and _PAGE_PICTURE.fullmatch(path)):
            return
        path = _SECRET.sub("…", path[:100])
        note = f", {state['note']}" if "note" in state else ""
        milliseconds = f"{1000 * elapsed_s:,.0f} ms"
        line = f"{scope['method'][:10]} {path}: {status or 'no answer'} in {milliseconds}, {request_id}{note}"
        logger.info("%s", printable_line(line))


def _preflight(headers: Headers) -> Response:
    """Return what a browser may send across origins."""
    wanted = [name.strip().lower() for name in headers.get("access-control-request-headers", "").split(",")]
    allowed = [name for name in wanted if name in ("authorization", "content-type") or name.startswith("x-stainless-")]
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": ", ".join(allowed),
            "access-control-max-age": "600",
        },
    )


class _Body:
    """Reads a request's body as it comes, up to a number of bytes and for so many seconds."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._n_bytes = 0
        self._is_complete = False
        self._deadline = time.monotonic() + BODY_S

    def too_large(self) -> APIError:
        """Return the refusal."""
        return APIError(413, f"the request is too large: expected at most {self._max_bytes // 1_000_000} MB")

    async def receive(self) -> Message:
        """Return the next message, as ASGI's `receive`."""
        if self._is_complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.01, self._deadline - time.monotonic()))
        except TimeoutError:
            raise APIError(408, f"the request did not arrive within {BODY_S:g} s", code="timeout") from None
        self._note(message)
        if self._n_bytes > self._max_bytes:
            raise self.too_large()
        return message

    async def discard(self) -> None:
        """Read on for a while, so that a sender that is still busy sees the answer."""
        deadline = time.monotonic() + DISCARDED_S
        while not self._is_complete and self._n_bytes <= 4 * self._max_bytes and time.monotonic() < deadline:
            try:
                self._note(await asyncio.wait_for(self._receive(), DISCARDED_S))
            except TimeoutError:
                return

    def _note(self, message: Message) -> None:
        self._n_bytes += len(message.get("body", b""))
        self._is_complete = message["type"] != "http.request" or not message.get("more_body", False)
