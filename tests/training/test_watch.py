"""The watch of a rank: processes and launchers, hangs, lost ranks, signals."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.waiting import PATIENCE_S, wait_for

import training.ranks.news
import training.ranks.processes
import training.ranks.ranks
import training.ranks.watch
from storage.process import Process, status_of
from training.engine.checkpoints import latest_tag
from training.ranks.news import RankPosition, ranks_behind
from training.ranks.processes import Member, launchers, this_member
from training.ranks.stop import StopSignals
from training.ranks.watch import RankLostError, Watch

# ---------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def started_by(tmp_path: Path) -> Iterator[Callable[[str, str], tuple[subprocess.Popen[str], int]]]:
    """Starts a shell command from a program of some name; returns the program and the number that it prints."""
    programs = []

    def start(name: str, command: str) -> tuple[subprocess.Popen[str], int]:
        script = tmp_path / name
        script.write_text(f"import subprocess\nsubprocess.run(['sh', '-c', {command!r}])\n")
        program = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        programs.append(program)
        assert program.stdout is not None
        return program, int(program.stdout.readline())

    yield start
    for program in programs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


def test_all_processes_up_to_the_outermost_launcher_are_launchers(
    started_by: Callable[[str, str], tuple[subprocess.Popen[str], int]],
) -> None:
    program, rank = started_by("torchrun", "sleep 60 & echo $!; wait")
    shell, launcher = launchers(rank)
    assert launcher.pid == program.pid
    assert shell.pid not in (program.pid, rank)


def test_a_shell_or_a_script_is_no_launcher(
    started_by: Callable[[str, str], tuple[subprocess.Popen[str], int]],
) -> None:
    program, rank = started_by("train.py", "sleep 60 & echo $!; wait")
    assert program.pid not in [process.pid for process in launchers(rank)]


def test_a_process_that_its_parent_has_not_waited_for_is_gone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = launchers_child = Process(pid=child.pid, started=_started(child.pid))
    assert not process.is_gone()
    assert dataclasses.replace(launchers_child, started=process.started + 1).is_gone(), "another one of that number"
    child.kill()
    wait_for(process.is_gone)
    child.wait()
    assert process.is_gone()


def _started(pid: int) -> int:
    status = status_of(pid)
    assert status is not None
    return status.started


def test_a_rank_is_introduced_to_the_others_as_text() -> None:
    member = this_member(3)
    assert Member.from_json(member.to_json()) == member
    assert str(member) == f"rank 3 (host {member.host}, process {os.getpid()})"
    assert not member.process.is_gone()


# --------------------------------------------------------------------------------------------------- the watch


def at(touches: int, *, is_waiting: bool = False) -> RankPosition:
    return RankPosition(touches=touches, is_waiting=is_waiting, step=touches)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({0: at(5), 1: at(5), 2: at(4)}, [2]),
        ({0: at(5), 2: at(4)}, [1]),
        ({0: at(5, is_waiting=True), 1: at(5), 2: at(5, is_waiting=True)}, [1]),
        ({0: at(5), 1: at(5), 2: at(5)}, []),
    ],
)
def test_ranks_that_do_not_answer_or_wait_or_are_least_far_are_behind(
    answers: dict[int, RankPosition], expected: list[int]
) -> None:
    assert ranks_behind(answers, 3) == expected


@pytest.fixture
def last_words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What watches have said in ending the process, which they do not do here."""
    said: list[str] = []

    monkeypatch.setattr(training.ranks.watch, "end_process", said.append)
    return said


def test_when_nothing_moves_the_stacks_are_written_and_the_job_ends(tmp_path: Path, last_words: list[str]) -> None:
    watch = Watch(timeout_s=0.6)
    watch.start()
    watch.follow(tmp_path, lambda: latest_tag(tmp_path / "checkpoints"))
    watch.touch(7)
    wait_for(lambda: last_words)
    watch.stop()
    assert "nothing has moved for" in last_words[0]
    assert "stopped after step 7" in last_words[0]
    assert "no checkpoint is saved yet, the same command starts anew" in last_words[0]
    stacks = (tmp_path / "stacks" / "rank00000.txt").read_text()
    assert "test_when_nothing_moves" in stacks, "the main thread is in there"
    assert "7 steps done" in stacks
    said = json.loads((tmp_path / "state.json").read_text())
    assert (said["state"], said["reason"]) == ("failed", last_words[0])


