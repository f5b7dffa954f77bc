import dataclasses
import hashlib
import logging
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from servers.web import Web, serving

pytest.importorskip("aiohttp", reason="nothing here reads the web: pip install 'dalle[http]'")

from storage.stores import errors, files
from storage.stores.cache import GB, Cache
from storage.stores.errors import Patience, StoreError, WrongBytesError
from storage.stores.remote import _status_of
from storage.stores.urls import is_remote, place_of, plain, shown

DATA = bytes(range(256)) * 400
QUICK = Patience(attempts=3, stall_s=0.6, min_speed=4096, first_wait_s=0.01)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, own_cache: None, tmp_path: Path) -> None:
    monkeypatch.setattr(errors, "PATIENCE", QUICK)
    files.use_cache(tmp_path / "cache", 1)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    folder = tmp_path / "served" / "shards"
    folder.mkdir(parents=True)
    (folder / "a.tar").write_bytes(DATA)
    with serving(folder.parent) as server:
        yield server


def read(path: Path) -> bytes:
    with files.open_file(path) as file:
        return file.read()


def test_a_file_is_fetched_once_verified_and_told(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    digest = hashlib.sha256(DATA).hexdigest()
    (web.folder / "shards" / "a.tar.sha256").write_text(f"{digest}  a.tar\n")
    path = files.remote_file(f"{web.url}/shards/a.tar")
    with caplog.at_level(logging.INFO):
        assert read(path) == DATA
        assert read(path) == DATA
    assert web.gets()["a.tar"] == 1
    assert path.stat().st_mtime == int((web.folder / "shards" / "a.tar").stat().st_mtime)
    assert "verified by its size and SHA-256 beside it" in caplog.text
    assert [one.name for one in path.parent.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("fault", ["503", "closed"])
def test_a_digest_beside_a_file_outlives_failures_that_pass(
    web: Web, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "PATIENCE", dataclasses.replace(QUICK, stall_s=20))
    for name in ("a.tar", "b.tar"):
        (web.folder / "shards" / name).write_bytes(DATA)
        (web.folder / "shards" / f"{name}.sha256").write_text(hashlib.sha256(b"other").hexdigest())
        web.faults[f"{name}.sha256"] = [fault] if name == "a.tar" else []
        with pytest.raises(WrongBytesError, match="SHA-256 beside it"):
            read(files.remote_file(f"{web.url}/shards/{name}"))
    web.faults["c.tar.sha256"] = ["500"] * 9
    for name in ("c.tar", "c.tar.sha256"):
        (web.folder / "shards" / name).write_bytes(DATA)
    with pytest.raises(StoreError, match=r"c\.tar\.sha256 cannot be read, its store fails"):
        read(files.remote_file(f"{web.url}/shards/c.tar"))


@pytest.mark.parametrize("fault", ["404", "403"])
def test_a_digest_that_is_missing_or_forbidden_is_asked_for_once(web: Web, fault: str) -> None:
    for name in ("a.tar", "b.tar"):
        (web.folder / "shards" / name).write_bytes(DATA)
        (web.folder / "shards" / f"{name}.sha256").write_text(hashlib.sha256(b"other").hexdigest())
        web.faults[f"{name}.sha256"] = [fault]
        assert read(files.remote_file(f"{web.url}/shards/{name}")) == DATA
    assert web.gets(".sha256") == {"a.tar.sha256": 1}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "faults", [["500"], ["503", "429"], ["cut"], ["hang"], ["closed"], ["drip"], ["moved"], ["wrong"], ["cut", "500"]]
)
def test_a_store_that_fails_for_a_while_is_asked_again(
    web: Web, faults: list[str], ranges: bool, caplog: pytest.LogCaptureFixture
) -> None:
    web.ranges, web.like_s3, web.faults["a.tar"] = ranges, True, list(faults)
    path = files.remote_file(f"{web.url}/shards/a.tar")
    assert read(path) == DATA
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (0 if faults in (["moved"], ["closed"]) else 1)  # aiohttp asks again by itself
    assert all("shards/a.tar" in line and "trying again, up to 2 times" in line for line in warnings)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_body_is_gone_on_with_where_ranges_are_known(web: Web, ranges: bool) -> None:
    web.ranges, web.faults["a.tar"] = ranges, ["cut"]
    assert read(files.remote_file(f"{web.url}/shards/a.tar")) == DATA
    assert web.ranges_of("a.tar") == [None, f"bytes={len(DATA) // 2 - 1}-"]


def test_a_file_that_changed_meanwhile_is_not_mixed(web: Web) -> None:
    path = files.remote_file(f"{web.url}/shards/a.tar")
    web.faults["a.tar"] = ["cut", "403"]
    with pytest.raises(StoreError):
        read(path)
    other = DATA[::-1]
    (web.folder / "shards" / "a.tar").write_bytes(other)
    assert read_again(path) == other


@pytest.mark.parametrize(
    ("always", "kind", "words"),
    [
        ("403", StoreError, "its store forbids it .*credentials.* missing, wrong or expired"),
        ("401", StoreError, "its store forbids it"),
        ("404", FileNotFoundError, "no http://127.* in its store"),
        ("400", StoreError, "refuses .*check the URL"),
        ("500", StoreError, "its store fails .*500.*; tried 3 times"),
        ("hang", StoreError, "its store does not answer .*; tried 3 times"),
        ("drip", StoreError, "does not answer .*only [0-9,]+ bytes in .*; tried 3 times"),
        ("cut", StoreError, "its store fails .*; tried 3 times"),
        ("html", WrongBytesError, "is a page of HTML or XML and no tar file: check the URL"),
        ("wrong", WrongBytesError, "has other bytes than it should .MD5 of its store"),
    ],
)
def test_a_store_that_goes_on_failing_is_told_in_words(
    web: Web, always: str, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    web.always, web.ranges, web.like_s3 = always, False, True
    path = files.remote_file(f"{web.url}/shards/a.tar")
    began = time.monotonic()
    with pytest.raises(kind, match=words) as raised:
        read(path)
    assert time.monotonic() - began < 20
    assert "\n" not in str(raised.value)
    assert "/shards/a.tar" in str(raised.value)
    assert not path.exists()


def test_a_server_that_is_gone_is_told(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/shards/a.tar"
    with pytest.raises(StoreError, match=r"its store fails .*; tried 3 times"):
        read(files.remote_file(url))


def test_a_bad_file_is_not_fetched_again_for_every_sample(web: Web) -> None:
    web.always = "html"
    path = files.remote_file(f"{web.url}/shards/a.tar")
    for _ in range(5):
        with pytest.raises(WrongBytesError):
            read(path)
    assert web.gets()["a.tar"] == QUICK.attempts


def test_wrong_bytes_are_asked_for_as_often_as_the_warning_says(
    web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(errors, "PATIENCE", Patience(attempts=6, stall_s=20, first_wait_s=0.01))
    web.always = "html"
    with pytest.raises(WrongBytesError, match="tried 3 times"):
        read(files.remote_file(f"{web.url}/shards/a.tar"))
    assert "trying again, up to 2 times" in caplog.text
    assert web.gets()["a.tar"] == 3


def test_secrets_are_neither_shown_nor_written(web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    web.faults["a.tar"] = ["500", "403"]
    url = f"{web.url}/shards/a.tar?X-Amz-Signature=SECRET1&X-Amz-Expires=9".replace("//", "//user:SECRET2@")
    path = files.remote_file(url)
    with caplog.at_level(logging.DEBUG, "storage"), pytest.raises(StoreError) as raised:
        read(path)
    assert read_again(path) == DATA
    told = str(raised.value) + caplog.text + "".join(str(one) for one in (tmp_path / "cache").rglob("*"))
    written = b"".join(one.read_bytes() for one in (tmp_path / "cache").rglob("*") if one.is_file())
    assert "SECRET" not in told
    assert "user" not in str(raised.value)
    assert b"SECRET" not in written
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def read_again(path: Path) -> bytes:
    files._failures.clear()
    return read(path)


def test_signatures_do_not_tell_files_apart_and_other_queries_do() -> None:
    signed = place_of("https://host/a.tar?X-Amz-Signature=1&X-Amz-Date=2")
    assert signed == place_of("https://host/a.tar") == Path("https/host/a.tar")
    assert place_of("https://host/a.tar?sv=1&sr=b&se=2&sp=r&skoid=3&sktid=4&skt=5&ske=6&sig=7") == signed
    for query in ("id", "split", "set", "start", "sample", "size", "seed", "skip", "stage", "tokens", "versionid"):
        assert place_of(f"https://host/get.tar?{query}=1") != place_of(f"https://host/get.tar?{query}=2")
    assert plain("https://me:word@host/a.tar?sig=1") == "https://host/a.tar"
    assert shown("GET 'https://me:word@host/a.tar?sig=1' s3://key:word@b/c") == "GET 'https://host/a.tar' s3://b/c"
    assert is_remote(Path("s3://bucket/a.tar"))
    assert not is_remote("pipe:cat x")
    for bad in ("s3://bucket/../../etc/x.tar", "s3://bucket", "http://host/.hidden/a.tar"):
        with pytest.raises(ValueError, match="names no file in a store"):
            place_of(bad)


# ------------------------------------------------------------------------------------------------ the cache


def test_the_cache_stays_in_its_bounds_and_what_is_open_stays_readable(web: Web, tmp_path: Path) -> None:
    names = [f"{letter}.tar" for letter in "abcd"]
    for name in names:
        (web.folder / "shards" / name).write_bytes(DATA)
    cache = tmp_path / "small"
    files.use_cache(cache, 2.5 * len(DATA) / GB)
    paths = [files.remote_file(f"{web.url}/shards/{name}") for name in names]
    with files.open_file(paths[0]) as first:
        read(paths[1])
        read(paths[0])  # used last, so that b makes room
        read(paths[2])
        assert [path.exists() for path in paths] == [True, False, True, False]
        read(paths[3])
        assert [path.exists() for path in paths] == [False, False, True, True]
        assert first.read() == DATA
    assert sum(path.stat().st_size for path in cache.rglob("*.tar")) <= 2.5 * len(DATA)
    assert read(paths[0]) == DATA


def test_a_file_larger_than_the_cache_is_told(web: Web, tmp_path: Path) -> None:
    files.use_cache(tmp_path / "small", 1e-6)
    with pytest.raises(StoreError, match=r"may have 0\.00: give more --cache-gb"):
        read(files.remote_file(f"{web.url}/shards/a.tar"))
    with pytest.raises(ValueError, match="--cache-gb is 0; expected a size above 0"):
        files.use_cache(None, 0)


def test_what_a_killed_fetch_left_makes_room(web: Web, tmp_path: Path) -> None:
    (web.folder / "shards" / "b.tar").write_bytes(DATA)
    files.use_cache(tmp_path / "small", 1.5 * len(DATA) / GB)
    web.faults["a.tar"] = ["cut", "403"]
    with pytest.raises(StoreError):
        read(files.remote_file(f"{web.url}/shards/a.tar"))
    assert list((tmp_path / "small").rglob("*.partial"))
    assert read(files.remote_file(f"{web.url}/shards/b.tar")) == DATA
    assert not list((tmp_path / "small").rglob("*.partial"))


def test_what_killed_uploads_left_makes_room_and_indexes_last(web: Web, tmp_path: Path) -> None:
    for name in ("b.tar", "c.tar"):
        (web.folder / "shards" / name).write_bytes(DATA)
    files.use_cache(tmp_path / "small", 2.5 * len(DATA) / GB)
    a, b, c = (files.remote_file(f"{web.url}/shards/{name}.tar") for name in "abc")
    assert read(a) == DATA
    with subprocess.Popen(["true"]) as ended:
        pass
    left = [a.with_name(f".x.tar.{ended.pid}.upload"), a.with_name(f"..x.tar.{ended.pid}.upload.{ended.pid}.partial")]
    index, current = a.with_name("a.tar.index"), a.with_name(f".x.tar.{os.getpid()}.upload")
    for made in (*left, index, current):
        made.write_bytes(DATA[: len(DATA) // 2])
        os.utime(made, (0, 0))
    assert read(b) == DATA
    assert [path.exists() for path in (*left, a, index, current)] == [False, False, False, True, True]
    assert read(c) == DATA
    assert [path.exists() for path in (b, index, current)] == [False, True, True]
    current.write_bytes(DATA + DATA[:1000])
    assert read(a) == DATA
    assert [path.exists() for path in (c, index, current)] == [False, False, True]


def test_without_a_home_only_who_needs_a_copy_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in (files.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    files.use_cache()
    assert files.file_status(ROOT / "README.md").n_bytes > 0
    with pytest.raises(ValueError, match=r"no folder for copies of stores' files.*or DALLE_CACHE"):
        files.remote_file(f"{web.url}/shards/a.tar")
    monkeypatch.setenv(files.CACHE_VARIABLE, str(web.folder / "cache"))
    files.use_cache()
    assert read(files.remote_file(f"{web.url}/shards/a.tar")) == DATA


def test_a_copy_deleted_while_sizes_are_added_up_is_no_error(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(Path, "rglob", lambda *_: [tmp_path / "cache" / "deleted.tar"])
    files.use_cache(tmp_path / "cache")
    assert read(files.remote_file(f"{web.url}/shards/a.tar")) == DATA


def test_a_disk_that_cannot_be_written_is_told(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    files.use_cache(tmp_path / "file" / "cache", 1)
    with pytest.raises(StoreError, match=r"cannot keep .*Not a directory.*--cache gives another folder"):
        read(files.remote_file(f"{web.url}/shards/a.tar"))


def test_a_copy_that_the_disk_takes_in_part_never_gets_its_name(web: Web) -> None:
    path = files.remote_file(f"{web.url}/shards/a.tar")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) - 10, hard))  # as if the disk were full there
    try:
        with pytest.raises(StoreError, match=r"cannot keep .*File too large.*--cache gives another folder"):
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    assert read_again(path) == DATA


def _read_all(url: str, cache: Path, names: list[str], barrier: "multiprocessing.synchronize.Barrier") -> None:
    files.use_cache(cache, 1)
    paths = [files.remote_file(f"{url}/shards/{name}") for name in names]
    barrier.wait()
    for number, path in enumerate(paths):
        files.prefetch(paths[number:])
        assert read(path) == DATA


@pytest.mark.slow
def test_four_processes_fetch_each_file_once(web: Web, tmp_path: Path) -> None:
    names = [f"{number}.tar" for number in range(6)]
    for name in names:
        (web.folder / "shards" / name).write_bytes(DATA)
        web.faults[name] = ["slow"]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    arguments = (web.url, tmp_path / "cache", names, barrier)
    processes = [context.Process(target=_read_all, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert web.gets() == dict.fromkeys(names, 1)


FETCH = """
import sys
from pathlib import Path
from storage.stores import files
files.use_cache(Path(sys.argv[2]), 1)
with files.open_file(files.remote_file(sys.argv[1])) as file:
    sys.stdout.buffer.write(file.read())
"""


def test_a_fetch_that_was_killed_is_gone_on_with(web: Web, tmp_path: Path) -> None:
    web.faults["a.tar"] = ["slow"]
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", FETCH, f"{web.url}/shards/a.tar", str(cache)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while not any(path.stat().st_size for path in cache.rglob("*.partial")):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == DATA
    first, second = web.ranges_of("a.tar")
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").rstrip("-")) > 0


def test_a_fetch_killed_before_its_first_byte_mixes_no_versions(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.remote_file(f"{web.url}/shards/a.tar")
    web.faults["a.tar"] = ["cut", "403"]
    with pytest.raises(StoreError):
        read(path)
    other = DATA[::-1]
    (web.folder / "shards" / "a.tar").write_bytes(other)
    make_room = Cache._make_room

    def killed(*arguments: Any) -> None:
        make_room(*arguments)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "_make_room", killed)
        with pytest.raises(SystemExit):
            read_again(path)
    assert read_again(path) == other


def test_a_copy_of_before_a_change_is_fetched_again(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{web.url}/shards/a.tar"
    path = files.remote_file(url)
    assert read(path) == DATA
    (web.folder / "shards" / "a.tar").write_bytes(b"other" + DATA)
    assert read(path) == DATA
    monkeypatch.setattr(files, "_remotes", {})  # as in another process
    assert files.file_status(files.remote_file(url)).n_bytes == len(DATA) + 5
    assert read(path) == b"other" + DATA


def test_without_times_a_change_is_noticed_by_the_version(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.dated = False
    url = f"{web.url}/shards/a.tar"

    def in_another_process() -> tuple[files.FileStatus, bytes]:
        monkeypatch.setattr(files, "_remotes", {})
        path = files.remote_file(url)
        return files.file_status(path), read(path)

    before = files.file_status(files.remote_file(url))
    assert in_another_process() == in_another_process() == (before, DATA)
    assert web.gets()["a.tar"] == 1
    (web.folder / "shards" / "a.tar").write_bytes(DATA[::-1])
    after, data = in_another_process()
    assert data == DATA[::-1]
    assert after.n_bytes == before.n_bytes
    assert after.changed_ns != before.changed_ns


def test_copies_are_used_when_the_store_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(DATA)
    with serving(tmp_path / "served") as server:
        path = files.remote_file(f"{server.url}/a.tar")
        read(path)
    assert files.file_status(path).n_bytes == len(DATA)
    assert read(path) == DATA
    assert "copies of shards are used as they are" in caplog.text


def test_size_and_time_are_known_without_a_copy(web: Web) -> None:
    path = files.remote_file(f"{web.url}/shards/a.tar")
    there = (web.folder / "shards" / "a.tar").stat()
    assert files.file_status(path) == (len(DATA), int(there.st_mtime) * 10**9)
    assert web.gets() == {}
    read(path)
    assert files.file_status(path) == (len(DATA), int(there.st_mtime) * 10**9)
    assert not files.exists(files.remote_file(f"{web.url}/shards/gone.tar"))


def test_the_web_cannot_be_written_to(web: Web, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written to: give a folder, or a URL such as s3://"):
        files.write_file(files.remote_file(f"{web.url}/shards/b.tar"), lambda path: path.write_bytes(b""))


def test_two_caches_hold_copies_of_their_own(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/shards/a.tar"
    for name in ("one", "two"):
        Cache(tmp_path / name, GB).fetch(url)
    assert web.gets()["a.tar"] == 2


def test_the_md5_of_azure_is_found_in_its_sdks_settings() -> None:
    md5 = hashlib.md5(DATA).digest()
    for settings in ({"content_md5": md5}, SimpleNamespace(content_md5=bytearray(md5))):
        digest = _status_of({"size": len(DATA), "content_settings": settings}).digest
        assert digest == ("md5", md5.hex(), "MD5 of its store")
    assert _status_of({"size": 1, "content_settings": SimpleNamespace(content_md5=None)}).digest is None
