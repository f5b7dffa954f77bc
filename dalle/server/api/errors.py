"""Errors as OpenAI's clients read them: a status, and a body whose `error` has message, type, param and code."""

from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    500: "server_error",
    503: "unavailable",
    504: "timeout",
}


class APIError(Exception):
    """A request that is refused, or that failed.

    Args:
        status: of HTTP. The official clients send again after 408, 409, 429 and all from 500: what will never work is
            none of these.
        message: what was given, what was expected, what to do.
        param: the field that is wrong.
        code: for programs; by default what the status says.
        headers: further ones, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status, "error")
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the body, as JSON has it."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str, code: str = "invalid_value") -> APIError:
    """Return the refusal of a field's value."""
    return APIError(400, message, param=param, code=code)


def not_yet(message: str, retry_after_s: int) -> APIError:
    """Return a refusal that holds for some seconds: while the bundle is loaded, or the server ends."""
    return APIError(503, message, headers={"Retry-After": str(retry_after_s)})
