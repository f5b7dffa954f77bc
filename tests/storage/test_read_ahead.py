import os
import time
from pathlib import Path

import pytest

from storage import read_ahead
from storage.read_ahead import ReadAhead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system reads nothing ahead")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Name, offset and size of what the system was asked for."""
    found: list[tuple[str, int, int]] = []

    def note(file: int, at: int, size: int, advice: int) -> None:
        found.append((Path(os.readlink(f"/proc/self/fd/{file}")).name, at, size))

    monkeypatch.setattr(os, "posix_fadvise", note)
    monkeypatch.setattr(read_ahead, "_PIECE", 400)
    return found


def wait_for(asked: list[tuple[str, int, int]], count: int) -> None:
    end = time.monotonic() + 20
    while len(asked) < count and time.monotonic() < end:
        time.sleep(0.01)


def test_files_are_read_whole_in_order_and_once(tmp_path: Path, asked: list[tuple[str, int, int]]) -> None:
    for name, size in (("a", 900), ("b", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    files = ReadAhead()
    files.want([tmp_path / "a", tmp_path / "gone", tmp_path / "b"])
    wait_for(asked, 4)
    files.want([tmp_path / "a"])
    (tmp_path / "c").write_bytes(b"1")
    files.want([tmp_path / "c"])
    wait_for(asked, 5)
    assert asked == [("a", 0, 400), ("a", 400, 400), ("a", 800, 400), ("b", 0, 400), ("c", 0, 400)]


def test_files_that_memory_cannot_hold_are_left_alone(
    tmp_path: Path, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_free_memory", lambda: 8 * 100)
    for name, size in (("large", 101), ("small", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    files = ReadAhead()
    files.want([tmp_path / "large"])
    files.want([tmp_path / "small"])
    wait_for(asked, 1)
    assert asked == [("small", 0, 400)]
