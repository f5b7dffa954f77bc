"""What a source lists: its pictures with their captions, and its other files; and where a picture of some name is."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINK = "link out of the folder of pictures: --follow-links reads it"
LINK_TO_FOLDER = "link to a folder: --follow-links reads it"


class SkippedError(Exception):
    """A sample that is left out; the message is the reason that the report counts."""


@dataclass(frozen=True, kw_only=True)
class SourcePicture:
    """A picture and its captions as a source lists them, not yet opened."""

    name: str
    """Its path within the folder of pictures, or its row: its name in the report."""
    path: Path | None = None
    """The file; None if it is skipped."""
    captions: tuple[str, ...] = ()
    """As they are in the source."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """For KEY.json."""
    skip: str | None = None
    """A reason to skip it; None if none is known yet."""
    n_rows: int = 1
    """Rows of a table that are about it."""
    n_not_text: int = 0
    """Its captions that are numbers, for example, and are left out."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All that a source holds."""

    pictures: Sequence[SourcePicture]
    """In its order; those to skip are among them."""
    noun: str = "row"
    """Name of what is listed."""
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of files of a folder that are neither pictures nor their captions, by kind."""
    tables: Sequence[Path] = ()
    """Files of a folder that may be tables of its captions."""

    @property
    def n_rows(self) -> int:
        """Rows of a table, or pictures of a folder."""
        return sum(picture.n_rows for picture in self.pictures)


def locate(name: str, roots: Sequence[Path], *, follow_links: bool) -> Path:
    """Return the regular file of that name in the first of the folders that has it.

    Args:
        name: a path, relative to a folder or absolute.
        roots: the folders.
        follow_links: whether a link within the folders may lead out of them.

    Raises:
        SkippedError: there is none, or it lies outside the folders.
    """
    for root in roots:
        try:
            path = (root / name).resolve()
            if not path.is_file():
                continue
        except (OSError, ValueError, RuntimeError):  # too long, with a NUL, or a link to itself
            continue
        if any(path.is_relative_to(inside.resolve()) for inside in roots):
            return path
        if not any(_is_below(root / name, inside) for inside in roots):
            raise SkippedError("outside the folder of pictures")
        if not follow_links:
            raise SkippedError(LINK)
        return path
    is_broken = any(os.path.islink(root / name) for root in roots)
    raise SkippedError("link to no file" if is_broken else "missing image")


def _is_below(path: Path, folder: Path) -> bool:
    """Return whether a path stays below a folder by its words, wherever links on it lead."""
    return Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))
