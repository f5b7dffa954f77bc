import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from storage.atomic import copy_folder, replace_file, replace_text


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    replace_file(tmp_path / "a", lambda partial: save_file({"x": torch.zeros(2)}, partial))
    replace_text(tmp_path / "b", "text")
    for name in "ab":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    replace_text(tmp_path / "file", "old")

    def fails(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        replace_file(tmp_path / "file", fails)
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "file", "\udc80")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_an_error_names_the_file_and_not_the_hidden_one(tmp_path: Path) -> None:
    def is_full(partial: Path) -> None:
        raise OSError(28, "No space left on device")

    for path, write in ((tmp_path / "file", is_full), (tmp_path / "none" / "file", Path.touch)):
        with pytest.raises(OSError, match=r"No space left|No such file") as caught:
            replace_file(path, write)
        assert caught.value.filename == str(path)


def test_a_folder_is_copied_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("text")
    copy_folder(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "file").read_text() == "text"
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        copy_folder(source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source"]
