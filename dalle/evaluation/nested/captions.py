"""Captions with their numbers: what is sampled depends on a caption's number in its list, not on where it stands now.

So a caption that a list has eight times has eight different pictures, and a list in another order has the same ones.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalle.best_of_n import check_captions
from dalle.data.captions import JSON_FIELDS
from dalle.data.reader import ShardData
from dalle.output.text import counted
from storage.text import is_visible, lines_of, parse_json, read_text

logger = logging.getLogger(__name__)

JSON_ENDINGS = (".jsonl", ".json")
"""Endings of files with an object a line."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One caption of a list."""

    number: int
    """Its number in the list it comes from, from 0: candidates depend on it."""
    caption: str
    source: str = ""
    """Its line in that list, untouched, where that says more than the caption."""


def read_rows(file: Path) -> list[Row]:
    r"""Read a list of captions: a text with one a line, or lines of JSON objects (.jsonl).

    An object holds its caption in one of the fields `JSON_FIELDS`, and may hold its number in "row", as the
    captions.jsonl of an evaluation does. Without it the number is that of the line, empty ones counted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text in UTF-8, a line is no such object, or two captions have one number.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no captions at {file}: expected a text with one caption a line, or a .jsonl file")
    is_json = file.suffix.lower() in JSON_ENDINGS
    rows = [
        _json_row(file, number, line) if is_json else Row(number=number, caption=line.strip())
        for number, line in enumerate(lines_of(read_text(file)))
        if is_visible(line)
    ]
    if not rows:
        raise ValueError(f"no captions in {file}: expected one on each line")
    number, n_rows = Counter(row.number for row in rows).most_common(1)[0]
    if n_rows > 1:
        raise ValueError(f'{file}: {n_rows} captions have "row" {number}: give each its own, or leave "row" out')
    return rows


def _json_row(file: Path, number: int, line: str) -> Row:
    example = '{"caption": "a red cube"}'
    try:
        record = parse_json(line)
        found = next(filter(None, (record.get(field) for field in JSON_FIELDS)), None)
        caption = found[0] if isinstance(found, list) else found
        row = record.get("row", number)
        if not isinstance(caption, str) or not isinstance(row, int) or isinstance(row, bool) or row < 0:
            raise ValueError(f"{', '.join(JSON_FIELDS)} or row is missing or of another type")
    except (ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}, line {number + 1} is no caption ({error}): expected {example}") from None
    return Row(number=row, caption=caption.strip(), source=line)


def rows_of(data: ShardData) -> list[Row]:
    """Return the first caption of each sample of some shards, numbered as the samples are; lost ones are left out."""
    rows = []
    for number in range(len(data)):
        try:
            rows.append(Row(number=number, caption=data.captions(number)[0]))
        except (ValueError, OSError) as error:
            logger.warning("a caption is left out of the evaluation: %s", error)
    return rows


def chosen_rows(rows: Sequence[Row], n: int | None) -> list[Row]:
    """Return n of the rows, the same ones in whatever order they are given, in the order of their numbers.

    They are drawn without replacement by a generator of their own (seed 0): no seed of the sampling moves them.

    Args:
        rows: with different numbers.
        n: how many; None, or more than there are, for all.

    Raises:
        ValueError: there are no rows, or n is below 1.
    """
    check_captions([row.caption for row in rows])
    ordered = sorted(rows, key=lambda row: row.number)
    if n is None:
        return ordered
    if n < 1:
        raise ValueError(f"--images is {n}; at least 1 caption must be sampled")
    if n > len(ordered):
        logger.info("%s asked for, but there are %s: all are used", f"{n:,}", counted(len(ordered), "caption"))
        return ordered
    drawn = np.random.default_rng(0).permutation(len(ordered))[:n]
    return [ordered[place] for place in sorted(drawn.tolist())]


def list_hash(rows: Sequence[Row]) -> str:
    """Return 16 hexadecimal digits that name a list of captions with their numbers, in this order."""
    text = "".join(json.dumps([row.number, row.caption]) + "\n" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
