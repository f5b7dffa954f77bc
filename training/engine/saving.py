"""Saves checkpoints: all ranks write, what they wrote is read back, and then the checkpoint is published, or dropped.

With a `stage_dir` they write to a local disk first. In every rank a thread then copies that rank's files to the run's
folder while training goes on. Only when all ranks' files are there, and good, is the checkpoint published: until then
it does not exist.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from storage.disk import full_disk_note
from storage.errors import reason_of
from training.config import TrainConfig
from training.engine.checkpoints import (
    FileDigest,
    digest_of,
    drop,
    first_line,
    latest_tag,
    make_empty,
    new_digest,
    publish,
)
from training.patches import WRITE_ERRORS
from training.ranks.ranks import Ranks, agree, from_all_ranks, on_first_rank

PIECE = 1 << 24
"""Bytes that are copied at a time."""


class Saver:
    """Saves the checkpoints of a run, and moves them there from a local disk if one is given.

    Args:
        config: of the run; says which checkpoints are kept, and where they are written first.
        ranks: the ranks.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._staged: tuple[Moving, Path, str, dict[str, Any]] | None = None
        """A checkpoint on its way from the local disk: its files, and what `_publish` is told."""

    def save(
        self, directory: Path, tag: str, manifest: dict[str, Any], write: Callable[[Path, str], list[Path]]
    ) -> None:
        """Save a checkpoint, or begin to move it from the local disk. Collective.

        Args:
            directory: the run's checkpoints; the same folder for all ranks.
            tag: names the checkpoint.
            manifest: of the checkpoint, but for its files.
            write: writes this rank's files into `directory / tag` for the two that it is given, and returns them.

        Raises:
            OSError: it, or the one before it, could not be written; an earlier checkpoint stays good.
        """
        self.publish_staged()
        written: dict[str, FileDigest] = {}
        files: list[Path] = []
        problem, stage = "", self._stage_of(directory)
        try:
            on_first_rank(lambda: make_empty(directory / tag), self._ranks)
            if stage is not None:
                self._make_room(stage / tag)
            files = write(stage or directory, tag)
            if stage is None:
                written = {file.name: digest_of(file) for file in files}
        except (*WRITE_ERRORS, SafetensorError) as error:
            problem = _problem_of(error, stage or directory)
        if stage is None or agree(bool(problem), self._ranks):
            self._publish(directory, tag, manifest, written, problem)
        else:
            self._staged = Moving(files, directory / tag), directory, tag, manifest

    def publish_staged(self, *, wait: bool = True) -> None:
        """Publish the checkpoint that is on its way from the local disk, if there is one. Collective.

        Args:
            wait: until it has arrived; otherwise it is published if it has.

        Raises:
            OSError: it could not be moved; the previous checkpoint stays good.
        """
        if self._staged is None or (not wait and agree(not self._staged[0].is_done, self._ranks)):
            return
        (moving, directory, tag, manifest), self._staged = self._staged, None
        moving.wait()
        self._publish(directory, tag, manifest, moving.written, moving.problem)

    def _stage_of(self, directory: Path) -> Path | None:
        """Return this rank's folder for checkpoints of a run on the local disk, if one is wanted."""
        if self._config.stage_dir is None:
            return None
        run = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]
        return self._config.stage_dir / f"{run}-{self._ranks.rank:05d}"

    def _make_room(self, folder: Path) -> None:
        """Make an empty folder on the local disk of every rank, in place of all that an earlier start left. Collective.

        Raises:
            OSError: on all ranks, if one cannot.
        """
        error: OSError | None = None
        try:
            drop(folder.parent)
            make_empty(folder)
        except OSError as caught:
            error = caught
        if agree(error is not None, self._ranks):
            raise error or OSError("another rank cannot write to its --stage-dir")

    def _publish(
        self, directory: Path, tag: str, manifest: dict[str, Any], written: dict[str, FileDigest], problem: str
    ) -> None:
        """Let a checkpoint exist whose files all ranks have written, or drop it. Collective.

        Args:
            directory: the run's checkpoints.
            tag: names the checkpoint.
            manifest: but for the files.
            written: this rank's files, with their digests.
            problem: why this rank's could not be written; "" if they were.

        Raises:
            OSError: it was dropped.
        """
        parts = from_all_ranks((written, problem), self._ranks)
        problem = problem or next((f"another rank, {rank}: {told}" for rank, (_, told) in enumerate(parts) if told), "")
        if not problem:
            manifest["files"] = {name: digest for part, _ in parts for name, digest in part.items()}
            keep = {"keep_last": self._config.keep_last, "keep_every": self._config.keep_every}
            try:
                on_first_rank(lambda: publish(directory, tag, manifest, **keep), self._ranks)
                return
            except OSError as error:
                problem = _problem_of(error, directory)
        on_first_rank(lambda: drop(directory / tag), self._ranks)
        kept = latest_tag(directory)
        raise OSError(
            f"could not save the checkpoint {directory / tag} ({problem}): "
            + (f"{kept} is kept, and the same command resumes from it" if kept else "no earlier checkpoint exists")
        )


class Moving:
    """The files of one rank on their way from the local disk to a checkpoint's folder."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self._files, self._folder = files, folder
        self.written: dict[str, FileDigest] = {}
        """The digest of each file that has arrived, by its name."""
        self.problem = ""
        """Why a file could not be moved."""
        self._thread = threading.Thread(target=self._move, name="moving a checkpoint", daemon=True)
        self._thread.start()

    def _move(self) -> None:
        try:
            for file in self._files:
                self.written[file.name] = moved(file, self._folder / file.name)
        except Exception as error:  # whichever it is, the checkpoint lacks files
            self.problem = reason_of(error) + full_disk_note(error, self._folder)

    @property
    def is_done(self) -> bool:
        """Whether all files have arrived, or one could not be moved."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it is done."""
        self._thread.join()


def moved(source: Path, target: Path) -> FileDigest:
    """Copy a file, compare what is read back there with what was read here, and delete it here; returns its digest.

    Raises:
        OSError: it could not be copied, or is not what it was.
    """
    digest, size = new_digest(), 0
    with source.open("rb") as reading, target.open("wb") as writing:
        while piece := reading.read(PIECE):
            digest.update(piece)
            size += writing.write(piece)
    found = digest_of(target)
    if found != {"bytes": size, "blake2b": digest.hexdigest()}:
        raise OSError(f"{target} is not what was copied from {source}")
    source.unlink()
    return found


def _problem_of(error: Exception, directory: Path) -> str:
    """Return why a checkpoint could not be written, and if the disk is full, which."""
    return first_line(error) + full_disk_note(error, directory)
