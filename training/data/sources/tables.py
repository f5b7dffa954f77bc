"""Rows of CSV and TSV tables as people and programs write them.

Quotes are those of RFC 4180, where they make sense. A quote that never closes, or that closes on a later row, would
swallow the rows between: such a line is read as it stands, quote and all, and reading continues with the next one. So
every line is in a row, a malformed row or a quoted field that has no row in it.
"""

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dalle.data.endings import is_picture, not_read
from dalle.output.text import counted
from storage.text import lines_of, lines_with_ends, read_text
from training.data.sources.records import Row, columns, is_url

logger = logging.getLogger(__name__)

_DELIMITERS = ",;\t|"
_MAX_FIELD = 1 << 30  # characters: whatever is in the memory already
_MAX_LINES = 1000  # of a quoted field
_NAMED = 5  # lines in a warning
TOO_MANY = "more fields than the header"


def table_rows(path: Path, roots: Sequence[Path]) -> Iterator[Row]:
    """Yield the rows of a table with a header; blank lines are none.

    Args:
        path: a .csv or .tsv file; its separator is one of , ; | and the tab.
        roots: where the pictures are, by which rows within a quoted field are noticed.

    Raises:
        ValueError: it is not UTF-8 or UTF-16, or has no column of pictures or of captions, or several of one name.
        OSError: it cannot be read.
    """
    limit = csv.field_size_limit(_MAX_FIELD)
    try:
        table = _Table.open(path, roots)
        for number, fields in table.records():
            if any(text.strip() for text in fields):
                yield table.row(number, fields)
    finally:
        csv.field_size_limit(limit)
    table.warn()


class _Lines:
    """An iterator over lines that can be sent back."""

    def __init__(self, lines: Sequence[str], at: int) -> None:
        self.lines, self.at, self.stop = lines, at, len(lines)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.at >= self.stop:
            raise StopIteration
        self.at += 1
        return self.lines[self.at - 1]


