"""Checkpoints to resume from: a folder of them, of which `latest` names the one to go on from.

A checkpoint is a folder named for its step. DeepSpeed writes and reads the tensors; here is what makes that safe.
`checkpoint.json` is written last and lists every file with its size and digest, so a folder without it is what an
interrupted save left behind. Then `latest` is replaced. What is newer than `latest` says is never read, and goes when
the run saves again. Reading executes nothing.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from storage.atomic import flush_names, replace_text
from training.ranks.world import World, from_all_ranks

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
"""What torch and DeepSpeed raise for damaged, forged and foreign checkpoints."""

NOTE = "checkpoint.json"
"""What a checkpoint says of itself: step, ranks, zero_stage, state, files. With it, a checkpoint is complete."""
UNIVERSAL = ".universal"
"""Where, beside the checkpoints, one is converted for another number of ranks."""

Mark = dict[str, Any]
"""A file's size in bytes and its digest: {"bytes": …, "blake2b": …}."""


# -------------------------------------------------------------------------------------------------------- names


def checkpoint_tag(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step{step:08d}"


def is_tag(name: str) -> bool:
    """Return whether this is the name of a checkpoint; never true of a path."""
    return re.fullmatch(r"step\d{8,18}", name, re.ASCII) is not None


def step_of(tag: str) -> int:
    """Return the step that a checkpoint is named for."""
    return int(tag.removeprefix("step"))


def tags_in(directory: Path) -> list[str]:
    """Return the names of the checkpoints in `directory`, complete or not, newest first."""
    names = [path.name for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    return sorted(filter(is_tag, names), key=step_of, reverse=True)


def candidates(directory: Path) -> list[str]:
    """Return the names of the checkpoints that a run may go on from, newest first.

    They are the complete ones, none newer than `latest` says. The one that it names is always among them: if it is
    missing, that is damage to report. Without a `latest` that names a checkpoint, all complete ones are.
    """
    named = _named(directory)
    complete = [tag for tag in tags_in(directory) if (directory / tag / NOTE).is_file()]
    if named is None:
        return complete
    older = [tag for tag in complete if step_of(tag) < step_of(named)]
    return [named, *older]


def latest_tag(directory: Path) -> str | None:
    """Return the name of the checkpoint that a run goes on from, as far as can be told without reading it; or None.

    It is the newest of the candidates whose files are there; if all lack some, the newest.
    """
    tags = candidates(directory)
    whole = (tag for tag in tags if not _damage(directory / tag, look=_size_problem))
    return next(whole, tags[0] if tags else None)


def require_tag(directory: Path, tag: str) -> None:
    """Check that a checkpoint named by the user is there.

    Raises:
        ValueError: it is not; says which are.
    """
    if not is_tag(tag) or not (directory / tag / NOTE).is_file():
        there = ", ".join(tag for tag in tags_in(directory) if (directory / tag / NOTE).is_file()) or "none"
        raise ValueError(f"no checkpoint {tag!r} in {directory}: there are {there}")


def _named(directory: Path) -> str | None:
    """Return what `latest` says, or None if it does not name a checkpoint."""
    try:
        tag = (directory / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return tag if is_tag(tag) else None


# ------------------------------------------------------------------------------------------ notes and digests


def mark_of(path: Path) -> Mark:
    """Bring a file to the disk, and return its size and the digest of what can be read back."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, _digest).hexdigest()}


def _digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def write_note(folder: Path, note: Mapping[str, Any]) -> None:
    """Write checkpoint.json whole or not at all: from then on the checkpoint is complete."""
    note = json.loads(json.dumps(note))  # as it will be read
    replace_text(folder / NOTE, json.dumps({**note, "blake2b": _digest_of_note(note)}, indent=2))


def _digest_of_note(note: Mapping[str, Any]) -> str:
    digest = _digest()
    digest.update(json.dumps(note, sort_keys=True).encode())
    return digest.hexdigest()


def read_note(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself: step, ranks, zero_stage, state, files.

    Raises:
        ValueError: that file is missing, damaged, or lists files outside the folder.
    """
    path = folder / NOTE
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        digest = note.pop("blake2b")
        if digest != _digest_of_note(note):
            raise ValueError("its digest is another")
        if not all(isinstance(note[name], int) for name in ("step", "ranks", "zero_stage")):
            raise ValueError("its numbers are none")
        if not isinstance(note["state"], dict):
            raise ValueError("its state is none")
        if not note["files"] or any(name != Path(name).name or name in (".", "..") for name in note["files"]):
            raise ValueError("its files are none, or outside")
        if not all(isinstance(mark["bytes"], int) and "blake2b" in mark for mark in note["files"].values()):
            raise ValueError("its files have no digests")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged ({error})") from None
    return dict(note)


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """Return what the checkpoint that a run goes on from says of itself; see `read_note`."""
    return read_note(directory / (latest_tag(directory) or ""))


def _size_problem(path: Path, mark: Mark) -> str | None:
    """Return what is wrong with a file at first sight, or None."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return None if size == mark["bytes"] else f"{path} has {size} bytes of {mark['bytes']}"


def _problem(path: Path, mark: Mark) -> str | None:
    """Return what is wrong with a file, or None; reads it whole."""
    try:
        problem = _size_problem(path, mark)
        if problem is not None:
            return problem
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, _digest).hexdigest()
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None if digest == mark["blake2b"] else f"{path} is not what was written: its digest is another"


def _damage(
    folder: Path, look: Callable[[Path, Mark], str | None] = _problem, rank: int = 0, size: int = 1
) -> list[str]:
    """Return what is wrong with a checkpoint's files; of `size` ranks, each looks at some of them."""
    try:
        files: dict[str, Mark] = read_note(folder)["files"]
    except ValueError as error:
        return [str(error)]
    names = sorted(files, key=lambda name: (files[name]["bytes"], name))[rank::size]
    return [problem for name in names if (problem := look(folder / name, files[name])) is not None]


def first_good(directory: Path, tags: Sequence[str], world: World) -> tuple[str | None, list[str]]:
    """Return the first checkpoint of `tags` whose files are as they were written, and what is wrong with those before.

    Collective: the ranks share out the files, and all get the same answer.
    """
    wrong: list[str] = []
    for tag in tags:
        found = from_all_ranks(_damage(directory / tag, rank=world.rank, size=world.size), world)
        damage = sorted({problem for problems in found for problem in problems})
        if not damage:
            return tag, wrong
        wrong.append(damage[0] + (f", and {len(damage) - 1} more" if len(damage) > 1 else ""))
    return None, wrong


# ------------------------------------------------------------------------------------------------------ writing


def make_place(folder: Path) -> None:
    """Make an empty folder for a checkpoint, in place of one that is there."""
    drop(folder)
    folder.mkdir(parents=True)


def drop(folder: Path) -> None:
    """Delete a checkpoint; at no moment does it look complete and is not."""
    with suppress(OSError):
        (folder / NOTE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def publish(directory: Path, tag: str, note: Mapping[str, Any], *, keep_last: int, keep_every: int) -> None:
    """Make a checkpoint complete, let `latest` name it, and drop those that are not to be kept.

    Once `latest` names it, it is saved: old ones that cannot be dropped are a warning.

    Args:
        directory: where checkpoints of the run are kept.
        tag: the checkpoint whose files are written.
        note: step, ranks, zero_stage, state, files.
        keep_last: how many of the newest ones are kept, this one included.
        keep_every: those whose step is a multiple of it are kept, too; 0 for none.

    Raises:
        OSError: it could not be written, or the files of another rank are not here.
    """
    folder = directory / tag
    problems = [problem for name, mark in note["files"].items() if (problem := _size_problem(folder / name, mark))]
    if problems:
        raise OSError(f"{problems[0]}: the folder must be the same on all machines")
    earlier = [other for other in candidates(directory) if other != tag and (directory / other / NOTE).is_file()]
    write_note(folder, note)
    flush_names(directory)
    replace_text(directory / "latest", tag)
    earlier = [other for other in earlier if step_of(other) < step_of(tag)]
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


def go_on_from(directory: Path, tag: str) -> None:
    """Let `latest` name the checkpoint that was loaded: newer ones are out, and go when the run saves again."""
    named = _named(directory)
    if named is None:
        logger.warning("%s did not name a checkpoint; now it names %s, which was loaded", directory / "latest", tag)
    if named != tag:
        replace_text(directory / "latest", tag)


# ------------------------------------------------------------------------------------------------------ reading


@contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """Give a folder a path without special characters, for a while: 0.19.8 takes paths for patterns."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "checkpoints"
        link.symlink_to(directory.resolve(), target_is_directory=True)
        yield link
