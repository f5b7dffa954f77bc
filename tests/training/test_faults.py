"""Launchers and ranks that are gone, jobs that hang, and restarts: the parts alone, and the fault suite's real runs."""

import contextlib
import dataclasses
import json
import multiprocessing
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
from support import tiny
from support.runs import MeanColours, Run, send
from support.waiting import PATIENCE_S, wait_for

import training.ranks.supervisor
import training.ranks.watchdog
import training.ranks.world
from training.engine.checkpoints import latest_tag
from training.metrics import read_metrics
from training.ranks.stop import Interrupted, StopSignals
from training.ranks.supervisor import _Board, _End, _going_on, _Supervisor
from training.ranks.watchdog import (
    ATTEMPT,
    PIPE,
    Member,
    Process,
    Progress,
    RankLostError,
    Watch,
    behind,
    launchers,
    this_process,
)
from training.ranks.world import join_world

sys.path.append(str(Path(__file__).parents[1] / "faults"))

import jobs
import stops
from hangs import FAULTS as HANGS
from kills import Moment, Tally, kill_once
from runs import Course, inject, last_step, latest, require_equal

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


def test_the_launchers_of_a_rank_are_all_processes_up_to_the_outermost_one(
    started_by: Callable[[str, str], tuple[subprocess.Popen[str], int]],
) -> None:
    program, rank = started_by("torchrun", "sleep 60 & echo $!; wait")
    shell, launcher = launchers(rank)
    assert launcher.pid == program.pid
    assert shell.pid not in (program.pid, rank)


def test_a_shell_or_a_script_that_starts_a_rank_is_no_launcher(
    started_by: Callable[[str, str], tuple[subprocess.Popen[str], int]],
) -> None:
    program, rank = started_by("train.py", "sleep 60 & echo $!; wait")
    assert program.pid not in [process.pid for process in launchers(rank)]


def test_a_process_is_gone_once_it_has_ended_although_nobody_has_asked_for_its_code() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = launchers_child = Process(pid=child.pid, started=_started(child.pid))
    assert not process.is_gone()
    assert dataclasses.replace(launchers_child, started=process.started + 1).is_gone(), "another one of that number"
    child.kill()
    wait_for(process.is_gone)
    child.wait()
    assert process.is_gone()


def _started(pid: int) -> int:
    status = training.ranks.watchdog._status(pid)
    assert status is not None
    return status.started


def test_a_rank_is_introduced_to_the_others_as_text() -> None:
    member = this_process(3)
    assert Member.from_json(member.to_json()) == member
    assert str(member) == f"rank 3 (host {member.host}, process {os.getpid()})"
    assert not member.process.is_gone()


# --------------------------------------------------------------------------------------------------- the watch


def at(touches: int, *, is_waiting: bool = False) -> Progress:
    return Progress(touches=touches, is_waiting=is_waiting, step=touches)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({0: at(5), 1: at(5), 2: at(4)}, [2]),
        ({0: at(5), 2: at(4)}, [1]),
        ({0: at(5, is_waiting=True), 1: at(5), 2: at(5, is_waiting=True)}, [1]),
        ({0: at(5), 1: at(5), 2: at(5)}, []),
    ],
)
def test_behind_are_the_ranks_that_do_not_answer_or_are_least_far_or_do_not_wait(
    answers: dict[int, Progress], expected: list[int]
) -> None:
    assert behind(answers, 3) == expected


