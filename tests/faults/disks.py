"""A full disk: a real small file system in memory, which only root may mount."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from jobs import Job, wait_for
from runs import LAST_SAVED, STEPS, Course, Fault, SkippedError, checkpoints, last_step, latest, require, require_equal

MIB = 1 << 20


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of a size.

    Raises:
        SkippedError: mounting is not allowed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        raise SkippedError(f"mounting a small disk needs root ({mounted.stderr.decode().strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _fill(folder: Path, *, leave: int = 0) -> Path:
    """Fill a disk up to `leave` bytes; return the file that fills it."""
    path = folder / "filler"
    with path.open("ab") as file, contextlib.suppress(OSError):
        while (left := shutil.disk_usage(folder).free - leave) > 0:
            file.write(bytes(min(left, MIB)))
            file.flush()
    return path


def _error_in(said: str) -> str:
    return next((line[:160] for line in said.splitlines() if line.startswith("error: ")), "")


def _hit(course: Course, name: str, *, when: str) -> tuple[str, str]:
    """Fill the disk while a job trains, and resume after there is room again."""
    straight = course.straight()
    size = 2 * _size_of(straight) + 64 * MIB
    with _small_disk(course.scratch / "disks" / name, size) as disk:
        bundle = Path(shutil.copytree(course.scratch / "untrained", disk / "bundle"))
        command = course.command(bundle)
        one_checkpoint = _size_of(checkpoints(straight) / f"step{STEPS:08d}")
        with Job(course.scratch / "logs" / name, command) as job:
            wait_for(lambda: last_step(bundle) >= 5 or not job.is_running(), "step 5")
            leave = {"a save": one_checkpoint // 2, "the metrics": 0}[when]
            filler = _fill(disk, leave=leave)
            codes = job.wait()
            said = job.said()
        require(codes == [1, 1], f"the ranks ended with {codes}: {said[-800:]}")
        require("No space left" in said or "could not save" in said, f"the disk is not named: {said[-800:]}")
        require("Traceback" not in said, f"a traceback: {said[-1500:]}")
        kept = latest(bundle)
        require(kept >= 4, "the checkpoint before is gone")
        filler.unlink()
        course.finish(command, f"{name}-end")
        require_equal(bundle, straight)
        return f"both ranks ended with 1: {_error_in(said)}", f"nothing; the command resumed from step {kept}"


def _export(course: Course, name: str) -> tuple[str, str]:
    """Fill the disk before the last step: the export fails, and the same command makes up for it."""
    straight = course.straight()
    with _small_disk(course.scratch / "disks" / name, 2 * _size_of(straight) + 64 * MIB) as disk:
        bundle = Path(shutil.copytree(course.scratch / "untrained", disk / "bundle"))
        command = course.command(bundle)
        with Job(course.scratch / "logs" / name, command) as job:
            wait_for(lambda: latest(bundle) >= LAST_SAVED or not job.is_running(), f"step {LAST_SAVED}")
            while job.is_running():  # also what the deletion of old checkpoints gives back
                _fill(disk, leave=64 << 10)  # enough for metrics, and for nothing else
                time.sleep(0.01)
            codes = job.wait()
            said = job.said()
        require(codes == [1, 1], f"the ranks ended with {codes}: {said[-800:]}")
        require("No space left" in said or "could not" in said, f"the disk is not named: {said[-800:]}")
        (disk / "filler").unlink()
        course.finish(command, f"{name}-end")
        require_equal(bundle, straight)
        return f"both ranks ended with 1: {_error_in(said)}", f"nothing; the command resumed from step {LAST_SAVED}"


FAULTS = [
    Fault(name="disk full in a save", injected="after step 5", run=partial(_hit, when="a save")),
    Fault(name="disk full while metrics are written", injected="after step 5", run=partial(_hit, when="the metrics")),
    Fault(name="disk full in the export", injected=f"after step {LAST_SAVED}", run=_export),
]
