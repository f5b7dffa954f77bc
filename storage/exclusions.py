"""Lists of samples: those that training leaves out, and others to look at; one JSON object a line."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from storage.atomic import replace_file
from storage.text import lines_of, read_text

_EXAMPLE = '{"shard": "000003.tar", "key": "000003017"}'


class Excluded:
    """Samples that are left out, each by its key, in one shard or in all."""

    def __init__(self, shards_of: Mapping[str, Sequence[tuple[str, ...]]], lines: Sequence[str]) -> None:
        """Take lines, and for each key the last parts of its shards' paths, () for all shards; `read` makes both."""
        self._shards_of = shards_of
        self._shards = {shard for shards in shards_of.values() for shard in shards}
        self._depths = {len(shard) for shard in self._shards}
        self._found_in: dict[tuple[str, tuple[str, ...]], str] = {}
        self.lines = lines
        """As they are in the files."""

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "Excluded":
        """Read files of lines {"shard": "folder/000003.tar", "key": "a"}; without "shard", the key goes in all shards.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a line is something else.
        """
        shards_of: dict[str, list[tuple[str, ...]]] = {}
        lines = []
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}: expected lines such as " + _EXAMPLE)
            for number, line in enumerate(_lines(path), start=1):
                try:
                    record = json.loads(line)
                    key, shard = record["key"], record.get("shard", "")
                    if not isinstance(key, str) or not isinstance(shard, str):
                        raise TypeError("key and shard must be texts")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise ValueError(
                        f"{path}, line {number}, cannot be read ({error!r}): expected " + _EXAMPLE
                    ) from None
                shards_of.setdefault(key, []).append(PurePosixPath(shard).parts)
                lines.append(line)
        return cls(shards_of, list(dict.fromkeys(lines)))

    def names(self, path: str) -> bool:
        """Return whether a line may mean a sample of the shard of this path."""
        parts = PurePosixPath(path).parts
        return any(parts[len(parts) - depth :] in self._shards for depth in self._depths if depth <= len(parts))

    def rows(self, keys: Sequence[str], path: str) -> NDArray[np.bool_]:
        """Return which samples of a shard are left out, (n,).

        Args:
            keys: of the n samples.
            path: of the shard.

        Raises:
            ValueError: a line names a sample of this shard, and one of another shard that was asked about.
        """
        return np.array([self._is_left_out(key, path) for key in keys], dtype=bool)

    def _is_left_out(self, key: str, path: str) -> bool:
        parts = PurePosixPath(path).parts
        found = [shard for shard in self._shards_of.get(key, ()) if not shard or parts[-len(shard) :] == shard]
        for shard in filter(None, found):
            other = self._found_in.setdefault((key, shard), path)
            if other != path:
                raise ValueError(
                    f"a line to leave out key {key!r} of shard {'/'.join(shard)!r} means a sample of {other} and one "
                    f"of {path}: name the shard by more of its path"
                )
        return bool(found)


def _lines(path: Path) -> list[str]:
    return [line for line in lines_of(read_text(path)) if line.strip()]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the paths of some shards below the deepest folder that holds them all: they differ from one another."""
    resolved = [path.resolve() for path in paths]
    folder = os.path.commonpath([path.parent for path in resolved]) if resolved else ""
    return [path.relative_to(folder).as_posix() for path in resolved]


def listed_names(paths: Sequence[Path]) -> list[str]:
    """Return `short_names` below the name of their folder: those of other data with shards of equal names differ."""
    names = short_names(paths)
    return [
        PurePosixPath(*path.resolve().parts[-1 - len(PurePosixPath(name).parts) :]).as_posix()
        for path, name in zip(paths, names, strict=True)
    ]


def sample_line(shard: str, key: str, reason: str) -> str:
    """Return a line of a list of samples, which `Excluded` reads; ASCII, whatever the key holds."""
    return json.dumps({"shard": shard, "key": key, "reason": reason}) + "\n"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file of lines that end in newlines, whole or not at all; without lines, delete it.

    Raises:
        OSError: it cannot be written.
    """
    iterator = iter(lines)
    first = next(iterator, None)
    if first is None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(itertools.chain([first], iterator))

    replace_file(path, write)