@pytest.fixture
def last_words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What watches have said in ending the process, which they do not do here."""
    said: list[str] = []

    monkeypatch.setattr(training.ranks.watchdog, "_end", said.append)
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
    assert "nothing is saved yet, the same command starts anew" in last_words[0]
    stacks = (tmp_path / "stacks" / "rank00000.txt").read_text()
    assert "test_when_nothing_moves" in stacks, "the main thread is in there"
    assert "7 steps done" in stacks
    said = json.loads((tmp_path / "state.json").read_text())
    assert (said["state"], said["reason"]) == ("failed", last_words[0])


@pytest.mark.slow
def test_a_run_that_moves_or_has_ended_or_has_not_taken_its_first_step_goes_on(
    tmp_path: Path, last_words: list[str]
) -> None:
    watch = Watch(timeout_s=0.6)
    watch.start()
    watch.follow(tmp_path, lambda: latest_tag(tmp_path / "checkpoints"))
    time.sleep(1.2)  # before the first step, four times as long
    for step in range(4):
        watch.touch(step)
        time.sleep(0.4)
    watch.rest()
    time.sleep(1.5)
    watch.stop()
    assert not last_words


def sleeper() -> tuple[subprocess.Popen[bytes], Process]:
    child = subprocess.Popen(["sleep", "60"])
    return child, Process(pid=child.pid, started=_started(child.pid))


def test_a_launcher_that_is_gone_is_as_a_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    child, process = sleeper()
    monkeypatch.setattr(training.ranks.watchdog, "launchers", lambda pid: (process,))
    watch = Watch()
    with StopSignals() as stop:
        watch.start()
        time.sleep(0.6)
        assert not stop.raised
        child.kill()
        child.wait()
        wait_for(lambda: stop.raised)
    watch.stop()


def test_a_rank_that_is_gone_is_named_with_the_checkpoint_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[str]
) -> None:
    monkeypatch.setattr(training.ranks.watchdog, "GRACE_S", 0.1)
    child, process = sleeper()
    here = this_process(0)
    watch = Watch([here, dataclasses.replace(here, rank=1, process=process)])
    (tmp_path / "checkpoints" / "step00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step00000004")
    watch.follow(tmp_path, lambda: latest_tag(tmp_path / "checkpoints"))
    watch.start()
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer")
    assert watch.loss_error(broken, wait_s=0.7) is None
    assert watch.loss_error(ValueError("no rank's end"), wait_s=PATIENCE_S) is None
    child.kill()
    child.wait()
    error = watch.loss_error(broken, wait_s=PATIENCE_S)
    expected = f"rank 1 (host {here.host}, process {process.pid}) is gone: the same command goes on from {tmp_path}"
    assert isinstance(error, RankLostError)
    assert str(error) == f"{expected}/checkpoints/step00000004"
    wait_for(lambda: last_words)  # the main thread did not end by itself
    assert last_words == [str(error)]
    watch.stop()
    said = json.loads((tmp_path / "state.json").read_text())
    assert (said["state"], said["reason"]) == ("failed", str(error))


def test_a_short_timeout_of_the_watch_does_not_shorten_what_ranks_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    store = dist.HashStore()  # type: ignore[attr-defined]  # as in training/ranks/world.py
    monkeypatch.setattr(training.ranks.world, "job_store", lambda place, *, host: store)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options))
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(dist.distributed_c10d, name, None)
    training.ranks.world._meet("gloo", timeout_s=1.0).stop()
    assert given["timeout"] >= timedelta(days=7)
    assert dist.distributed_c10d.default_pg_timeout == given["timeout"]


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watch, Any]]:
    """The watch of rank 0, whose only other rank is on another host, and their store; a heartbeat is soon missed."""
    for name, seconds in (("POLL_S", 0.05), ("_BEAT_S", 0.2), ("_SILENT_S", 0.5)):
        monkeypatch.setattr(training.ranks.watchdog, name, seconds)
    here = this_process(0)
    store = dist.HashStore()  # type: ignore[attr-defined]  # as in training/ranks/world.py
    watch = Watch([here, dataclasses.replace(here, rank=1, place="elsewhere")], store=store)
    watch.start()
    yield watch, store
    watch.stop()


BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer")


def test_a_rank_on_another_host_is_named_although_its_heartbeat_is_missed_after_the_collective_fails(
    two_hosts: tuple[Watch, Any],
) -> None:
    watch, store = two_hosts
    store.set("beat/1", "1")
    error = watch.loss_error(BROKEN, wait_s=0.1)
    assert str(error).startswith(f"{watch.members[1]} is gone (not heard of for ")
    assert json.loads(store.get("loss"))["rank"] == 1, "the others hear of it, and not of this one"


def test_where_it_is_not_known_which_rank_is_gone_the_error_says_so_and_no_other_rank_is_told_of_this_one(
    two_hosts: tuple[Watch, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, store = two_hosts
    monkeypatch.setattr(training.ranks.watchdog._Mail, "_listen", lambda _: None)
    for _ in range(2):  # the second time without waiting
        error = watch.loss_error(BROKEN, wait_s=0.1)
        assert str(error).startswith("another rank is gone, it is not known which ([gloo/transport")
    assert not store.check(["loss"])


def test_what_is_no_failure_of_a_collective_is_no_sign_that_another_rank_is_gone(two_hosts: tuple[Watch, Any]) -> None:
    watch, _ = two_hosts
    assert watch.loss_error(RuntimeError("CUDA out of memory"), wait_s=0.1) is None
    assert watch.loss is None, "it is told before a heartbeat is missed"


def never() -> None:
    threading.Event().wait()


def test_a_disk_that_hangs_does_not_keep_a_watch_from_ending_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training.ranks.watchdog, "GRACE_S", 0.2)
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


def test_a_disk_that_hangs_does_not_keep_the_loss_of_a_rank_from_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[str]
) -> None:
    monkeypatch.setattr(training.ranks.watchdog, "GRACE_S", 0.2)
    here = this_process(0)
    other = dataclasses.replace(here, rank=1, process=Process(pid=here.process.pid, started=-1))
    watch = Watch([here, other])
    watch.follow(tmp_path, never)
    watch.start()
    wait_for(lambda: last_words)
    watch.stop()
    assert last_words[0].startswith(f"{other} is gone: the same command goes on from the newest checkpoint")


def test_last_words_cannot_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "_exit", lambda code: None)
    training.ranks.watchdog._end("rank 1 is gone (\x1b[2J)")
    assert capsys.readouterr().err == "error: rank 1 is gone (\\x1b[2J)\n"


def test_a_second_interrupt_ends_at_once_and_any_number_of_sigterms_does_not() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.raised
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# ---------------------------------------------------------------------------------------------- the supervisor

CHILD = f"""
import os, signal, sys, time
attempt, rank = int(os.environ[{ATTEMPT!r}]), os.environ.get("RANK", "0")
def tell(word):
    os.write(int(os.environ[{PIPE!r}]), word.encode() + b"\\n")
