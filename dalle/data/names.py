"""Names of shards to their paths: files, folders, globs and brace ranges, on disk or in an object store."""

import glob
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from storage.stores.files import is_remote_file, remote_file, remote_files
from storage.stores.urls import has_magic, is_remote, plain, url_of
from storage.tar import COMPRESSED_ENDINGS, refuse_compressed

logger = logging.getLogger(__name__)

_MAX_BRACE_RANGE = 1_000_000


def expand_shards(patterns: Sequence[str | Path], *, skip_missing: bool = False) -> list[Path]:
    """Return the tar files that names, folders (searched recursively), globs and brace ranges stand for.

    Args:
        patterns: e.g. `["pictures/", "more/train-{000000..000009}.tar", "other/*.tar", "s3://bucket/train/"]`.
        skip_missing: leave out missing shards instead of raising FileNotFoundError.

    Returns:
        Existing paths in the order given (sorted within a folder or a glob), each once; and those of the copies of
        shards in stores, which are asked only where a folder or a glob is given (`storage/stores/files.py`).

    Raises:
        FileNotFoundError: a pattern matches nothing, or a folder holds no shards.
        ValueError: nothing was given; a URL of no store that can be read, a pipe or a compressed tar.
        StoreError (an OSError): a store cannot be listed.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    if not patterns:
        raise ValueError(
            "no shards were given: expected .tar files, folders of them, or patterns such as train-{000000..000009}.tar"
        )
    shards: dict[Path, Path] = {}
    folders: dict[Path, Path] = {}
    for pattern in map(str, patterns):
        if is_remote(pattern):
            shards |= {shard: shard for shard in _remote_shards(url_of(pattern), skip_missing)}
            continue
        if is_remote_file(Path(pattern)):  # expanded before
            shards[Path(pattern)] = Path(pattern)
            continue
        # One slash after the colon is enough: Path("http://x") has lost the other.
        if re.match(r"\s*(pipe:|[a-z][a-z0-9+.-]+:/)", pattern, re.IGNORECASE):
            raise ValueError(
                f"{pattern!r} is a URL or a command: shards are read from local files and from stores (s3://, gs://, "
                "az://, https://, hf://), never through a shell"
            )
        names = [pattern] if Path(pattern).exists() else _expand_braces(pattern)
        for shard in itertools.chain.from_iterable(_shards_called(name, pattern, skip_missing) for name in names):
            if shard.name.lower().endswith(COMPRESSED_ENDINGS):
                refuse_compressed(shard)
            shards.setdefault(resolved(shard, folders), shard)
    return list(shards.values())


def resolved(path: Path, folders: dict[Path, Path]) -> Path:
    """Return `path.resolve()`, with `folders` for those that are resolved already: many shards are in one folder."""
    if path.is_symlink() or path.name in ("", ".."):
        return path.resolve()
    if path.parent not in folders:
        folders[path.parent] = path.parent.resolve()
    return folders[path.parent] / path.name


def _expand_braces(pattern: str) -> list[str]:
    """Return the names that `{000..009}` and `{a,b}` stand for; a pattern without braces stands for itself."""
    match = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, listed = match.groups()
    after = _expand_braces(pattern[match.end() :])
    count = int(last) - int(first) + 1 if listed is None else listed.count(",") + 1
    if not 1 <= count * len(after) <= _MAX_BRACE_RANGE:
        raise ValueError(
            f"the range {match.group()} of {pattern} has {max(count, 0):,} members"
            + (f" for each of {len(after):,} others" if len(after) > 1 else "")
            + f", expected 1 to {_MAX_BRACE_RANGE:,}"
        )
    if listed is not None:
        middles: Iterable[str] = listed.split(",")
    else:
        middles = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    before = pattern[: match.start()]
    return [before + middle + rest for middle in middles for rest in after]


def _remote_shards(pattern: str, skip_missing: bool) -> list[Path]:
    """Return the shards in a store that a URL, a folder's URL or a pattern stands for."""
    shards: list[Path] = []
    for url in _expand_braces(pattern):
        name = plain(url)
        if name.lower().endswith(COMPRESSED_ENDINGS):
            raise ValueError(f"{name} is compressed: samples are read at random places, so store it as a plain .tar")
        if not has_magic(url) and (name.lower().endswith(".tar") or url != name):
            shards.append(remote_file(url))
            continue
        files = remote_files(url)
        tars = [path for path in files if path.suffix.lower() == ".tar"]
        if not tars and not skip_missing:
            more = f"; {len(files):,} other files are there" if files else ", or its store lists nothing: give a range"
            raise FileNotFoundError(f"no shards at {name}: expected *.tar there or below it{more}")
        shards += tars
    return shards


def _shards_called(name: str, pattern: str, skip_missing: bool) -> list[Path]:
    """Return the shards of one name without braces."""
    path = Path(name)
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))] if glob.has_magic(name) else []
    found = [path] if path.exists() else matches
    try:
        if not found:
            asked = "" if name == pattern else f" (one of {pattern})"
            raise FileNotFoundError(
                f"no shard {name}{asked}: expected a .tar file, a folder of them, or a pattern that matches some"
            )
        return [shard for match in found for shard in (_shards_in(match) if match.is_dir() else [match])]
    except FileNotFoundError:
        if skip_missing:
            return []
        raise


def _shards_in(folder: Path) -> list[Path]:
    """Return every tar below a folder, sorted; hidden names are left out: they are being written.

    Compressed shards and links to folders are left out, too, with a warning.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"), key=lambda path: path.parts)
        if not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    shards = [path for path in files if path.suffix.lower() == ".tar" and path.is_file()]
    there = set(shards)
    compressed = [
        path
        for path in files
        if path.name.lower().endswith(COMPRESSED_ENDINGS)
        and not there & {path.with_suffix(""), path.with_suffix(".tar")}  # it is kept beside the plain one
    ]
    links = [path for path in files if path.is_symlink() and path.is_dir()]
    found = [f"{path.name} is compressed: gunzip it first" for path in compressed]
    found += [f"{path.name} is a link to a folder: give that folder itself" for path in links]
    if not shards:
        hint = found[0] if found else "make some with `dalle-train shards`"
        raise FileNotFoundError(f"no shards in the folder {folder}: expected *.tar in it or below it; {hint}")
    if found:
        logger.warning("left out of the folder %s: %s%s", folder, "; ".join(found[:3]), "; …" * (len(found) > 3))
    return shards
