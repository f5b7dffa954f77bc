"""A folder of checkpoints to resume from; `latest` names the newest.

A checkpoint is a folder named for its step. DeepSpeed writes and reads the tensors; this file makes that safe.
`checkpoint.json` is written last and lists every file with its size and digest, so a folder without it is left from an
interrupted save. Then `latest` is replaced. Checkpoints newer than `latest` are never read, and deleted at the next
save. Reading executes nothing.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from storage.atomic import flush_names, replace_text
from storage.text import parse_json
from training.ranks.ranks import Ranks, from_all_ranks
from training.run_files import CHECKPOINTS, LATEST, is_tag, named_latest, step_of, tags_in

logger = logging.getLogger(__name__)

READ_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    AssertionError,
    pickle.UnpicklingError,
)
"""Errors of torch and DeepSpeed for damaged, forged and foreign checkpoints."""

MANIFEST = "checkpoint.json"
"""A checkpoint's manifest: step, ranks, zero_stage, state, files. With it, a checkpoint is complete."""
UNIVERSAL = ".universal"
"""Folder beside the checkpoints in which one is converted for another number of ranks."""

FileDigest = dict[str, Any]
"""A file's size in bytes and its digest: {"bytes": …, "blake2b": …}."""


# -------------------------------------------------------------------------------------------------------- names


def resumable_tags(directory: Path) -> list[str]:
    """Return the names of the checkpoints that a run may resume from, newest first.

    They are the one that `latest` names, complete or not, and the complete ones before it. If `latest` names none, they
    are all complete ones.
    """
    named = named_latest(directory)
    complete = [tag for tag in tags_in(directory) if (directory / tag / MANIFEST).is_file()]
    if named is None:
        return complete
    older = [tag for tag in complete if step_of(tag) < step_of(named)]
    return [named, *older]


def latest_tag(directory: Path) -> str | None:
    """Return the name of the checkpoint that a run resumes from, judged without reading it; None if there is none.

    It is the newest of `resumable_tags` whose files are there; if all lack some, the newest.
    """
    tags = resumable_tags(directory)
    whole = (tag for tag in tags if not _damage(directory / tag, check=_size_problem))
    return next(whole, tags[0] if tags else None)


def require_tag(directory: Path, tag: str) -> None:
    """Check that a checkpoint is complete.

    Raises:
        ValueError: it is not; names those that are.
    """
    if not is_tag(tag) or not (directory / tag / MANIFEST).is_file():
        there = ", ".join(tag for tag in tags_in(directory) if (directory / tag / MANIFEST).is_file()) or "none"
        raise ValueError(f"no checkpoint {tag!r} in {directory}: there are {there}")


# -------------------------------------------------------------------------------------- manifests and digests


def digest_of(path: Path) -> FileDigest:
    """Flush a file to the disk, and return its size and the digest of its bytes as they are read back."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, new_digest).hexdigest()}


def new_digest() -> hashlib.blake2b:
    """Return the digest of no bytes yet."""
    return hashlib.blake2b(digest_size=16)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write checkpoint.json, whole or not at all, which makes the checkpoint complete."""
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    replace_text(folder / MANIFEST, json.dumps({**manifest, "blake2b": _digest_of_manifest(manifest)}, indent=2))


def _digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    digest = new_digest()
    digest.update(json.dumps(manifest, sort_keys=True).encode())
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest: step, ranks, zero_stage, state, files.

    Raises:
        ValueError: it is missing, damaged, or lists files outside the folder.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        digest = manifest.pop("blake2b")
        if digest != _digest_of_manifest(manifest):
            raise ValueError("its digest does not match")
        if not all(type(manifest[name]) is int for name in ("step", "ranks", "zero_stage")):
            raise ValueError("step, ranks and zero_stage must be integers")
        if not isinstance(manifest["state"], dict):
            raise ValueError("state must be an object")
        if not manifest["files"] or any(name != Path(name).name or name in (".", "..") for name in manifest["files"]):
            raise ValueError("a file name is missing or leads out of the folder")
        if not all(isinstance(digest["bytes"], int) and "blake2b" in digest for digest in manifest["files"].values()):
            raise ValueError("a file has no size or no digest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged ({error})") from None
    return dict(manifest)


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint that a run resumes from; see `read_manifest`."""
    return read_manifest(directory / (latest_tag(directory) or ""))


def _size_problem(path: Path, digest: FileDigest) -> str | None:
    """Return what is wrong with a file's size, or None."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return None if size == digest["bytes"] else f"{path} has {size} bytes of {digest['bytes']}"


