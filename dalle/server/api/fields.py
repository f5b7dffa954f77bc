"""Values of fields: of JSON, or the texts of a form, to what they mean; refusals name the field."""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from reprlib import repr as short_repr

from dalle.server.api.errors import wrong


def text(name: str, value: object) -> str:
    """Return a text."""
    if not isinstance(value, str):
        raise wrong(name, f"{name} is {short_repr(value)}; expected a text", "invalid_type")
    return value


def whole(name: str, value: object) -> int:
    """Return a whole number; 2.0 is one, and so is the text of one, which forms and some programs send."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,40}", value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(name, f"{name} is {short_repr(value)}; expected a whole number", "invalid_type")
    return value


def number(name: str, value: object) -> float:
    """Return a finite number."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, f"{name} is {short_repr(value)}; expected a number", "invalid_type")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise wrong(name, f"{name} is no finite number; expected one")
    return value


def switch(name: str, value: object) -> bool:
    """Return a yes or no."""
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    if not isinstance(value, bool):
        raise wrong(name, f"{name} is {short_repr(value)}; expected true or false", "invalid_type")
    return value


def within(low: int, high: int, what: str = "") -> Callable[[str, object], int]:
    """Return a reader of whole numbers from `low` to `high`."""

    def read(name: str, value: object) -> int:
        found = whole(name, value)
        if not low <= found <= high:
            raise wrong(name, f"{name} is {short_repr(found)}; expected {low} to {high}{what}", "out_of_range")
        return found

    return read


def one_of(*known: str) -> Callable[[str, object], str]:
    """Return a reader of one of some words."""

    def read(name: str, value: object) -> str:
        found = text(name, value).lower()
        if found not in known:
            raise wrong(name, f"{name} is {short_repr(value)}; expected {' or '.join(known)}")
        return found

    return read
