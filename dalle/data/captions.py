"""What a caption is: a line of a text, or a field of a JSON object, with something to see in it."""

import json

from storage.text import decode_text, is_visible, lines_of

JSON_FIELDS = ("captions", "caption", "text", "prompt")
"""Fields of a JSON object that hold a caption or a list of them: the first one that is there and not empty counts."""
MAX_TEXT_BYTES = 16 << 20
"""Larger files and members are not read as captions."""

NOT_TEXT = "caption is not UTF-8"
NOT_JSON = "caption is in JSON that cannot be read"
BLANK = "caption is blank"
NOT_IN_JSON = "caption is missing in its JSON"
TOO_LARGE = "caption is too large"
NO_CAPTION = "no caption"


class CaptionError(ValueError):
    """Captions that cannot be read."""

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(f"{reason} ({details})")
        self.reason = reason
        """The same for all captions with this problem, so that they can be counted."""


def captions_of(data: bytes, *, is_json: bool) -> tuple[str, ...]:
    """Return the captions in a text (one a line) or a JSON object; those with nothing to see are dropped.

    Raises:
        CaptionError (a ValueError): it is no text in UTF-8, nor in UTF-16 with its mark, or no JSON.
    """
    if is_json:
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CaptionError(NOT_JSON, str(error)) from error
        fields = (record.get(field) for field in JSON_FIELDS) if isinstance(record, dict) else ()
        found = next(filter(None, fields), None)
        lines = [found] if isinstance(found, str) else found if isinstance(found, list) else []
        captions = [" ".join(line.split()) for line in lines if isinstance(line, str)]
    else:
        try:
            text = decode_text(data)
        except UnicodeDecodeError as error:
            raise CaptionError(NOT_TEXT, str(error)) from error
        if "\0" in text:
            raise CaptionError(NOT_TEXT, "it has NUL bytes: is it UTF-16 without its mark?")
        captions = [line.strip() for line in lines_of(text)]
    return tuple(filter(is_visible, captions))


def caption_problem(data: bytes, *, is_json: bool) -> str | None:
    """Return why no caption can be read, in words that can be counted; None if there is one."""
    try:
        if captions_of(data, is_json=is_json):
            return None
    except CaptionError as error:
        return error.reason
    return NOT_IN_JSON if is_json else BLANK
