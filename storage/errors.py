"""Errors in words: any error in one line, want of memory, and the words for arguments of a wrong type."""

import sys
from numbers import Integral, Real
from reprlib import repr as short_repr


def reason_of(error: BaseException, limit: int | None = None) -> str:
    """Return an error's message in one line, or the name of its type where it has none.

    Args:
        error: any error.
        limit: characters to keep; None for all.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was short, of a device or of the host; without importing torch."""
    torch = sys.modules.get("torch")
    of_torch = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_torch or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def check_whole(name: str, value: object) -> None:
    """Raise ValueError unless an argument is a whole number, Python's or numpy's."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise wrong_type(name, value, "a whole number")


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless an argument is a number, Python's or numpy's, that a float can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise wrong_type(name, value, "a number")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} is a number of more than 308 digits; expected one that a float can hold") from None


def wrong_type(name: str, value: object, expected: str) -> ValueError:
    """Return the error that says what an argument is, and what it must be."""
    return ValueError(f"{name} is {short_repr(value)}, of type {type(value).__name__}; expected {expected}")
