import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import storage.lock
from storage.lock import LOCK, FolderInUseError, Holder, holder_of, locked
from storage.process import Process, this_process


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HEARTBEAT_S", 0.05), ("SILENCE_S", 0.5), ("DYING_S", 0.05), ("POLL_S", 0.01)):
        monkeypatch.setattr(storage.lock, name, seconds)


def written_by(folder: Path, **changes: Any) -> Path:
    """Leave the lock of another holder, which gives no sign of life; returns the file."""
    with locked(folder, "another job"):
        values = json.loads((folder / LOCK).read_text())
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps({**values, "token": "other", **changes}))
    return folder / LOCK


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from storage.lock import locked
with locked(Path(sys.argv[1]), "holding"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    folder = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield folder, process
        process.kill()


def test_a_second_holder_is_refused_by_name(held: tuple[Path, "subprocess.Popen[str]"]) -> None:
    folder, process = held
    names = rf"out is in use by holding \(host .+, process {process.pid}\), last sign of life \d+ s ago"
    with pytest.raises(FolderInUseError, match=names), locked(folder, "a second"):
        pass
    holder = holder_of(folder)
    assert holder is not None
    assert (holder.job, holder.process.pid) == ("holding", process.pid)
    assert names_in(folder) == [LOCK], "what the refused one made is gone"


def test_a_killed_holder_on_this_host_keeps_nobody_out(held: tuple[Path, "subprocess.Popen[str]"]) -> None:
    folder, process = held
    process.send_signal(signal.SIGKILL)
    with locked(folder, "the next"):
        assert holder_of(folder) is not None
    assert names_in(folder) == []
    assert holder_of(folder) is None


def test_a_later_process_with_the_same_id_is_not_the_holder(tmp_path: Path) -> None:
    mine = this_process()
    written_by(tmp_path, process={"pid": mine.pid, "started": mine.started - 1})
    with locked(tmp_path, "mine"):
        pass
    assert names_in(tmp_path) == []


def test_a_holder_elsewhere_that_gives_signs_of_life_is_alive(tmp_path: Path) -> None:
    path = written_by(tmp_path, place="elsewhere", host="far")
    stopped = threading.Event()

    def live() -> None:
        while not stopped.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="host far"), locked(tmp_path, "mine"):
            pass
    finally:
        stopped.set()
        thread.join()


def test_a_holder_elsewhere_that_stays_silent_is_dead(tmp_path: Path) -> None:
    written_by(tmp_path, place="elsewhere")
    since = time.monotonic()
    with locked(tmp_path, "mine"):
        assert time.monotonic() - since >= 0.4, "it had time to show itself"


def test_the_first_rank_of_the_same_job_need_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.lock, "SILENCE_S", 60.0)
    written_by(tmp_path, place="elsewhere", group="job 7")
    with locked(tmp_path, "mine", group="job 7"):
        pass


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"process": 1}', "\0\0"])
def test_a_damaged_lock_lasts_until_it_is_old(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with locked(tmp_path, "mine"):
        pass
    assert names_in(tmp_path) == []


def test_a_disk_without_hard_links_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(os, "link", refuses)
    with locked(tmp_path, "mine"):
        with pytest.raises(FolderInUseError), locked(tmp_path, "again"):
            pass
        assert holder_of(tmp_path) is not None
    assert names_in(tmp_path) == []


def test_a_waiting_holder_gets_its_turn(tmp_path: Path) -> None:
    order: list[str] = []
    begun = threading.Event()

    def first() -> None:
        with locked(tmp_path, "first"):
            begun.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    with locked(tmp_path, "second", wait_s=20):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def count_up(folder: Path, turns: int) -> None:
    for _ in range(turns):
        with locked(folder, "counting", wait_s=60):
            number = int((folder / "count").read_text())
            (folder / "count").write_text(str(number + 1))


def test_of_many_after_a_dead_one_only_one_holds_it_at_a_time(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    written_by(tmp_path, process=dataclasses.asdict(Process(pid=gone.pid, started=1)))
    (tmp_path / "count").write_text("0")
    workers = [multiprocessing.get_context("fork").Process(target=count_up, args=(tmp_path, 10)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert (tmp_path / "count").read_text() == "40"
    assert names_in(tmp_path) == ["count"]


def test_who_loses_the_lock_hears_of_it_and_leaves_it(tmp_path: Path) -> None:
    heard: list[str] = []
    with locked(tmp_path, "mine", on_lost=heard.append):
        path = written_by(tmp_path / "beside", place="elsewhere", host="far")
        path.replace(tmp_path / LOCK)
        deadline = time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "another job (host far" in heard[0]
    assert LOCK in names_in(tmp_path)


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b", "mine"):
        raise KeyError
    assert names_in(tmp_path) == []
    with locked(tmp_path / "a" / "b", "mine"):
        (tmp_path / "a" / "b" / "result").touch()
    assert (tmp_path / "a" / "b" / "result").exists()


def test_a_holder_says_who_it_is() -> None:
    holder = Holder(host="vm", place="", process=Process(pid=7, started=1), job="dalle-train clip", group="")
    assert str(holder) == "dalle-train clip (host vm, process 7)"
