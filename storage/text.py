"""Text files that people give: their encoding, what a line is, whether there is anything to see, and JSON."""

import codecs
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_JSON_DEPTH = 100
"""Objects and lists within one another; deeper ones would exhaust Python's stack wherever they are walked through."""
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs without ink: fillers, Braille without dots


def decode_text(data: bytes) -> str:
    """Return the text of a file: UTF-8, or UTF-16 if it begins with that mark; marks are no part of the text.

    Raises:
        UnicodeDecodeError (a ValueError): it is in another encoding.
    """
    if data.startswith(_UTF16_MARKS) and len(data) > 2:
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        ValueError: it is not UTF-8, nor UTF-16 with its mark.
        OSError: it cannot be read.
    """
    try:
        return decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start:,}): save it as UTF-8, for example with "
            "`iconv -f WINDOWS-1252 -t UTF-8`"
        ) from None


def lines_with_ends(text: str) -> list[str]:
    r"""Return the lines of a text with their ends, \n, \r\n or \r: all other characters are part of a line.

    `str.splitlines` would also split at form feeds and at separators that are pasted into captions.
    """
    return list(io.StringIO(text, newline=""))


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without their ends; none for an empty text."""
    return [line.rstrip("\r\n") for line in lines_with_ends(text)]


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, or nested more than `MAX_JSON_DEPTH` deep.
    """
    too_deep = ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep from None
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if layer:
        raise too_deep
    return value


def is_visible(text: str) -> bool:
    """Return whether anything of a text can be seen: not only spaces, control characters and marks without ink."""
    return any(
        unicodedata.category(character)[0] in "LNPS" or unicodedata.category(character) in ("Cn", "Co")
        for character in text
        if character not in _BLANK_LETTERS
    )