@pytest.mark.slow
def test_a_run_that_moves_or_has_ended_or_not_begun_is_not_hung(tmp_path: Path, last_words: list[str]) -> None:
    watch = Watch(timeout_s=0.6)
    watch.start()
    watch.follow(tmp_path, lambda: latest_tag(tmp_path / "checkpoints"))
    time.sleep(1.2)  # before the first step, four times as long
    for step in range(4):
        watch.touch(step)
        time.sleep(0.4)
    watch.unfollow()
    time.sleep(1.5)
    watch.stop()
    assert not last_words


def sleeper() -> tuple[subprocess.Popen[bytes], Process]:
    child = subprocess.Popen(["sleep", "60"])
    return child, Process(pid=child.pid, started=_started(child.pid))


def test_a_launcher_that_is_gone_acts_like_a_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    child, process = sleeper()
    monkeypatch.setattr(training.ranks.watch, "launchers", lambda pid: (process,))
    watch = Watch()
    with StopSignals() as stop:
        watch.start()
        time.sleep(0.6)
        assert not stop.raised
        child.kill()
        child.wait()
        wait_for(lambda: stop.raised)
    watch.stop()


def test_a_lost_rank_is_named_with_the_checkpoint_to_resume_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[str]
) -> None:
    monkeypatch.setattr(training.ranks.watch, "GRACE_S", 0.1)
    child, process = sleeper()
    here = this_member(0)
    watch = Watch([here, dataclasses.replace(here, rank=1, process=process)])
    (tmp_path / "checkpoints" / "step00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step00000004")
    watch.follow(tmp_path, lambda: latest_tag(tmp_path / "checkpoints"))
    watch.start()
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer")
    assert watch.lost_rank_error(broken, wait_s=0.7) is None
    assert watch.lost_rank_error(ValueError("no rank's end"), wait_s=PATIENCE_S) is None
    child.kill()
    child.wait()
    error = watch.lost_rank_error(broken, wait_s=PATIENCE_S)
    expected = f"rank 1 (host {here.host}, process {process.pid}) is gone: the same command resumes from {tmp_path}"
    assert isinstance(error, RankLostError)
    assert str(error) == f"{expected}/checkpoints/step00000004"
    wait_for(lambda: last_words)  # the main thread did not end by itself
    assert last_words == [str(error)]
    watch.stop()
    said = json.loads((tmp_path / "state.json").read_text())
    assert (said["state"], said["reason"]) == ("failed", str(error))


def test_ranks_meet_although_the_store_remembers_an_earlier_start() -> None:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]  # as in training/ranks/ranks.py
    earlier = [this_member(rank).to_json().replace('"host": "', '"host": "earlier ') for rank in range(3)]
    assert store.add("turn", 1) == 1
    store.set("1/all", json.dumps(earlier[:2]))  # of as many ranks as there were then
    met: dict[int, tuple[list[Member], str]] = {}

    def meet(rank: int) -> None:
        met[rank] = training.ranks.ranks._introduce(store, rank, 3)

    late = threading.Timer(0.5, meet, (0,))
    threads = [late, *(threading.Thread(target=meet, args=(rank,)) for rank in (1, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert {rank: turn for rank, (_, turn) in met.items()} == dict.fromkeys(range(3), "turn 2")
    assert met[0][0] == met[1][0] == met[2][0] == [this_member(rank) for rank in range(3)]


def test_a_short_timeout_does_not_shorten_the_timeout_of_collectives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    store = dist.HashStore()  # type: ignore[attr-defined]  # as in training/ranks/ranks.py
    monkeypatch.setattr(training.ranks.ranks, "job_store", lambda place, *, host: store)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options))
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(dist.distributed_c10d, name, None)
    training.ranks.ranks._meet("gloo", timeout_s=1.0).stop()
    assert given["timeout"] >= timedelta(days=7)
    assert dist.distributed_c10d.default_pg_timeout == given["timeout"]


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watch, Any]]:
    """The watch of rank 0, whose only other rank is on another host, and their store; a heartbeat is soon missed."""
    for name, seconds in (("POLL_S", 0.05), ("HEARTBEAT_S", 0.2), ("MAX_SILENCE_S", 0.5)):
        monkeypatch.setattr(training.ranks.watch, name, seconds)
        monkeypatch.setattr(training.ranks.news, name, seconds)
    here = this_member(0)
    store = dist.HashStore()  # type: ignore[attr-defined]  # as in training/ranks/ranks.py
    watch = Watch([here, dataclasses.replace(here, rank=1, place="elsewhere")], store=store)
    watch.start()
    yield watch, store
    watch.stop()


BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer")


def test_a_rank_on_another_host_is_named_once_its_heartbeat_is_missed(
    two_hosts: tuple[Watch, Any],
) -> None:
    watch, store = two_hosts
    store.set("heartbeat/1", "1")
    error = watch.lost_rank_error(BROKEN, wait_s=0.1)
    assert str(error).startswith(f"{watch.members[1]} is gone (not heard of for ")
    assert json.loads(store.get("lost"))["rank"] == 1, "the others hear of it, and not of this one"


def test_an_unknown_lost_rank_is_an_error_and_this_one_is_not_blamed(
    two_hosts: tuple[Watch, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, store = two_hosts
    monkeypatch.setattr(training.ranks.news.News, "_listen", lambda _: None)
    for _ in range(2):  # the second time without waiting
        error = watch.lost_rank_error(BROKEN, wait_s=0.1)
        assert str(error).startswith("another rank is gone, unknown which ([gloo/transport")
    assert not store.check(["lost"])


def test_an_error_outside_collectives_does_not_mean_a_lost_rank(two_hosts: tuple[Watch, Any]) -> None:
    watch, _ = two_hosts
    assert watch.lost_rank_error(RuntimeError("CUDA out of memory"), wait_s=0.1) is None
    assert watch.lost is None, "it is told before a heartbeat is missed"


def never() -> None:
    threading.Event().wait()


@pytest.mark.slow
def test_a_disk_that_hangs_does_not_keep_a_hung_job_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training.ranks.watch, "GRACE_S", 0.2)
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)  # pytest's own has no descriptor
    watch = Watch(timeout_s=0.6)
    monkeypatch.setattr(watch, "_write_stacks", never)
    watch.follow(tmp_path, never)
    watch.touch(7)
    watch.start()
    wait_for(lambda: last_words)
    watch.stop()
    assert "stopped after step 7" in last_words[0]
    assert f"the newest checkpoint, but {tmp_path} cannot be read now" in last_words[0]
    assert "test_a_disk_that_hangs" in capfd.readouterr().err, "the main thread's stack"


def test_a_disk_that_hangs_does_not_keep_a_lost_rank_from_being_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[str]
) -> None:
    monkeypatch.setattr(training.ranks.watch, "GRACE_S", 0.2)
    here = this_member(0)
    other = dataclasses.replace(here, rank=1, process=Process(pid=here.process.pid, started=-1))
    watch = Watch([here, other])
    watch.follow(tmp_path, never)
    watch.start()
    wait_for(lambda: last_words)
    watch.stop()
    assert last_words[0].startswith(f"{other} is gone: the same command resumes from the newest checkpoint")


def test_the_last_line_cannot_control_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "_exit", lambda code: None)
    training.ranks.watch.end_process("rank 1 is gone (\x1b[2J)")
    assert capsys.readouterr().err == "error: rank 1 is gone (\\x1b[2J)\n"


def test_a_second_interrupt_ends_at_once_but_not_a_second_sigterm() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.raised
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