def note(folder):
    with open(os.path.join(folder, "rank" + rank), "a") as file:
        file.write(str(attempt) + " ")
"""


def supervised(code: str, restarts: int) -> int:
    return _Supervisor([sys.executable, "-S", "-c", CHILD + code], restarts).run()


@pytest.mark.parametrize(
    "option",
    [
        ["--fresh"],
        ["--resume-from", "step00000002"],
        ["--resume-from=step00000002"],
        ["--resume_from", "step00000002"],
        ["--resume_from=step00000002"],
    ],
)
def test_a_restart_goes_on_where_the_first_attempt_started_anew(tmp_path: Path, option: list[str]) -> None:
    calls = tmp_path / "calls"
    code = f"open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10)); tell('started'); sys.exit(1)"
    program = [sys.executable, "-S", "-c", CHILD + code]
    arguments = ["clip", *option, "--steps", "4"]
    assert _Supervisor([*program, *arguments], 1, [*program, *_going_on(arguments)]).run() == 1
    assert calls.read_text().splitlines() == [" ".join(arguments), "clip --steps 4"]


@pytest.mark.parametrize(
    ("code", "restarts", "expected"),
    [
        ("os.kill(os.getpid(), 9) if attempt < 2 else sys.exit(0)", 3, (0, 2)),
        ("os.kill(os.getpid(), 9)", 2, (-9, 2)),
        ("sys.exit(1)", 2, (1, 0)),
        ("tell('started'); sys.exit(1)", 2, (1, 2)),
        ("tell('lost'); sys.exit(1)", 1, (1, 1)),
        ("tell('started'); tell('final'); sys.exit(1)", 2, (1, 0)),
        ("tell('started'); sys.exit(0)", 2, (0, 0)),
    ],
)
def test_only_what_a_restart_may_mend_is_restarted_and_not_too_often(
    code: str,
    restarts: int,
    expected: tuple[int, int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training.ranks.supervisor, "VERDICT_S", 0.1)
    assert supervised(code, restarts) == expected[0]
    assert capfd.readouterr().err.count(": restart ") == expected[1]


def test_a_signal_to_the_supervisor_stops_the_child_in_order_and_nothing_is_restarted(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "signal.signal(15, lambda *_: sys.exit(0)); tell('started'); print('ready', flush=True); time.sleep(60)"
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert supervised(code, 3) == 0
    assert "restart" not in capfd.readouterr().err


def test_a_verdict_is_heard_before_the_child_that_gives_it_ends() -> None:
    supervisor, heard = _Supervisor([], 2), []
    code = "tell('started'); tell('final'); time.sleep(60)"
    supervisor._command = [sys.executable, "-S", "-c", CHILD + code]
    board = _Board(0)
    ends = threading.Thread(target=lambda: heard.append(supervisor._attempt(0, board)))
    ends.start()
    wait_for(board.is_over)
    assert not heard
    assert supervisor._child is not None
    supervisor._child.kill()
    ends.join(PATIENCE_S)
    assert heard[0].words == {"started", "final"}


def test_who_only_suffers_from_another_rank_s_end_waits_for_its_verdict() -> None:
    supervisor, board = _Supervisor([], 2), _Board(0)
    threading.Timer(0.5, board.end).start()
    assert supervisor._following(0, _End(code=1, words=frozenset({"lost"})), board) is None
    assert board.attempt() == 0, "no attempt was begun"


def test_the_first_rank_to_ask_decides_for_all_whether_an_attempt_goes_on() -> None:
    board = _Board(1)
    assert not board.goes_on(1)
    board.start()
    assert not board.goes_on(1), "as for whoever asked before"
    assert board.goes_on(2)


def _supervise_rank(rank: int, port: int, code: str, codes: "multiprocessing.Queue[tuple[int, int]]") -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    codes.put((rank, supervised(code, 5)))


@pytest.mark.slow
def test_ranks_meet_in_the_same_attempt_although_one_fails_twice_before_the_other_notices(tmp_path: Path) -> None:
    code = f"note({str(tmp_path)!r})\n"
    code += "if rank == '1' and attempt < 2: os.kill(os.getpid(), 9)\n"
    code += "if rank == '0' and attempt < 2: time.sleep(3); tell('lost'); sys.exit(1)\n"
    context = multiprocessing.get_context("forkserver")
    codes = context.Queue()
    port = jobs.free_port()
    ranks = [context.Process(target=_supervise_rank, args=(rank, port, code, codes)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        assert dict(codes.get(timeout=120) for _ in ranks) == {0: 0, 1: 0}
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    assert (tmp_path / "rank0").read_text().split() == ["0", "2"]
    assert (tmp_path / "rank1").read_text().split() == ["0", "1", "2"]


# ------------------------------------------------------------------------------------------ the end of a step


def lines_of(run: Run) -> list[tuple[int, str, float]]:
    lines = read_metrics(run.folder / "run" / "metrics.jsonl")
    return [(line["step"], line["split"], line["loss"]) for line in lines]


def test_a_stop_loses_no_validation_of_the_step_after_which_it_comes(tmp_path: Path, shards: Path) -> None:
    data, config = tiny.open_world(shards), tiny.train_config(steps=8, validate_every=4)
    straight, stopped = Run(tmp_path / "straight", data, join_world()), Run(tmp_path / "stopped", data, join_world())
    straight(config, validation=data)
    with pytest.raises(Interrupted, match="stopped at step 4"):
        stopped(config, validation=data, at_step=send(signal.SIGTERM, 3))
    stopped(config, validation=data)
    assert lines_of(stopped) == lines_of(straight)
    assert [step for step, split, _ in lines_of(stopped) if split == "validation"] == [4, 8]


def test_a_crash_in_the_last_validation_loses_nothing(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("power failure")

    data, config = tiny.open_world(shards), tiny.train_config(steps=6, checkpoint_every=2)
    straight, crashed = Run(tmp_path / "straight", data, join_world()), Run(tmp_path / "crashed", data, join_world())
    straight(config, validation=data)
    with monkeypatch.context() as patch:
        patch.setattr(MeanColours, "transform_for_validation", crash)
        with pytest.raises(RuntimeError, match="power failure"):
            crashed(config, validation=data)
    crashed(config, validation=data)
    assert lines_of(crashed) == lines_of(straight)
    assert crashed.weights == straight.weights


# --------------------------------------------------------------------------------------------- the fault suite


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    scratch = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        patch.setenv("TMPDIR", os.environ.get("TMPDIR", "/tmp"))
        jobs.prepare_environment(scratch)
        yield Course(scratch)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_a_save_is_named_by_the_other_one_and_nothing_is_lost(course: Course, rank: int) -> None:
    bundle = course.bundle(f"killed{rank}")
    command, tally = course.command(bundle), Tally()
    kill_once(course, command, bundle, rank, Moment(step=8, kind="save", delay_s=0.002), tally)
    assert tally.n == 1
    assert latest(bundle) in (4, 8)
    course.finish(command, f"killed{rank}-end")
    require_equal(bundle, course.straight())


def _on_a_host_of_its_own(rank: int) -> None:
    """Let each rank believe that it alone is on its host, and miss a heartbeat sooner than in earnest."""
    training.ranks.watchdog._BEAT_S, training.ranks.watchdog._SILENT_S = 0.5, 8.0
    training.ranks.world.this_process = lambda rank: dataclasses.replace(this_process(rank), place=f"host {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_on_another_host_is_named_by_the_other_one(course: Course, rank: int) -> None:
    bundle = course.bundle(f"elsewhere{rank}")
    log = course.scratch / "logs" / bundle.name
    with jobs.Job(log, course.command(bundle), inject=_on_a_host_of_its_own) as job:
        jobs.wait_for(lambda: last_step(bundle) >= 5 or not job.is_running(), "step 5")
        job.send(rank, signal.SIGKILL)
        codes = job.wait()
        said = job.said(1 - rank)
    assert codes[1 - rank] == 1, said
    assert f"error: rank {rank} (host " in said
    assert "Traceback" not in said
    if rank == 1:  # the first rank's end is the store's, which is noticed at once
        assert "not heard of for 8 s" in said
        state = json.loads((bundle / "training" / "transformer" / "state.json").read_text())
        assert state["reason"].startswith("rank 1 (host ")


SURVIVED = (
    "SIGTERM to rank 1",
    "SIGTERM to deepspeed",
    "kill -9 of torchrun",
    "a rank asleep (SIGSTOP)",
    "a rank asleep in a step",
    "kill -9 of a rank under deepspeed --auto-restart 2",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [fault for fault in (*stops.FAULTS, *HANGS) if fault.name in SURVIVED],
    ids=lambda fault: fault.name.replace(" ", "-"),
)
def test_a_fault_is_survived(course: Course, fault: stops.Fault, request: pytest.FixtureRequest) -> None:
    row = inject(fault, course, request.node.callspec.id)
    assert row.passed, row.happened


@pytest.mark.slow
def test_reading_processes_end_with_a_training_process_that_is_killed(course: Course) -> None:
    bundle = course.bundle("reading")
    with jobs.Job(course.scratch / "logs" / "reading", course.command(bundle), ranks=1) as job:
        jobs.wait_for(lambda: last_step(bundle) >= 2 or not job.is_running(), "step 2")
        assert len(job.left_over()) == 2, "the rank and its reading process"
        job.send(0, signal.SIGKILL)
        wait_for(lambda: not job.left_over())


def test_a_fault_that_is_not_survived_is_a_row_that_failed() -> None:
    row = inject(stops.Fault(name="a", injected="b", run=lambda *_: ("c | d", "nothing")), None, "x")  # type: ignore[arg-type]
    assert (row.happened, row.lost, row.passed) == ("c | d", "nothing", True)

    def fail(*_: object) -> tuple[str, str]:
        raise TimeoutError("step 3 did not happen")

    assert inject(stops.Fault(name="a", injected="b", run=fail), None, "x").passed is False  # type: ignore[arg-type]
