import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import storage.lock
from storage.lock import LOCK, FolderInUseError, is_locked, is_locked_by, locked, require_free

QUICK_S = 0.6


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.lock, "SILENCE_S", QUICK_S)
    monkeypatch.setattr(storage.lock, "POLL_S", 0.02)


def written_elsewhere(folder: Path) -> Path:
    """Leave the lock of a holder on another host, which gives no sign of life; returns the file."""
    folder.mkdir(exist_ok=True)
    path = folder / LOCK
    with locked(folder):
        text = path.read_text()
    values = dict(line.split("=") for line in text.splitlines()[1:])
    path.write_text(text.replace(f"host={values['host']}", "host=far").replace(f"start={values['start']}", "start=1"))
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


HOLD = f"""
import sys, time
from pathlib import Path
import storage.lock
storage.lock.SILENCE_S = {QUICK_S}
with storage.lock.locked(Path(sys.argv[1])):
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
    names = rf"out is in use by process {process.pid} on host \S+, last sign of life \d+ s ago"
    with pytest.raises(FolderInUseError, match=names), locked(folder):
        pass
    with pytest.raises(FolderInUseError, match=names):
        require_free(folder)
    assert is_locked(folder)
    assert is_locked_by(folder, [process.pid])
    assert not is_locked_by(folder, [os.getpid()])
    assert names_in(folder) == [LOCK], "what the refused one made is gone"


def test_a_killed_holder_on_this_host_keeps_nobody_out(held: tuple[Path, "subprocess.Popen[str]"]) -> None:
    folder, process = held
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_locked_by(folder, [process.pid])
    with locked(folder):
        assert is_locked_by(folder, [os.getpid()])
        assert is_locked(folder)
    assert names_in(folder) == []
    assert not is_locked(folder)


def test_a_holder_that_nobody_waited_for_keeps_nobody_out(held: tuple[Path, "subprocess.Popen[str]"]) -> None:
    folder, process = held
    process.send_signal(signal.SIGKILL)
    with locked(folder):
        assert process.returncode is None, "its parent has not asked yet"


def test_a_holder_elsewhere_that_gives_signs_of_life_is_alive(tmp_path: Path) -> None:
    path = written_elsewhere(tmp_path)
    stopped = threading.Event()

    def live() -> None:
        while not stopped.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="on host far"), locked(tmp_path):
            pass
    finally:
        stopped.set()
        thread.join()


def test_a_holder_elsewhere_that_stays_silent_is_dead(tmp_path: Path) -> None:
    written_elsewhere(tmp_path)
    since = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - since >= QUICK_S, "it had time to show itself"


def test_a_waiting_holder_gets_its_turn(tmp_path: Path) -> None:
    order: list[str] = []
    begun = threading.Event()

    def first() -> None:
        with locked(tmp_path):
            begun.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    with locked(tmp_path, wait_s=20):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def count_up(folder: Path, turns: int) -> None:
    for _ in range(turns):
        with locked(folder, wait_s=60):
            number = int((folder / "count").read_text())
            (folder / "count").write_text(str(number + 1))


def test_of_many_only_one_holds_it_at_a_time(held: tuple[Path, "subprocess.Popen[str]"]) -> None:
    folder, process = held
    process.kill()
    process.wait()
    (folder / "count").write_text("0")
    workers = [multiprocessing.get_context("fork").Process(target=count_up, args=(folder, 10)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert (folder / "count").read_text() == "40"
    assert names_in(folder) == ["count"]


def test_who_loses_the_lock_hears_of_it_and_leaves_it(tmp_path: Path) -> None:
    heard: list[str] = []
    other = written_elsewhere(tmp_path / "beside")
    with locked(tmp_path, on_lost=heard.append):
        other.replace(tmp_path / LOCK)
        deadline = time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
    assert f"the lock of {tmp_path} was lost" in heard[0]
    assert LOCK in names_in(tmp_path)


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b"):
        raise KeyError
    assert names_in(tmp_path) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert (tmp_path / "a" / "b" / "result").exists()
