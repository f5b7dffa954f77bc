"""What is wrong with a store, in words, whichever library says it; and trying again, for a bounded time."""

import logging
import queue
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from storage.errors import reason_of
from storage.stores.urls import EXTRAS, plain, scheme_of, shown

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MISSING, _FORBIDDEN, _PASSING = (404, 410), (401, 403), (408, 425, 429)
_LONGEST_REASON = 300
_LONGEST_WAIT_S = 30.0
_TRIES_OF_WRONG = 3  # each of them fetches the whole file


class StoreError(OSError):
    """A store is gone, too slow, or forbids what is asked: no fault of one shard. The message names it."""


class RefusedError(StoreError):
    """A store forbids or refuses what is asked, however often."""


class WrongBytesError(ValueError):
    """A store gives other bytes than it should. The message names the file."""


class DiskError(Exception):
    """The local disk failed, and not the store; the OSError is its only argument."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a store is waited for."""

    attempts: int = 6
    """Times that a file is asked for before it is given up."""
    stall_s: float = 60.0
    """Seconds without an answer after which an attempt has failed; also the time over which its speed is judged."""
    min_speed: float = 16 << 10
    """Bytes a second below which an attempt has failed."""
    first_wait_s: float = 1.0
    """Seconds before the second attempt, more or less; each later one waits twice as long as the one before it."""


PATIENCE = Patience()


def within(seconds: float, action: Callable[[], T]) -> T:
    """Return what an action returns; it runs in a thread, which is left behind when it takes too long.

    Raises:
        TimeoutError: it took too long.
        BaseException: what the action raised.
    """
    ended: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put(([action()], None))
        except BaseException as error:
            ended.put(([], error))

    threading.Thread(target=run, daemon=True, name="store").start()
    try:
        values, error = ended.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return values[0]


def patiently(url: str, attempt: Callable[[], T], *, verb: str = "read") -> T:
    """Return what an attempt returns, trying again while a store fails in a way that may pass.

    Args:
        url: named in messages; the first failure is told in a warning.
        attempt: called up to `PATIENCE.attempts` times.
        verb: what it does with the URL.

    Raises:
        FileNotFoundError: the file is not there.
        StoreError: the store forbids it (RefusedError), or has failed every time; or what reads it is not installed.
        WrongBytesError: the store gave wrong bytes every time.
        OSError: the local disk failed.
    """
    wait_s = PATIENCE.first_wait_s
    for number in range(1, PATIENCE.attempts + 1):
        try:
            return attempt()
        except DiskError as error:
            raise error.args[0] from None
        except Exception as error:  # of any library
            failure, may_pass = _failure(url, error, verb)
            is_wrong = isinstance(failure, WrongBytesError)
            attempts = min(PATIENCE.attempts, _TRIES_OF_WRONG) if is_wrong else PATIENCE.attempts
            if not may_pass or number >= attempts:
                tries = f"; tried {number} times" if number > 1 else ""
                raise type(failure)(f"{failure}{tries}") from None  # a library's error may hold signatures and keys
        if number == 1:
            logger.warning("%s; trying again, up to %d times", failure, attempts - 1)
        time.sleep(wait_s * random.uniform(0.75, 1.25))
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
    raise AssertionError("PATIENCE.attempts is at least 1")


def _failure(url: str, error: Exception, verb: str) -> tuple[OSError | ValueError, bool]:
    """Return a library's error in words, and whether another attempt may succeed."""
    name, reason = plain(url), shown(reason_of(error))[:_LONGEST_REASON]
    if isinstance(error, WrongBytesError):
        return error, True
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec says so of any failure
        reason = shown(reason_of(error))[:_LONGEST_REASON]
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in _MISSING:
        return FileNotFoundError(f"no {name} in its store: check the name, or restore it"), False
    if isinstance(error, ImportError):
        extra = EXTRAS[scheme_of(url)]
        return StoreError(f"{name} cannot be {verb} ({reason}): install it with pip install 'dalle[{extra}]'"), False
    if isinstance(error, PermissionError) or status in _FORBIDDEN or _is_of_credentials(error):
        return (
            RefusedError(
                f"{name} cannot be {verb}, its store forbids it ({reason}): check the credentials in the environment; "
                "they may be missing, wrong or expired (docs/data.md)"
            ),
            False,
        )
    if status is not None and 400 <= status < 500 and status not in _PASSING:
        return RefusedError(f"{name} cannot be {verb}, its store refuses ({reason}): check the URL"), False
    what = "does not answer" if isinstance(error, TimeoutError) else "fails"
    return StoreError(f"{name} cannot be {verb}, its store {what} ({reason})"), True


def _status(error: Exception) -> int | None:
    """Return the HTTP status in an error of one of the libraries, or in the one that it was made of."""
    values = [getattr(error, "code", None)]  # Google's; a cause may have one of another meaning
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        values += [getattr(owner, name, None) for owner in (one, response) for name in ("status", "status_code")]
        if isinstance(response, dict):  # botocore's
            values.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    numbers = (int(value) for value in values if isinstance(value, int | str) and str(value).isdigit())
    return next((number for number in numbers if 100 <= number < 600), None)


def _is_of_credentials(error: Exception) -> bool:
    """Return whether a library has no credentials, or the store found them wrong or expired, which S3 calls a 400."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
        words = " ".join([*(kind.__name__ for kind in type(one).__mro__), str(code)])
        if re.search("Credential|Authentication|RefreshError|Token|AccessDenied|AccessKey|Signature", words):
            return True
    return False
