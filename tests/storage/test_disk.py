import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from storage.disk import full_disk_text, is_of_full_disk


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EDQUOT, "quota"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("write failed"), False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(tmp_path: Path, error: Exception, is_full: bool) -> None:
    assert is_of_full_disk(error, tmp_path / "not" / "there") is is_full


def test_an_error_without_a_number_on_a_disk_without_room_is_one_of_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=64 << 20, free=4096))
    assert is_of_full_disk(RuntimeError("write failed"), tmp_path)
    assert "(0.0 of 64.0 MiB left): free some space" in full_disk_text(tmp_path / "a" / "b")


def test_the_disk_is_named_by_where_it_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    (disk / "runs").mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == disk)
    assert full_disk_text(disk / "runs" / "x.png").startswith(f"the disk at {disk} is full")