@dataclass(kw_only=True)
class _Table:
    path: Path
    roots: Sequence[Path]
    lines: Sequence[str]
    """With their ends."""
    start: int
    """Index of the line after the header."""
    delimiter: str
    n_columns: int
    image: int
    """Index of the column."""
    caption: int
    unquoted: list[int] = field(default_factory=list)
    """Numbers of the lines with a quote that does not close."""
    joined: list[int] = field(default_factory=list)
    """Numbers of the lines with separators in the caption."""

    @classmethod
    def open(cls, path: Path, roots: Sequence[Path]) -> "_Table":
        lines = lines_with_ends(read_text(path))
        at = next((i for i, line in enumerate(lines) if line.strip()), 0)
        first = lines[at] if lines else ""
        if "\0" in first:
            raise ValueError(
                f"{path} has NUL bytes in its first line: no text, or UTF-16 without its mark; save it as UTF-8"
            )
        likely = "\t" if path.suffix.lower() == ".tsv" else _DELIMITERS
        if told := re.fullmatch(r"sep=([,;|\t])\s*", first):  # as Excel does
            likely, at = told[1], at + 1
            first = lines[at] if at < len(lines) else ""
        delimiter = _delimiter(first, likely, path)
        names = _header(first, delimiter)
        image, caption = (names.index(name) for name in columns(path, names))
        for name in (names[image], names[caption]):
            n_such = [other.strip().lower() for other in names].count(name.strip().lower())
            if n_such > 1:
                raise ValueError(f"{path} has {n_such} columns called {name!r}: expected one; rename the others")
        return cls(
            path=path,
            roots=roots,
            lines=lines,
            start=at + 1,
            delimiter=delimiter,
            n_columns=len(names),
            image=image,
            caption=caption,
        )

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of its first line, from 1, and the fields of each record."""
        lines = _Lines(self.lines, self.start)
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        while (first := lines.at) < len(self.lines):
            if not self.lines[first].strip("\r\n"):
                lines.at += 1
                continue
            lines.stop = min(first + _MAX_LINES, len(self.lines))
            try:
                fields = next(reader)
                is_sound = lines.at == first + 1 or not self._has_rows(fields, self.lines[first : lines.at])
            except csv.Error:
                is_sound = False
            if not is_sound:
                lines.at = first + 1
                fields = self._as_it_stands(self.lines[first])
                self.unquoted.append(first + 1)
            yield first + 1, fields

    def _has_rows(self, fields: Sequence[str], lines: Sequence[str]) -> bool:
        """Return whether a record of several lines has swallowed others."""
        n_rows = 0
        for line in lines:
            pieces = line.split(self.delimiter)
            n_rows += len(pieces) == self.n_columns and self._is_image(pieces[self.image])
        inside = [line.split(self.delimiter) for text in fields if len(lines_of(text)) > 1 for line in lines_of(text)]
        return n_rows > 1 or any(self._is_image(piece) for pieces in inside if len(pieces) > 1 for piece in pieces)

    def _is_image(self, text: str) -> bool:
        name = text.strip().strip('"').strip()
        if not name or len(name) > 1000:
            return False
        return is_picture(name) or not_read(name) is not None or is_url(name) or self._is_file(name)

    def _is_file(self, name: str) -> bool:
        try:
            return any((root / name).is_file() for root in self.roots)
        except (OSError, ValueError):
            return False

    def _as_it_stands(self, line: str) -> list[str]:
        """Return the fields of one line by its separators alone, or with its quotes where only these give a row."""
        fields = [_without_quotes(text) for text in line.rstrip("\r\n").split(self.delimiter)]
        if len(fields) != self.n_columns:
            tolerant = next(csv.reader([line], delimiter=self.delimiter))
            if len(tolerant) == self.n_columns:
                return tolerant
        return fields

    def row(self, number: int, fields: list[str]) -> Row:
        """Return a record as a row; separators that are too many are part of a caption that is the last column."""
        name, n = f"line {number}", self.n_columns
        while len(fields) > n and not fields[-1].strip():
            fields = fields[:-1]
        if len(fields) > n:
            if self.caption == n - 1:
                fields = [*fields[: n - 1], self.delimiter.join(fields[n - 1 :])]
            elif n == 2:
                fields = [self.delimiter.join(fields[:-1]), fields[-1]]
            if len(fields) > n or not self._is_image(fields[self.image]):
                return Row(name, None, None, skip=TOO_MANY)
            fields[self.caption] = _without_quotes(fields[self.caption])
            self.joined.append(number)
        values: list[str | None] = [*fields, *[None] * (n - len(fields))]
        return Row(name, values[self.image], values[self.caption])

    def warn(self) -> None:
        """Log what was read in another way than it is written."""
        for numbers, what in (
            (self.unquoted, "a quote that does not close, or closes within a field: read as they stand"),
            (self.joined, f"more {self.delimiter!r} than the header: taken as part of the caption"),
        ):
            if numbers:
                listed = ", ".join(f"{number:,}" for number in numbers[:_NAMED]) + ", …" * (len(numbers) > _NAMED)
                logger.warning("%s: %s with %s (line %s)", self.path, counted(len(numbers), "line"), what, listed)


def _header(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _delimiter(header: str, likely: str, path: Path) -> str:
    """Return the first separator by which the header has both columns, else the most frequent one."""
    for delimiter in dict.fromkeys(likely + _DELIMITERS):
        try:
            columns(path, _header(header, delimiter))
        except ValueError:
            continue
        return delimiter
    return max(likely, key=header.count)


def _without_quotes(text: str) -> str:
    """Return a field without the quotes around it, if it has such and no other quotes but escaped ones."""
    inner = text[1:-1]
    if len(text) < 2 or text[0] != '"' or text[-1] != '"' or '"' in re.sub(r'""|\\"', "", inner):
        return text
    return re.sub(r'""|\\"', '"', inner)