def _problem(path: Path, digest: FileDigest) -> str | None:
    """Return what is wrong with a file's size or bytes, or None."""
    try:
        problem = _size_problem(path, digest)
        if problem is not None:
            return problem
        with path.open("rb") as file:
            found = hashlib.file_digest(file, new_digest).hexdigest()
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None if found == digest["blake2b"] else f"{path} is not what was written: its digest does not match"


def _damage(
    folder: Path, check: Callable[[Path, FileDigest], str | None] = _problem, rank: int = 0, size: int = 1
) -> list[str]:
    """Return what is wrong with a checkpoint's files; each of `size` ranks checks some of them."""
    try:
        files: dict[str, FileDigest] = read_manifest(folder)["files"]
    except ValueError as error:
        return [str(error)]
    names = sorted(files, key=lambda name: (files[name]["bytes"], name))[rank::size]
    return [problem for name in names if (problem := check(folder / name, files[name])) is not None]


def first_good(directory: Path, tags: Sequence[str], ranks: Ranks) -> tuple[str | None, list[str]]:
    """Return the first undamaged checkpoint of `tags`, and what is wrong with those before it.

    Collective: ranks share out the files, and all get the same answer.
    """
    wrong: list[str] = []
    for tag in tags:
        found = from_all_ranks(_damage(directory / tag, rank=ranks.rank, size=ranks.size), ranks)
        damage = sorted({problem for problems in found for problem in problems})
        if not damage:
            return tag, wrong
        wrong.append(damage[0] + (f", and {len(damage) - 1} more" if len(damage) > 1 else ""))
    return None, wrong


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------------------------ writing


def make_empty(folder: Path) -> None:
    """Make an empty folder for a checkpoint; delete one that is there."""
    drop(folder)
    folder.mkdir(parents=True)


def drop(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that it never looks complete when it is not."""
    with suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def publish(directory: Path, tag: str, manifest: Mapping[str, Any], *, keep_last: int, keep_every: int) -> None:
    """Complete a checkpoint with its manifest, let `latest` name it, and delete old ones.

    A warning says so if old ones could not be deleted.

    Args:
        directory: the run's checkpoints.
        tag: the checkpoint whose files are written.
        manifest: step, ranks, zero_stage, state, files.
        keep_last: number of newest checkpoints to keep, this one included.
        keep_every: also keep those whose step is a multiple of this; 0 for none.

    Raises:
        OSError: it could not be written, or the files of another rank are missing.
    """
    folder = directory / tag
    for name, digest in manifest["files"].items():
        if problem := _size_problem(folder / name, digest):
            raise OSError(f"{problem}: the folder must be the same on all machines")
    complete = [other for other in resumable_tags(directory) if (directory / other / MANIFEST).is_file()]
    write_manifest(folder, manifest)
    flush_names(directory)
    replace_text(directory / LATEST, tag)
    earlier = [other for other in complete if step_of(other) < step_of(tag)]
    kept = {tag, *earlier[: keep_last - 1]}
    if keep_every:
        kept |= {other for other in earlier if step_of(other) % keep_every == 0}
    try:
        for other in tags_in(directory):
            if other not in kept:
                drop(directory / other)
    except OSError as error:
        logger.warning("%s is saved, but old checkpoints could not be dropped (%s)", folder, error)
    shutil.rmtree(directory / UNIVERSAL, ignore_errors=True)


def set_latest(directory: Path, tag: str) -> None:
    """Let `latest` name the checkpoint that was loaded; newer ones are ignored, and deleted at the next save."""
    named = named_latest(directory)
    if named is None:
        logger.warning("%s did not name a checkpoint; now it names %s, which was loaded", directory / LATEST, tag)
    if named != tag:
        replace_text(directory / LATEST, tag)


# ------------------------------------------------------------------------------------------------------ reading


@contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """Give a folder a path without special characters while it lasts: DeepSpeed 0.19.8 reads paths as patterns."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / CHECKPOINTS
        link.symlink_to(directory.resolve(), target_is_directory=True)
        yield link
